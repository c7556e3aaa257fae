"""What the training scripts share: from settings to arguments, what is found out about a run, and its record."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import torch.distributed as dist
import transformers
from transformers import HfArgumentParser, Trainer, TrainingArguments

from recipes import checkpoints, errors, files, measure, processes, rundir
from recipes.settings import Recipe, load_settings, read_overrides, to_argv

Arguments = TypeVar("Arguments")
# Says where the run was, not what it computed.
_UNRECORDED = {"output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token", "local_rank", "_n_gpu"}
_UNRECORDED |= {"resume_from_checkpoint"}


def parse(settings: dict[str, Any], kind: type[Arguments]) -> tuple[Arguments, TrainingArguments]:
    """Settings -> typed arguments. Raises ValueError for an unknown key or a value of the wrong kind."""
    known = [field.name for one in (kind, TrainingArguments) for field in fields(one) if field.init]
    for key in settings:
        if key not in known:
            near = ", ".join(difflib.get_close_matches(key, known)) or "see settings.py and TrainingArguments"
            raise ValueError(f"There is no setting {key!r}; near it: {near}.")
    if processes.count() > 1 and not torch.accelerator.is_available():
        # Unless it is said, accelerate overlooks the other processes, and each would train by itself.
        settings = {"use_cpu": True} | settings
    parser = HfArgumentParser((kind, TrainingArguments), allow_abbrev=False, exit_on_error=False)
    try:
        arguments, training = parser.parse_args_into_dataclasses(to_argv(settings), look_for_args_file=False)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}.") from None
    training.label_names = ["labels"]  # a PEFT model hides the argument names from which the Trainer would find it
    training.dataloader_pin_memory = torch.cuda.is_available()
    training.restore_callback_states_from_checkpoint = True  # for StepTime
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False  # all take part in each step; DDP warns that it found none
    if training.world_size != processes.count():
        raise ValueError(
            f"{processes.count()} processes were started, but each would train by itself on {training.device.type}: "
            "set use_cpu to true, or start one."
        )
    _check_precision(training)
    share_batch(training)
    return arguments, training


def _check_precision(training: TrainingArguments) -> None:
    """Raises ValueError where accelerate's configuration would change the number format of the experiment."""
    chosen = "fp16" if training.fp16 else "bf16" if training.bf16 else "no"
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if configured not in ("no", chosen):
        raise ValueError(
            f"mixed_precision is {configured!r} in accelerate's configuration, but {chosen!r} in the experiment: set "
            'it to "no" there, and fp16 or bf16 in the experiment.'
        )


def share_batch(training: TrainingArguments) -> None:
    """Divide the experiment's batch among the processes: each takes fewer micro-batches, then smaller ones.

    Raises ValueError if it cannot be divided.
    """
    size, count = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if size * count % training.world_size:
        raise ValueError(
            f"per_device_train_batch_size {size} x gradient_accumulation_steps {count} is the batch of all processes "
            f"together, and cannot be divided among {training.world_size}: start fewer, or change one of the two."
        )
    fewer = math.gcd(count, training.world_size)
    training.gradient_accumulation_steps = count // fewer
    training.per_device_train_batch_size = size * fewer // training.world_size


class RecipeTrainer(Trainer):
    """Makes no step more where it resumes after the last one, as the Trainer does unless an epoch ends there. Gives
    betas and epsilon to GaLore and to the embeddings of APOLLO, too, which the Trainer leaves at their own defaults.
    """

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.optim in ("galore_adamw", "apollo_adamw"):
            for group in optimizer.param_groups:
                group.update(betas=(self.args.adam_beta1, self.args.adam_beta2), eps=self.args.adam_epsilon)
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)


def validate(trainer: Trainer) -> float:
    """The validation loss after the last step, which an evaluation in training may have found already."""
    last = trainer.state.log_history[-2:]  # the very last entry sums up the training
    known = [
        entry["eval_loss"] for entry in last if "eval_loss" in entry and entry["step"] == trainer.state.global_step
    ]
    return known[0] if known else trainer.evaluate()["eval_loss"]


def figures(trainer: Trainer, tokens: float) -> dict[str, Any]:
    """Costs and losses of a training that has ended; `tokens`: on how many it was, without padding."""
    state = trainer.state
    # A resume replaces the callback, so it is looked up.
    seconds = next(c.seconds for c in trainer.callback_handler.callbacks if isinstance(c, measure.StepTime))
    return {
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "optimizer_state_bytes": measure.state_bytes(trainer.optimizer),
        "steps": state.global_step,
        "training_tokens": round(tokens),
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "train_loss": next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None),
        "history": [_history(entry) for entry in state.log_history],
    }


def choose_checkpoint(training: TrainingArguments) -> dict[str, str]:
    """Set `resume_from_checkpoint` to the newest one that can be resumed from, None if there is none yet; what is
    wrong with those that are newer.

    Raises ValueError if none is left of those that were saved.
    """
    folder = Path(training.output_dir)
    # The main process looks for all: to look takes a while, and all have to go on from the same.
    found = [checkpoints.newest(folder, training.fp16) if processes.is_main() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    newest, passed_over = found[0]
    for name, reason in passed_over.items():
        print(f"Passed over {folder / name}: {reason}")
    if newest is not None:
        print(f"Continuing from {newest}")
    elif any(reason != checkpoints.UNFINISHED for reason in passed_over.values()):
        flaws = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        raise ValueError(f"No checkpoint in {folder} can be resumed from ({flaws}). Delete {folder} to begin anew.")
    training.resume_from_checkpoint = None if newest is None else str(newest)
    return passed_over


def _history(entry: dict[str, Any]) -> dict[str, Any]:
    kept = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "num_input_tokens_seen")
    return {key: value for key, value in entry.items() if key in kept or key.startswith("fira_")}


def save_model(trainer: Trainer) -> None:
    """The trained model, into the folder "model" of the run."""
    if trainer.is_fsdp_enabled:  # the checkpoints are sharded, as which a model is not saved
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(Path(trainer.args.output_dir, "model")))


def _leave_progress_to_the_main_process() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end of the process
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def main(
    recipe: Recipe,
    description: str | None,
    words: list[str] | None,
    parse: Callable[[dict[str, Any]], tuple[Any, TrainingArguments]],
    run: Callable[[Any, TrainingArguments], dict[str, Any]],
    dry_run: Callable[[Any, TrainingArguments], None] | None = None,
    program: str = "train",
) -> int:
    """One run of a recipe: `run` trains and returns what it found, which is written with settings and provenance.

    program: the module that was started, see `load_settings`.
    """
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(description)
        return 0
    if not processes.is_main():
        _leave_progress_to_the_main_process()
    try:
        experiment = Path(words[0])
        settings = load_settings(recipe, experiment, read_overrides(words[1:]), program)
        name = experiment.stem if program == "train" else program
        settings.setdefault("output_dir", str(Path("runs", experiment.parent.name, name)))
        if dry_run is not None and settings.pop("dry_run", False):
            # Nothing is computed, so neither the device nor its number formats have to be at hand.
            arguments, training = parse(settings | {"use_cpu": True, "fp16": False, "bf16": False})
            dry_run(arguments, training)
            return 0
        arguments, training = parse(settings)
        folder = Path(training.output_dir)
        if rundir.is_finished(folder, settings):
            print(f"{folder} is complete; delete it to run it again.")
            return 0
    except (ValueError, OSError) as error:
        if processes.is_first_of_node():
            errors.refuse(error)
        return 2

    with training.main_process_first(local=False):
        if processes.is_main():
            files.write_json(folder / rundir.SETTINGS, settings)
            (folder / rundir.TRACEBACK).unlink(missing_ok=True)  # that of an earlier attempt
    recorded = {key: value for key, value in settings.items() if key != "output_dir"}
    command = ["python", "-m", f"{recipe.package}.{program}", *words]
    provenance = measure.provenance(training.seed, command, training.device)
    passed_over: dict[str, str] = {}
    try:
        passed_over = choose_checkpoint(training)
        found = run(arguments, training)
    except Exception as error:  # whatever it is, it belongs into the record
        if rundir.is_first_failure(folder, traceback.format_exc()):
            rundir.write_failure(
                folder,
                recorded,
                errors.named(error),
                provenance=provenance,
                seed=training.seed,
                passed_over_checkpoints=passed_over,
            )
            print(f"error: {errors.text(error)}\nThe traceback is in {folder / rundir.TRACEBACK}", file=sys.stderr)
        return 1
    if not processes.is_main():
        return 0
    full = {key: value for key, value in training.to_dict().items() if key not in _UNRECORDED}
    result = {
        "status": "ok",
        "method": arguments.method,
        "seed": training.seed,
        **found,
        "passed_over_checkpoints": passed_over,
        "settings": recorded,
        "provenance": provenance,
        "all_settings": asdict(arguments) | full,
    }
    files.write_json(folder / rundir.RESULT, result)
    rundir.remove_checkpoints(folder)
    return 0


def leave(status: int) -> None:
    """End this process, and its part in the group of processes: after a failure the others may wait no longer."""
    if status == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)
