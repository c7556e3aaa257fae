"""Models of diffusers, tiny: transformers need nothing new, UNets and autoencoders are mostly convolutions."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn

from fira_hf import FiraConfig, get_fira_optimizer
from fira_hf.targets import find_targets

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install '.[diffusion]'")

RANK = 4
TIMES, TEXT, LATENTS = torch.tensor([7, 400]), (2, 5, 12), (2, 4, 8, 8)
BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}


def random(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def dit():
    model = diffusers.DiTTransformer2DModel(2, 8, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=10)
    return model, {"hidden_states": random(LATENTS), "timestep": TIMES, "class_labels": torch.tensor([1, 2])}


def sd3():
    """Joint attention of image and text."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    text = {"encoder_hidden_states": random(TEXT), "pooled_projections": random((2, 10))}
    return model, {"hidden_states": random(LATENTS), "timestep": TIMES, **text}


def pixart():
    """Cross-attention."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12}
    model = diffusers.PixArtTransformer2DModel(**sizes, num_layers=1, sample_size=8, use_additional_conditions=False)
    text = {"encoder_hidden_states": random(TEXT), "timestep": TIMES, "added_cond_kwargs": {}}
    return model, {"hidden_states": random(LATENTS), **text}


def unet():
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = diffusers.UNet2DModel(8, 4, 4, **blocks, **BLOCKS, attention_head_dim=8)
    return model, {"sample": random(LATENTS), "timestep": TIMES}


def vae():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**blocks, **BLOCKS, latent_channels=2), {"sample": random((2, 3, 8, 8))}


def conditional():
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "mid_block_type": "UNetMidBlock2DCrossAttn"}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    model = diffusers.UNet2DConditionModel(8, **blocks, **BLOCKS, cross_attention_dim=12, attention_head_dim=2)
    return model, {"sample": random(LATENTS), "timestep": TIMES, "encoder_hidden_states": random(TEXT)}


def train_one_step(model: nn.Module, inputs: dict, config: FiraConfig) -> tuple[set[str], str]:
    """The weights that moved, and the summary."""
    for p in model.parameters():  # some begin at zero, and then nothing before them has a gradient
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = get_fira_optimizer(model, config)
    model(**inputs).sample.square().mean().backward()
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}, optimizer.summary


def expected(model: nn.Module) -> dict[str, bool]:
    """The weights of all linear layers, and of the convolutions that are wider than the rank, which are True."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[f"{name}.weight"] = False
        elif isinstance(module, nn.Conv2d):
            out = module.out_channels
            if min(out, module.weight.numel() // out) > RANK:
                found[f"{name}.weight"] = True
    return found


# What has no gradient: the last layer of SD3 makes nothing of the text.
UNUSED = {"SD3Transformer2DModel": {"transformer_blocks.1.attn.add_q_proj.weight"}}


@pytest.mark.parametrize(
    ("build", "memory_format"),
    [
        (dit, torch.contiguous_format),
        (sd3, torch.contiguous_format),
        (pixart, torch.contiguous_format),
        (unet, torch.contiguous_format),
        (unet, torch.channels_last),
        (vae, torch.channels_last),
    ],
    ids=["DiT", "SD3", "PixArt", "UNet", "UNet channels_last", "AutoencoderKL channels_last"],
)
def test_every_projected_matrix_moves(build, memory_format):
    torch.manual_seed(0)
    model, inputs = build()
    model.to(memory_format=memory_format)
    config = FiraConfig(rank=RANK, target_modules="all-linear-and-conv")
    projected = {target.name: target.convolution for target in find_targets(model, config).projected}
    assert projected == expected(model)
    moved, summary = train_one_step(model, inputs, config)
    assert projected.keys() - moved == UNUSED.get(type(model).__name__, set())
    assert f"Fira projects {len(projected)} matrices " in summary
    has_many = sum(projected.values()) > 20
    assert has_many == (build in (unet, vae))


def test_the_adapter_of_a_unet():
    """LoRA by diffusers and PEFT around attention and convolutions: nothing but A and B moves."""
    torch.manual_seed(0)
    model, inputs = conditional()
    names = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=8, init_lora_weights="gaussian", target_modules=names))
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    moved, summary = train_one_step(model, inputs, FiraConfig(rank=RANK, target_modules="all-linear-and-conv"))
    assert moved == adapters
    assert f"Fira projects {len(adapters)} matrices " in summary
