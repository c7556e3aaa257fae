"""`FiraConfig`: which weights to project and how; its presets, and the names that settings go by."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .rules import check_update, normalised

CONFIG_NAME = "fira_config.json"
ALL_LINEAR = "all-linear"
ALL_LINEAR_AND_CONV = "all-linear-and-conv"
WORDS = (ALL_LINEAR, ALL_LINEAR_AND_CONV)  # what target_modules takes beside names and regular expressions
LAYERWISE = "fira_layerwise"

# The settings in which the published code differs from the defaults: FiraConfig(**PUBLISHED), with the authors'
# rank, alpha and learning rate, is their method. (For the 7B model they publish an interval of 500.)
PUBLISHED: dict[str, Any] = {
    "projection": "svd",
    "refresh": "together",
    "moments": "kept",
    "update_proj_gap": 200,
    "gamma": 1.01,
    "adjust_lr": "none",
}
# Muon's update where it matters, and of the rest its size by rows, from a moment in 4 bits.
SUBSPACE_MUON: dict[str, Any] = {"base_optimizer": "muon", "residual": "moment", "state_dtype": "int4"}
FULL_RANK = 2**30  # of every matrix: it is cut at the short side
PRESETS = {
    "published": PUBLISHED,
    "subspace-muon": SUBSPACE_MUON,
    "muon-4bit": {**SUBSPACE_MUON, "rank": FULL_RANK},
}
# Settings of galore_torch, apollo_torch and fira that have another name here, or none.
OF_PEERS = {"scale": "alpha", "proj_type": None, "proj": None, "scale_type": None}

# What torch.compile, FSDP1 and activation checkpointing put into names, and what DDP and PEFT put before them.
WRAPPERS = re.compile(r"(?:^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")
PREFIXES = re.compile(r"^(?:module\.|base_model\.model\.)+")


def plain_name(name: str) -> str:
    """The name of a parameter or module as it is in the model that others have wrapped."""
    return PREFIXES.sub("", WRAPPERS.sub("", name).lstrip("."))


def word_or_regex(target: str) -> str:
    """One of `WORDS`, however it is spelled; any other string as it is."""
    word = target.lower().replace("_", "-")
    return word if word in WORDS else target


def unknown_name(kind: str, name: str, valid: list[str]) -> str:
    """The error text for a name that does not exist: the nearest valid one first, then all of them."""
    nearest = difflib.get_close_matches(name, valid, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    if OF_PEERS.get(name) in valid:
        hint = f" It is called {OF_PEERS[name]!r} here."
    return f"Unknown {kind} {name!r}.{hint} Valid: {', '.join(valid)}."


def with_preset(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """The settings, over those of the preset that `preset` among them names; `source` begins the error."""
    own = dict(settings)
    preset = own.pop("preset", None)
    if preset is None:
        return own
    if preset not in PRESETS:
        raise ValueError(f"{source}: {unknown_name('preset', str(preset), list(PRESETS))}")
    return PRESETS[preset] | own


@dataclass
class FiraConfig:
    """Settings of Fira (arXiv 2410.01623), named as in the published code. Matching follows PEFT's `LoraConfig`.

    Numbers, sequences and mappings may be those of other libraries (numpy, torch, OmegaConf); kept are Python's own.

    Args:
        rank: rank of the projection; a matrix with a shorter side than this is projected at its short side.
        alpha: scale of the low-rank update. What it does to the residual is set by `residual`. At 0 only the scaled
            gradient is left, W -= eta phi G (the paper's only-scaling), for residual="reference".
        update_proj_gap: optimizer steps between two refreshes of a basis; published are 200 and 500.
        gamma: the limiter's number; by default the largest growth of the residual's norm from one step to the next,
            a bound on spikes. The published 1.01 is a schedule, too: the norm of the first step decides how large it
            can be for hundreds of steps. None switches the limiter off.
        target_modules: "all-linear" (every linear layer but the output or classification head, and the stacked
            experts of a mixture), "all-linear-and-conv" (the same, and every convolution whose matrix is wider than
            its rank: one that is not, such as the first and the last of a diffusion model, would need more state than
            by AdamW), a list of names (exact, or a dotted suffix), or a regular expression that must match a module's
            full name. Of a convolution, transposed ones included, the weight (first, second, *kernel) is the matrix
            (first, second * kernel).
        target_parameters: names (exact, or a dotted suffix) of further parameters to project, matrices or stacks of
            matrices (3-D) that are no linear layer's weight, beside what `target_modules` chooses.
        exclude_modules: names or a regular expression, by the same rules, of modules that are not projected.
        layers_to_transform: only layers of these indices; for "all-linear" or a list of names.
        layers_pattern: name of the list of layers that the indices count in, such as "layers" or "h".
        rank_pattern: module name or regular expression -> rank, where it differs from `rank`.
        alpha_pattern: the same for `alpha`.
        split_pattern: module name or regular expression -> the number of equal parts that the weight fuses one after
            another along its output dimension (3 for GPT-2's "c_attn", or the groups of a convolution); each is
            projected by itself. That they are equal, and not in turns, is not seen from the shape.
        projection: how a basis is found. "power": one step of block power iteration from the previous basis; "svd":
            the leading right singular vectors of the gradient, as published, as good and far more expensive;
            "random": a random subspace, whatever the gradient; "columns": `rank` neighbouring columns of the shorter
            side, which is a view and needs no basis. At each refresh (on every device counted in calls of `step()`)
            others take their turn, in an order drawn from the seed.
        refresh: "staggered": spread over the interval, so that no update takes much longer than another; "together":
            every basis at each `update_proj_gap`-th update, as published.
        moments: what becomes of them when the basis changes. "rotated": carried into the new basis; "kept": stay as
            they are, as published. Columns have nothing in common with others: "rotated", their moments begin anew,
            and with them the bias correction.
        base_optimizer: what makes the low-rank update N of R and its moments. "adamw"; "lion" (arXiv 2302.06675): the
            sign of beta1 M + (1 - beta1) R, where M decays by beta2, without bias correction and eps; "adafactor":
            AdamW with the second moment of Adafactor (arXiv 1804.04235), which keeps its means over rows and columns;
            "muon" (arXiv 2502.16982): the first moment (beta1, Nesterov), singular values brought near 1; beta2, eps
            and `correct_bias` have no part in it.
            Weights that are not projected are trained by AdamW whatever this is, with the same betas.
        scaling: the scale of the residual: one per row of the long side ("column", the paper's default), one per
            matrix ("matrix"), or 1 ("none").
        residual: "reference": alpha as in the published code, W -= eta (alpha N Q^T + phi (G - alpha R Q^T));
            "paper": as in the paper, W -= eta alpha (N Q^T + phi (G - R Q^T)), the same at alpha = 1; "none":
            W -= eta alpha N Q^T, which is GaLore, or with projection="random" Flora. "moment", with
            base_optimizer="muon": the first moment is kept whole, in `state_dtype`; N is made of its part in the
            subspace, and what is left of it is applied beside it, the rows of both brought to one norm (see
            `fira_hf.whole`). A rank of the short side is Muon with equal rows, and keeps no basis.
        limiter: what becomes of the residual's norm, gamma = g. "growth": at most g times that of the step before;
            "shrink": g times its own plus 1 - g times that of the step before; "scale": g times its own.
        adjust_lr: what the learning rate of projected weights is multiplied by, apart from weight decay.
            "match_rms_adamw": sqrt(short / rank), by which a low-rank update is as large as AdamW's of the whole
            matrix, or 0.2 sqrt(long) where base_optimizer="muon" (arXiv 2502.16982): AdamW's learning rates serve at
            any rank. "none": 1, as published.
        state_dtype: of moments and basis, "float32", "bfloat16" or "int8", which are codes with a scale for 32 (see
            `fira_hf.codes`); with residual="moment" "int8" or "int4" for the whole moment, and "bfloat16" for the
            basis. Weights that are not projected have "bfloat16" beside either. Moments that are not fp32 are rounded
            at random, without which they could not follow betas near 1.
        stochastic_rounding: whether updated bf16 weights are rounded at random to one of their two neighbours, the
            nearer the likelier, so that small updates are not lost; no effect on fp32 weights, refused for fp16.
        lr, betas, eps, weight_decay: those of AdamW; decay is decoupled. eps defaults to the published 1e-6.
        correct_bias: whether the moments' bias is corrected. False with betas=(0.0, 0.9) is the published FiraRMSProp.
        dense_lr: learning rate of the trainable weights that are not projected; None: `lr`.

    Raises:
        ValueError: naming the setting, its value and the rule.
    """

    rank: int = 128
    alpha: float = 1.0
    update_proj_gap: int = 10
    gamma: float | None = 2.0
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    split_pattern: dict[str, int] = field(default_factory=dict)
    projection: str = "power"
    refresh: str = "staggered"
    moments: str = "rotated"
    base_optimizer: str = "adamw"
    scaling: str = "column"
    residual: str = "reference"
    limiter: str = "growth"
    adjust_lr: str = "match_rms_adamw"
    state_dtype: str = "float32"
    stochastic_rounding: bool = False
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    correct_bias: bool = True
    weight_decay: float = 0.0
    dense_lr: float | None = None

    def __post_init__(self) -> None:
        lists = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
        for name in lists:
            value = getattr(self, name)
            if isinstance(value, Set):
                setattr(self, name, sorted(value, key=lambda entry: (type(entry).__name__, entry)))
        if isinstance(self.target_modules, str):
            self.target_modules = word_or_regex(self.target_modules)
        for name in self.__dataclass_fields__:
            setattr(self, name, normalised(name, getattr(self, name)))
        if isinstance(self.target_modules, list) and (words := set(WORDS).intersection(self.target_modules)):
            raise ValueError(f"target_modules={self.target_modules!r} is a list: write {words.pop()!r} by itself.")
        self.betas = (self.betas[0], self.betas[1])
        check_update(vars(self))
        if not self.target_modules and self.target_parameters is None:
            raise ValueError(
                f"target_modules={self.target_modules!r} chooses nothing: name modules, or parameters in "
                "target_parameters."
            )
        is_regex = isinstance(self.target_modules, str) and self.target_modules not in WORDS
        if is_regex and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} cannot be combined with the regular expression "
                f"target_modules={self.target_modules!r}: put the layer indices into the expression."
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: set both or none."
            )

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON types."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Writes `fira_config.json` (sorted keys, one setting a line) into the directory and returns its path."""
        path = Path(save_directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        # Settings are sorted, but not the entries of a pattern: the first one that matches counts.
        settings = dict(sorted(self.to_dict().items()))
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, path: str | Path) -> FiraConfig:
        """Reads a `fira_config.json`, given as the file or its directory.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a JSON object, or a setting is unknown or not valid.
        """
        file = Path(path).expanduser()
        file = file / CONFIG_NAME if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(
                f"No Fira configuration at {str(file)!r}: give a local {CONFIG_NAME} or its directory."
            )
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(file)!r} is not JSON: {error}.") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{str(file)!r} must hold a JSON object of settings, not {type(settings).__name__}.")
        valid = sorted(cls.__dataclass_fields__)
        for name in settings:
            if name not in valid:
                raise ValueError(f"{str(file)!r}: {unknown_name('setting', name, valid)}")
        return cls(**settings)


def _defaults(*names: str) -> dict[str, Any]:
    return {name: FiraConfig.__dataclass_fields__[name].default for name in names}


# What a parameter group may set beside AdamW's settings, with the defaults: any group, and one with a rank.
SHARED_DEFAULTS = _defaults("state_dtype", "stochastic_rounding", "correct_bias")
PROJECTED_DEFAULTS = _defaults(
    "alpha",
    "update_proj_gap",
    "gamma",
    "projection",
    "refresh",
    "moments",
    "base_optimizer",
    "scaling",
    "residual",
    "limiter",
    "adjust_lr",
)
# How the matrices lie in a weight: fused parts along its output dimension, whether it is stored (in, out), and whether
# it is a convolution's.
PROJECTED_DEFAULTS |= {"split": 1, "transposed": False, "convolution": False}
