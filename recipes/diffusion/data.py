"""The images: 1,797 handwritten digits of 8 x 8 pixels, which scikit-learn carries (of the UCI repository)."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from sklearn.datasets import load_digits

SIDE, DIGITS = 8, 10
HELD_OUT = 297
TIMES = 1000  # steps of the noise, from which one is drawn for each example
SEED = 0  # of what is held out and of its noise, the same in all runs


def load() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Examples for training and held-out ones, {"images": (1, 8, 8) fp32 from -1 to 1, "labels": the digit}."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).div_(8).sub_(1).unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED)).tolist()
    examples = [{"images": images[i], "labels": int(found.target[i])} for i in order]
    return examples[HELD_OUT:], examples[:HELD_OUT]


def with_noise(examples: list[dict[str, Any]], draws: int) -> list[dict[str, Any]]:
    """Each example so many times one after another, each with noise and a time from another part of the range."""
    generator = torch.Generator().manual_seed(SEED)
    found = []
    for example in examples:
        for part in range(draws):
            share = (part + torch.rand((), generator=generator).item()) / draws
            noise = torch.randn(example["images"].shape, generator=generator)
            found.append({**example, "noise": noise, "times": int(share * TIMES)})
    return found


def fingerprint(examples: list[dict[str, Any]]) -> str:
    """Tells whether two runs were judged by the same images, noises and times."""
    whole = torch.stack([torch.cat([one["images"], one["noise"]]) for one in examples])
    times = torch.tensor([one["times"] for one in examples])
    return hashlib.sha256(whole.numpy().tobytes() + times.numpy().tobytes()).hexdigest()[:16]


def as_text(images: torch.Tensor) -> list[str]:
    """Images (n, 1, 8, 8) from -1 to 1 as text: a hexadecimal figure a pixel, row by row."""
    levels = images.add(1).mul(7.5).round().clamp(0, 15).int().flatten(1).tolist()
    return ["".join(f"{level:x}" for level in image) for image in levels]


def from_text(image: str) -> list[list[int]]:
    """Its rows of pixels, 0 to 15."""
    levels = [int(level, 16) for level in image]
    return [levels[i : i + SIDE] for i in range(0, len(levels), SIDE)]
