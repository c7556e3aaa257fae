"""Model + `FiraConfig` -> `FiraAdamW`, with its parameter groups: projected or not x decay or not."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import PROJECTED_DEFAULTS, SHARED_DEFAULTS, FiraConfig, unknown_name, with_preset
from .int8 import is_int8
from .optimizer import FiraAdamW
from .state import state_dtype_of
from .targets import Skipped, TargetPlan, adamw_state_bytes, find_targets

logger = logging.getLogger(__name__)

# Weights that do not decay: the Trainer's own rule (transformers, `Trainer.get_decay_parameter_names`).
NO_DECAY_NAMES = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)

# Settings that choose layers by their names, which parameters alone do not have.
OF_LAYERS = {"target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"}
OF_LAYERS |= {"rank_pattern", "alpha_pattern", "split_pattern"}
# What may differ from one projected weight to another.
OF_TARGET = ("rank", "alpha", "split", "transposed", "convolution")


def get_fira_optimizer(model: nn.Module, config: FiraConfig | None = None) -> FiraAdamW:
    """The optimizer for all trainable weights of the model; without a config by the defaults of `FiraConfig`.

    Weight decay spares what the Trainer spares: biases and normalisation layers. The optimizer's `summary` says what
    is projected, what is not and why. The processes of a model in `DistributedDataParallel` share the work of finding
    bases; where the model is wrapped later, set the optimizer's `process_group` for that (once accelerate or Lightning
    have wrapped the optimizer, that of `unwrapped(optimizer)`).

    Raises:
        ValueError: the config does not fit the model; see `find_targets`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"get_fira_optimizer takes the model, whose layers it chooses by name, not a {type(model).__name__}: for "
            "bare parameters take fira_adamw(params, lr, rank=...)."
        )
    config = FiraConfig() if config is None else config
    if not isinstance(config, FiraConfig):
        raise TypeError(f"config={config!r} is no FiraConfig: write get_fira_optimizer(model, FiraConfig(rank=8)).")
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    spared = {
        p
        for module_name, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or NO_DECAY_NAMES.search(f"{module_name}.{name}")
    }
    for p in model.parameters():
        if p.requires_grad:
            (no_decay if p in spared else decay).append(p)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = build_optimizer(model, config, groups)
    if isinstance(model, DistributedDataParallel):
        optimizer.process_group = model.process_group
    return optimizer


def fira_adamw(params: Iterable[Any], lr: float = FiraConfig.lr, **settings: Any) -> FiraAdamW:
    """The optimizer for parameters, or groups of them, whose model is not at hand: every matrix is projected.

    For programs that make an optimizer by a dotted name and keywords, such as sd-scripts and musubi-tuner. `settings`
    are those of `FiraConfig` that choose no layers, `rank`, `gamma`, `weight_decay` and so on, and `preset`, one of
    `PRESETS`, which they override. Groups keep their own learning rate and weight decay. Matrices that are frozen now
    are trained by AdamW if they are thawed later: for Fira, make the optimizer anew.

    Raises:
        ValueError: a setting is unknown or not valid, or there is no matrix that is trained.
    """
    valid = [name for name in FiraConfig.__dataclass_fields__ if name not in {"lr"} | OF_LAYERS]
    for name in settings.keys() - {"preset"}:
        if name not in valid:
            raise ValueError(f"fira_adamw: {unknown_name('setting', name, valid)}")
    settings = with_preset(settings, "fira_adamw")
    entries = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    groups = [{**group, "params": _listed(group["params"])} for group in groups]
    given = [entry[1] if isinstance(entry, tuple) else entry for group in groups for entry in group["params"]]
    if not all(isinstance(p, nn.Parameter) for p in given):
        raise ValueError("fira_adamw takes parameters, and was given other tensors: make them nn.Parameter(tensor).")
    weights = nn.ParameterList(given)
    trained = [(name, p) for name, p in weights.named_parameters() if p.requires_grad]
    matrices = [name for name, p in trained if p.ndim == 2 and min(p.shape) > 1]
    if not matrices:
        raise ValueError(f"fira_adamw is given no matrix that is trained, but {len(weights)} others: use AdamW.")
    return build_optimizer(weights, FiraConfig(lr=lr, target_parameters=matrices, **settings), groups)


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def build_optimizer(model: nn.Module, config: FiraConfig, params: Iterable[Any]) -> FiraAdamW:
    """The optimizer for given groups (or one list) of trainable weights, each of them split into projected and not.

    Groups keep their own settings, such as weight decay. Projected groups come first, since schedulers and the Trainer
    report the learning rate of the first group. Parameters that are not the model's, such as those of a loss, are
    trained by AdamW.
    """
    groups = list(params)
    groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
    plan = find_targets(model, config)
    targets = {target.parameter: target for target in plan.projected}
    names = {p: name for name, p in model.named_parameters()}
    shared = {name: getattr(config, name) for name in SHARED_DEFAULTS}
    of_projected = {name: getattr(config, name) for name in PROJECTED_DEFAULTS if name not in OF_TARGET}
    itemsize = state_dtype_of(config.state_dtype).itemsize
    projected, dense = [], []
    for group in groups:
        split = defaultdict(list)
        if "lr" in group and config.dense_lr is not None:
            raise ValueError(f"dense_lr={config.dense_lr} and the lr={group['lr']} of a group exclude each other.")
        for entry in _listed(group["params"]):
            name, p = entry if isinstance(entry, tuple) else (f"parameter {len(names)}", entry)
            if p not in names:
                names[p] = name
                plan.skipped.append(Skipped(name, p, "not in the model", itemsize))
            target = targets.get(p)
            split[tuple(getattr(target, name) for name in OF_TARGET) if target else None].append((names[p], p))
        for key, params in split.items():
            if key is None:
                own_lr = {} if config.dense_lr is None else {"lr": config.dense_lr}
                dense.append({**group, "params": params, **shared, **own_lr})
            else:
                own = {**dict(zip(OF_TARGET, key, strict=True)), **of_projected}
                projected.append({**group, "params": params, **shared, **own})
    given = {p for group in projected + dense for _, p in group["params"]}
    plan.projected = [target for target in plan.projected if target.parameter in given]
    plan.skipped = [other for other in plan.skipped if other.parameter in given]
    optimizer = FiraAdamW(projected + dense, config.lr, config.betas, config.eps, config.weight_decay)
    optimizer.config = config
    optimizer.summary = summarize(model, plan, config)
    logger.info(optimizer.summary)
    if plan.state_bytes >= plan.adamw_bytes:
        logger.warning(
            f"Fira's optimizer state takes {plan.state_bytes:,} bytes here, and AdamW's would take "
            f"{plan.adamw_bytes:,}: lower the rank, or train by AdamW."
        )
    return optimizer


def summarize(model: nn.Module, plan: TargetPlan, config: FiraConfig) -> str:
    """What is projected at which rank, what is not and why, and the bytes of optimizer state beside AdamW's."""
    projected = [target.parameter for target in plan.projected]
    skipped = [other.parameter for other in plan.skipped]
    size = sum(p.numel() for p in projected)
    trainable = size + sum(p.numel() for p in skipped)
    matrices = sum(target.matrices for target in plan.projected)
    ranks: Counter[int] = Counter()
    for target in plan.projected:
        ranks[target.rank] += target.matrices
    within = "" if matrices == len(projected) else f"in {len(projected)} weights "
    by_rank = ", ".join(f"{count} at rank {rank}" for rank, count in sorted(ranks.items(), reverse=True))
    lines = [
        f"Fira projects {matrices} matrices {within}({by_rank}) with {size:,} of {trainable:,} trainable parameters "
        f"({size / trainable:.1%})."
    ]
    useless = sum(t.matrices for t in plan.projected if t.state_bytes >= adamw_state_bytes(t.parameter))
    if useless:
        lines.append(f"{useless} of them need at least as much state as with AdamW: lower the rank, or exclude them.")
    codes = sum(map(is_int8, projected + skipped))
    if codes:
        lines.append(f"{codes} of the trained weights are int8 with a scale for each row, and rounded at random.")
    rounded = [p for p in projected + skipped if p.dtype in (torch.bfloat16, torch.float16) and not is_int8(p)]
    if rounded and not config.stochastic_rounding:
        lines.append(
            f"{sum(p.numel() for p in rounded):,} of the trainable parameters are in half precision and rounded to "
            "the nearest, which loses updates that are small beside them: load the model in float32, or set "
            "stochastic_rounding=True (bf16)."
        )
    if skipped:
        count: Counter[str] = Counter()
        numel: Counter[str] = Counter()
        for other in plan.skipped:
            count[other.reason] += 1
            numel[other.reason] += other.parameter.numel()
        reasons = "; ".join(f"{reason}: {numel[reason]:,} in {count[reason]}" for reason in count)
        lines.append(f"Not projected, trained by AdamW ({reasons}).")
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if frozen:
        quantised = sum(parameter_count(p) for p in frozen if _is_4bit(p))
        among = f", {quantised:,} of them in 4 bits" if quantised else ""
        lines.append(f"Frozen: {sum(map(parameter_count, frozen)):,} parameters{among}.")
    state, adamw = plan.state_bytes, plan.adamw_bytes
    lines.append(f"Optimizer state: {state:,} bytes; AdamW's would be {adamw:,} ({state / adamw:.1%}).")
    return "\n".join(lines)


def _is_4bit(p: nn.Parameter) -> bool:
    """Whether bitsandbytes, which is not imported for that, has packed two parameters into each byte."""
    return type(p).__name__ == "Params4bit"


def parameter_count(p: nn.Parameter) -> int:
    """Parameters, as PEFT counts them."""
    return 2 * p.numel() * p.element_size() if _is_4bit(p) else p.numel()
