"""`FiraCallback`: what the optimizer is doing, in the Trainer's log and beside its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .distributed import local
from .optimizer import FiraAdamW


class FiraCallback(TrainerCallback):
    """Prints what is projected when training begins, saves `fira_config.json` in each checkpoint, and adds to each
    training log, as means over the projected weights and the steps since the last log:

        fira_limiter_active    share of the residuals that the norm-growth limiter scaled down
        fira_captured_energy   share of the gradient's energy that lies in the subspace
        fira_residual_share    the residual's part of the squared update
        fira_state_bytes       bytes of optimizer state (now, not a mean; of a sharded state the part of this process)

    The sums stay on the device; they are read only when the Trainer logs.

    Callbacks see the values from this one on. The Trainer calls those of `report_to` first: to send the values there,
    put this one in front, `trainer.callback_handler.callbacks.insert(0, FiraCallback())`.
    """

    def __init__(self) -> None:
        self._optimizer: FiraAdamW | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not isinstance(optimizer, FiraAdamW):
            raise ValueError(
                f"FiraCallback needs FiraAdamW, but the Trainer trains with {type(optimizer).__name__}: set "
                'optim="fira", or leave the callback out.'
            )
        self._optimizer = optimizer
        optimizer.track_statistics = True
        if state.is_world_process_zero and optimizer.summary is not None:
            tqdm.write(optimizer.summary)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Evaluation and the end of training log, too; the values belong to the training log.
        if self._optimizer is None or logs is None or "loss" not in logs:
            return
        statistics = self._optimizer.pop_statistics()
        values: dict[str, Any] = {f"fira_{name}": value for name, value in statistics.items()}
        values["fira_state_bytes"] = state_bytes(self._optimizer)
        logs.update(values)
        state.log_history[-1].update(values)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        config = self._optimizer.config if self._optimizer is not None else None
        # A hyper-parameter search saves elsewhere, in a folder for each trial.
        if state.is_world_process_zero and config is not None and checkpoint.is_dir():
            config.save_pretrained(checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._optimizer is not None:
            self._optimizer.track_statistics = False
            self._optimizer = None


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the tensors in the state of any torch optimizer take in this process."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)
