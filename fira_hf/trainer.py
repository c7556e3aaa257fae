"""`optim="fira"` and `"fira_layerwise"` in `transformers.TrainingArguments`: teaches the Trainer two more names."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames, ParallelMode

from . import int8
from .arguments import config_from_args
from .config import LAYERWISE, FiraConfig
from .factory import OF_LAYERS, build_optimizer
from .layerwise import StepInBackward, hooks_of, step_in_backward
from .optimizer import FiraAdamW
from .state import OF_SHAPES
from .wrappers import unwrapped

logger = logging.getLogger(__name__)

NAMES = ("fira", LAYERWISE)


def optimizer_name(value: str) -> OptimizerNames:
    """`OptimizerNames(value)` in a process that may not have imported fira_hf yet: what pickled arguments call."""
    return OptimizerNames(value)


def register() -> None:
    """Makes the names known to transformers. Importing fira_hf calls it; calling it again changes nothing."""
    if NAMES[0] in OptimizerNames._value2member_map_:
        return
    for name in NAMES:
        _add_name(name)

    original = Trainer.get_optimizer_cls_and_kwargs
    original_train = Trainer.train

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[type, dict[str, Any]]:
        if args.optim not in NAMES:
            return original(args, model)
        if model is None:
            name = OptimizerNames(args.optim).value
            raise ValueError(
                f"optim={name!r} needs the model to choose the weights that it projects: pass model=... (where a "
                "library asks without one, give the Trainer optimizers=(get_fira_optimizer(model, config), None))."
            )
        # Also where from_pretrained has sharded the weights.
        is_sharded = _is_sharded(args) or any(isinstance(p, DTensor) for p in model.parameters())
        config = config_from_args(args, model)
        if is_sharded and config.projection == "svd":
            raise ValueError(
                'projection="svd" needs whole gradients, and FSDP shards them: set projection=power in optim_args, '
                "where it also overrides preset=published."
            )
        replicas = args.parallel_mode is ParallelMode.DISTRIBUTED and not is_sharded
        return TrainerFira, {
            "lr": config.lr,
            "betas": config.betas,
            "eps": config.eps,
            "module": model,
            "config": config,
            "process_group": dist.group.WORLD if replicas else None,
            "layerwise": args.optim == LAYERWISE,
        }

    def save_int8_as_parts(trainer: Trainer) -> None:
        if trainer.args.optim in NAMES or isinstance(unwrapped(trainer.optimizer), FiraAdamW):
            int8.save_as_parts(trainer.model)  # type: ignore[arg-type]

    @functools.wraps(original_train)
    def train(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        # Not before the loop has a trial of hyperparameter_search its arguments, `optim` among them, and accelerator.
        loop, load = trainer._inner_training_loop, trainer._load_from_checkpoint

        @functools.wraps(load)
        def load_parts(*args: Any, **kwargs: Any) -> Any:
            save_int8_as_parts(trainer)
            return load(*args, **kwargs)

        @functools.wraps(loop)
        def layerwise_or_not(*args: Any, **kwargs: Any) -> Any:
            save_int8_as_parts(trainer)
            if trainer.args.optim in NAMES and trainer.optimizer is None:
                _is_sharded(trainer.args)  # DeepSpeed may make an optimizer of its own, and ask nobody
            with Layerwise(trainer) if trainer.args.optim == LAYERWISE else contextlib.nullcontext():
                return loop(*args, **kwargs)

        with _replaced(trainer, _inner_training_loop=layerwise_or_not, _load_from_checkpoint=load_parts):
            return original_train(trainer, *args, **kwargs)

    Trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)  # type: ignore
    Trainer.train = train  # type: ignore
    _tell_of_lost_states()


def _tell_of_lost_states() -> None:
    """Has the Trainer say when it resumes without the optimizer's state, which it does without a word."""
    original = Trainer._load_optimizer_and_scheduler

    @functools.wraps(original)
    def load(trainer: Trainer, checkpoint: str | None) -> None:
        optimizer = unwrapped(trainer.optimizer)
        if checkpoint is None or not isinstance(optimizer, FiraAdamW):
            return original(trainer, checkpoint)
        # Whether it loads, and from which files, differs between versions and kinds of sharding: so it is watched.
        loaded: list[FiraAdamW] = []
        watch = optimizer.register_load_state_dict_post_hook(loaded.append)  # type: ignore[arg-type]
        try:
            original(trainer, checkpoint)
        except (RuntimeError, CheckpointException) as error:
            is_sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
            if not is_sharded or isinstance(error, (torch.OutOfMemoryError, dist.DistError)):
                raise
            # torch.distributed loads into the state as it is here, and knows no settings.
            raise ValueError(_other_settings(checkpoint, optimizer.config)) from error
        finally:
            watch.remove()
        if not loaded and trainer.is_world_process_zero():
            logger.warning(
                "%s lacks what the Trainer needs to load the optimizer (optimizer.pt and scheduler.pt, or what FSDP "
                "saves instead): the weights go on, but the optimizer and the learning rate's schedule begin anew.",
                checkpoint,
            )

    Trainer._load_optimizer_and_scheduler = load  # type: ignore


def _other_settings(checkpoint: str, config: FiraConfig | None) -> str:
    """Why a sharded checkpoint does not fit, by the settings that `FiraCallback` may have left in it."""
    try:
        saved = FiraConfig.from_pretrained(checkpoint).to_dict()
    except (FileNotFoundError, ValueError):
        saved = {}
    own = (config or FiraConfig()).to_dict()
    decides = {*OF_SHAPES, *OF_LAYERS} & saved.keys()
    differ = [f"{name}={saved[name]!r} (here {own[name]!r})" for name in sorted(decides) if own[name] != saved[name]]
    return (
        f"The optimizer's state in {checkpoint} is of other weights, or of others of their shapes. It was saved with "
        f"{', '.join(differ) or 'another rank, other target modules or another optimizer'}: resume with the settings "
        "of the checkpoint, or start a new run from the weights."
    )


def _add_name(name: str) -> None:
    member = str.__new__(OptimizerNames, name)
    member._name_, member._value_ = name.upper(), name
    # An Enum pickles as its class and value, which a process that has not imported fira_hf could not read. This one
    # brings the import along, so that a saved training_args.bin opens by itself.
    member.__reduce_ex__ = lambda protocol: (optimizer_name, (name,))  # type: ignore
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[name] = member
    type.__setattr__(OptimizerNames, member._name_, member)


@contextlib.contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Sets attributes of one object. Afterwards it has those of before, or none and shows those of its class."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(owner)[name]
        vars(owner).update(before)


class TrainerFira(FiraAdamW):
    """What the Trainer calls with its own groups (decay, no decay) to get a `FiraAdamW`.

    The Trainer takes a class and arguments, and wants a subclass of `Optimizer`; the object is built in one place for
    all users, so this class makes none of its own.

    `lr`, `betas`, `eps` and `weight_decay`, where given, replace those of the config; a group's own go before both.
    """

    def __new__(  # type: ignore[misc]
        cls,
        params: Iterable[Any],
        module: nn.Module,
        config: FiraConfig,
        process_group: dist.ProcessGroup | None,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        layerwise: bool = False,
    ) -> FiraAdamW:
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        optimizer = build_optimizer(module, replace(config, **own), params)
        optimizer.process_group = process_group
        if layerwise:
            optimizer.register_step_pre_hook(_check_layerwise)
        return optimizer


def _check_layerwise(optimizer: Any, *_: Any) -> None:
    if hooks_of(optimizer) is None:
        raise RuntimeError(
            f"optim={LAYERWISE!r} steps weights inside backward only in Trainer.train, which this loop is not: call "
            'fira_hf.step_in_backward(optimizer) before it, or set optim="fira".'
        )


class Layerwise(TrainerCallback):
    """A context in which a Trainer steps the weights inside backward. Afterwards it and its model are as before.

    Raises, on entry or when training begins:
        ValueError: gradients are scaled (fp16), the Trainer would go on from half a step (auto_find_batch_size) or
            save one (enable_jit_checkpoint), or the optimizer that was passed to the Trainer is another one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._accelerator = trainer, trainer.accelerator
        self._hooks: StepInBackward | None = None
        self._group = dist.group.WORLD if trainer.args.parallel_mode is ParallelMode.DISTRIBUTED else None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        args, accelerator = self._trainer.args, self._accelerator
        if args.fp16 or accelerator.scaler is not None:
            raise ValueError(
                f"optim={LAYERWISE!r} cannot train with fp16=True: inside backward the gradients are scaled, and "
                'whether they overflow is not known yet. Set bf16=True instead, or optim="fira".'
            )
        if args.auto_find_batch_size:
            raise ValueError(
                f"optim={LAYERWISE!r} cannot train with auto_find_batch_size=True: when memory runs out inside "
                "backward, some weights have been stepped, and the next attempt would go on from there. Set a "
                'per_device_train_batch_size that fits, or optim="fira".'
            )
        if getattr(args, "enable_jit_checkpoint", False):  # since transformers 5
            raise ValueError(
                f"optim={LAYERWISE!r} cannot train with enable_jit_checkpoint=True, which may save between backward "
                'and optimizer.step(), when the weights are a step ahead. Set save_steps instead, or optim="fira".'
            )
        if args.max_grad_norm and self._trainer.is_world_process_zero():
            logger.warning(
                "max_grad_norm=%s has no effect with optim=%r: the norm of all gradients is known only when the "
                "weights have been stepped. Set max_grad_norm=0 to say so.",
                args.max_grad_norm,
                LAYERWISE,
            )
        if args.torch_compile and self._trainer.is_world_process_zero():
            logger.warning(
                "optim=%r saves no gradients with torch_compile=True: a compiled backward makes those of all weights "
                "before any is stepped. Leave one of the two out.",
                LAYERWISE,
            )
        replacements: dict[str, Any] = {"clip_grad_norm_": self._grad_norm}
        if self._group is not None:
            # Not wrapped in DDP, whose buckets would hold all gradients; the hooks average them one by one.
            replacements["prepare_model"] = functools.partial(accelerator.prepare_model, evaluation_mode=True)
        self._undo.enter_context(_replaced(accelerator, **replacements))
        self._trainer.add_callback(self)
        self._undo.callback(self._trainer.remove_callback, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrapped(kwargs["optimizer"])
        if not isinstance(optimizer, FiraAdamW):
            raise ValueError(
                f"optim={LAYERWISE!r} steps FiraAdamW, but the Trainer was given {type(optimizer).__name__}: set "
                "another optim, or pass no optimizer."
            )
        self._hooks = step_in_backward(optimizer, lambda: self._accelerator.sync_gradients, self._group)
        self._undo.callback(self._hooks.remove)

    def _grad_norm(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """In place of accelerate's clipping, from which the Trainer takes the norm that it logs."""
        assert self._hooks is not None
        return self._hooks.grad_norm(parameters)

    def __exit__(self, *_: Any) -> None:
        self._undo.close()
        if self._group is not None:
            # accelerate has taken note that this model needs no wrapping, which holds for this training only
            self._trainer.model._is_accelerate_prepared = False  # type: ignore


def _is_sharded(args: TrainingArguments) -> bool:
    """Whether the weights are going to be sharded, by FSDP2.

    Raises:
        ValueError: something else shards them, or they are to be stepped inside backward.
    """
    name = OptimizerNames(args.optim).value
    engine = _sharding_engine(args)
    if engine is None:
        return False
    if engine != "FSDP2":
        raise ValueError(
            f"optim={name!r} does not run under {engine}, which flattens the weights that it projects: use FSDP2 "
            '(fsdp=True with fsdp_config={"version": 2}, or accelerate\'s fsdp_version: 2) or DDP.'
        )
    if args.optim == LAYERWISE:
        raise ValueError(
            f"optim={name!r} does not run under FSDP, which gives weights their gradients without calling the hooks "
            'that would step them: set optim="fira".'
        )
    return True


def _sharding_engine(args: TrainingArguments) -> str | None:
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    if not args.fsdp and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if isinstance(args.fsdp_config, dict) and args.fsdp_config.get("xla"):
        return "XLA's FSDP"
    # By the arguments or, always so in older versions of transformers, by `accelerate launch`.
    plugin = getattr(args, "fsdp_plugin_args", None) or {}
    return f"FSDP{int(plugin.get('fsdp_version', os.environ.get('FSDP_VERSION', '1')))}"
