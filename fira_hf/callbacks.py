"""What the optimizer is doing: `FiraCallback` puts it into the Trainer's log, `AnalysisCallback` into files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .analysis import check_matrix, measure, sample_rows
from .config import LAYERWISE, FiraConfig, plain_name
from .distributed import local
from .optimizer import FiraAdamW
from .targets import Target, find_targets
from .wrappers import unwrapped

# What is known of a step for each matrix; see `analysis.Measurement`.
OF_MATRIX = ("phi", "captured_energy", "residual_norm", "limiter")
# Rows of which a matrix's scaling factors are kept, as in the paper.
SAMPLED = 100
HEADER, ROWS = "analysis.json", "analysis.npy"


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
        optimizer = unwrapped(kwargs["optimizer"])
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
        # A hyper-parameter search saves in a folder for each trial, of which a callback is not told.
        if state.is_hyper_param_search:
            return
        if state.is_world_process_zero and config is not None and checkpoint.is_dir():
            config.save_pretrained(checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._optimizer is not None:
            self._optimizer.track_statistics = False
            self._optimizer = None


class AnalysisCallback(TrainerCallback):
    """Measures every `steps` optimizer steps what `analysis.measure` says of each linear layer but the output head,
    and writes it to `analysis.json` and `analysis.npy` in `output_dir`, which `read_record` reads.

    For `optim="fira"` and torch's AdamW, on one device or under DDP. A training that resumes goes on with the record
    that lies there as of the step of its checkpoint, so the record is the same whether it was interrupted or not.

    Raises, when training begins:
        ValueError: the gradients are gone after the step (`fira_layerwise`) or scaled (fp16), the optimizer keeps no
            moments of Adam that could be read, a weight is sharded, stacked or fused, or training ends before the
            first record or resumes without the earlier ones, which may be damaged.
    """

    def __init__(self, steps: int = 20) -> None:
        if steps < 1:
            raise ValueError(f"AnalysisCallback: steps is {steps}; it must be at least 1.")
        self._steps = steps
        self._rows: np.ndarray | None = None
        self._targets: list[tuple[Target, torch.Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        groups = self._groups(args, state, kwargs["optimizer"])
        self._targets = []
        header: dict[str, Any] = {"steps": self._steps, "matrices": []}
        for target in find_targets(kwargs["model"], FiraConfig()).projected:
            p = target.parameter
            if p not in groups or (p.ndim != 2 and "rank" not in groups[p]):
                continue
            check_matrix(p, groups[p])
            name = plain_name(target.name)
            rows = sample_rows(name, max(p.shape), SAMPLED)
            self._targets.append((target, rows.to(p.device)))
            rank = min(groups[p]["rank"], *p.shape) if "rank" in groups[p] else None
            # Enough to tell whether two runs began with the same weights.
            first = p.detach().flatten()[:4].tolist()
            described = {"name": name, "shape": list(p.shape), "rank": rank, "rows": rows.tolist()}
            header["matrices"].append(described | {"initial": first})
        if state.is_world_process_zero:
            self._open(Path(str(args.output_dir)), header, state)

    def _groups(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> dict[Any, dict[str, Any]]:
        """Weight -> its parameter group."""
        optimizer = unwrapped(optimizer)
        if not isinstance(optimizer, (FiraAdamW, torch.optim.AdamW)):
            raise ValueError(
                f"AnalysisCallback reads Adam's moments, but the Trainer trains with {type(optimizer).__name__}: set "
                'optim="fira" or "adamw_torch", or leave the callback out.'
            )
        if args.optim == LAYERWISE:
            raise ValueError(
                "AnalysisCallback needs the gradients after the step, which optim='fira_layerwise' frees in backward: "
                'set optim="fira".'
            )
        if args.fp16:
            raise ValueError("AnalysisCallback cannot read the scaled gradients of fp16=True: set bf16=True instead.")
        if state.max_steps < self._steps:
            raise ValueError(
                f"AnalysisCallback records every {self._steps} steps, but training ends after {state.max_steps}: let "
                "it record more often, or leave it out."
            )
        return {p: group for group in optimizer.param_groups for p in group["params"]}

    def _open(self, folder: Path, header: dict[str, Any], state: TrainerState) -> None:
        """Lay out the file for all steps of the training, with the rows of those that it has made already."""
        matrices = header["matrices"]
        fields = [("step", "i8"), *((name, "f4", (len(matrices),)) for name in OF_MATRIX)]
        sampled = sum(len(matrix["rows"]) for matrix in matrices)
        rows = np.zeros(state.max_steps // self._steps, np.dtype([*fields, ("rows", "f4", (sampled,))]))
        made = state.global_step // self._steps
        if state.global_step:
            earlier = _read_header(folder)
            header["matrices"] = [
                matrix | {"initial": was["initial"]}
                for matrix, was in zip(matrices, earlier.get("matrices", []), strict=False)
            ]
            old = np.array(_read_rows(folder)[:made]) if earlier == header else rows[:0]
            if old["step"].tolist() != [self._steps * (index + 1) for index in range(made)]:
                raise ValueError(
                    f"Training continues at step {state.global_step}, but {folder} does not hold what "
                    f"AnalysisCallback records every {self._steps} steps of the same weights up to there: begin anew, "
                    "or leave it out."
                )
            rows[:made] = old
        folder.mkdir(parents=True, exist_ok=True)
        # Each is replaced as a whole: a process that is killed here leaves the old one.
        with (folder / f"{ROWS}.tmp").open("wb") as file:
            np.save(file, rows)
        (folder / f"{ROWS}.tmp").replace(folder / ROWS)
        (folder / f"{HEADER}.tmp").write_text(json.dumps(header) + "\n", encoding="utf-8")
        (folder / f"{HEADER}.tmp").replace(folder / HEADER)
        # What is written into the map survives the process, and a step that is made again is written in its place.
        self._rows = np.load(folder / ROWS, mmap_mode="r+")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1  # the Trainer counts this step after its callbacks
        if step % self._steps or self._rows is None:
            return
        optimizer = unwrapped(kwargs["optimizer"])
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        values, sampled = [], []
        for target, rows in self._targets:
            p = target.parameter
            found = measure(p, optimizer.state.get(p, {}), groups[p], target.transposed)
            values.append(torch.stack(found[1:]))
            sampled.append(found.rows[rows])
        row = self._rows[step // self._steps - 1]
        for name, of_matrices in zip(OF_MATRIX, torch.stack(values, dim=1).cpu(), strict=True):
            row[name] = of_matrices
        row["rows"] = torch.cat(sampled).cpu()
        row["step"] = step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if isinstance(self._rows, np.memmap):
            self._rows.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_save(args, state, control)
        self._rows, self._targets = None, []


@dataclass(eq=False)  # arrays have no one truth value
class Record:
    """What `AnalysisCallback` recorded of T steps of M matrices.

    matrices: for each its name, shape, rank (None: full), the sampled rows of its long side, and the first of its
    initial weights. steps: (T,). phi, captured_energy, residual_norm, limiter: (T, M), as in `analysis.Measurement`.
    rows: (T, K), phi of the sampled rows of all matrices, one after another; `slices` tells whose are which.
    """

    matrices: list[dict[str, Any]]
    steps: np.ndarray
    phi: np.ndarray
    captured_energy: np.ndarray
    residual_norm: np.ndarray
    limiter: np.ndarray
    rows: np.ndarray

    @property
    def slices(self) -> list[slice]:
        ends = np.cumsum([len(matrix["rows"]) for matrix in self.matrices]).tolist()
        return [slice(end - len(matrix["rows"]), end) for matrix, end in zip(self.matrices, ends, strict=True)]


def read_record(folder: str | Path) -> Record:
    """The record in the `output_dir` of a training.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    folder = Path(folder)
    header = _read_header(folder)
    if not header:
        raise FileNotFoundError(f"{folder} holds no {HEADER}: train with AnalysisCallback.")
    rows = _read_rows(folder)
    rows = rows[: np.count_nonzero(rows["step"])]
    values = {name: rows[name] for name in (*OF_MATRIX, "rows")}
    return Record(header["matrices"], rows["step"], **values)


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise _damaged(path) from error


def _read_rows(folder: Path) -> np.ndarray:
    try:
        return np.load(folder / ROWS, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise _damaged(folder / ROWS) from error


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged, and with it the record of AnalysisCallback: train anew, or leave it out.")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the tensors in the state of any torch optimizer take in this process."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)
