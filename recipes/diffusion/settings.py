"""The methods of this recipe, and its own arguments beside those of the Trainer. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.settings import Method, Recipe, one_of

MODELS = ("unet", "dit")
METHODS = {
    "adamw-full": Method(lora=False, optimizers=("adamw_torch", "adamw_torch_fused")),
    "fira-full": Method(lora=False, optimizers=("fira", "fira_layerwise")),
    "galore-full": Method(lora=False, optimizers=("galore_adamw",)),
    "lora": Method(lora=True, optimizers=("adamw_torch", "adamw_torch_fused")),
}
RECIPE = Recipe(
    package="recipes.diffusion",
    methods=METHODS,
    paths=frozenset({"output_dir"}),
    derived={
        "optim_target_modules": "it is every linear layer, and for fira-full every convolution wider than its rank"
    },
)


@dataclass
class RecipeArguments:
    """The recipe's settings beside `transformers.TrainingArguments`."""

    method: str = field(metadata={"help": "One of " + ", ".join(METHODS) + "."})
    model: str = field(metadata={"help": "One of " + ", ".join(MODELS) + "."})
    width: int = field(
        default=32, metadata={"help": "Channels of the UNet's first blocks; half of a token in the DiT."}
    )
    draws: int = field(default=4, metadata={"help": "Noises, of one time each, for each held-out image."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of LoRA's A and B."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale is lora_alpha / lora_rank."})

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("model", self.model, MODELS)
        for name in ("width", "draws", "lora_rank", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.width % 16:
            raise ValueError(f"width is {self.width}; it must be a multiple of 16, the width of a head.")
