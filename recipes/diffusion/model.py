"""Two small diffusion models of diffusers that are told the digit, and the loss by which they learn."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from recipes.diffusion.data import DIGITS, SIDE, TIMES
from recipes.diffusion.settings import RecipeArguments
from recipes.relora import add_lora

SCHEDULE = {"num_train_timesteps": TIMES, "beta_schedule": "squaredcos_cap_v2"}
SAMPLING_STEPS = 50
# What reads an image and what writes one; LoRA leaves it as it is, and it is trained.
ENDS = ("conv_in", "conv_out", "pos_embed", "proj_out_2")


def build(arguments: RecipeArguments) -> nn.Module:
    if arguments.model == "unet":
        return UNet2DModel(
            sample_size=SIDE,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(arguments.width, 2 * arguments.width),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=16,
            num_class_embeds=DIGITS,
        )
    return DiTTransformer2DModel(
        num_attention_heads=2 * arguments.width // 16,
        attention_head_dim=16,
        in_channels=1,
        num_layers=4,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=DIGITS,
    )


def with_lora(model: nn.Module, arguments: RecipeArguments) -> None:
    """LoRA around every layer but the two ends, in place; ends, embeddings and norms are trained as they are."""
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, _ConvNd))]
    wrapped = [name for name in layers if name.split(".")[0] not in ENDS]
    config = LoraConfig(r=arguments.lora_rank, lora_alpha=arguments.lora_alpha, target_modules=wrapped)
    add_lora(model, config, embeddings=True)


class Denoiser(nn.Module):
    """What the Trainer trains: the mean squared error of the predicted noise (DDPM, arXiv 2006.11239)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.schedule = DDPMScheduler(**SCHEDULE)

    def forward(
        self, images: Tensor, labels: Tensor, noise: Tensor | None = None, times: Tensor | None = None
    ) -> dict[str, Any]:
        """Noise and times are drawn where they are not given. "losses" (n,): of each image."""
        if noise is None or times is None:
            noise = torch.randn_like(images)
            times = torch.randint(0, TIMES, labels.shape, device=images.device)
        noisy = self.schedule.add_noise(images, noise, times)
        losses = (self.model(noisy, times, class_labels=labels).sample - noise).square().flatten(1).mean(1)
        return {"loss": losses.mean(), "losses": losses}

    @torch.no_grad()
    def sample(self, labels: Tensor, seed: int) -> Tensor:
        """Images (n, 1, 8, 8) of these digits, by DDIM from the same noise for the same seed."""
        schedule = DDIMScheduler(**SCHEDULE)
        schedule.set_timesteps(SAMPLING_STEPS)
        start = torch.randn(len(labels), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        images = start.to(labels.device)
        for time in schedule.timesteps:
            at = time.to(labels.device).expand(len(labels))
            noise = self.model(images, at, class_labels=labels).sample
            images = schedule.step(noise, time, images).prev_sample
        return images
