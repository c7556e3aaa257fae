"""Train one method on the commonsense tasks, score it, and write result.json.

    python -m recipes.commonsense.train recipes/commonsense/experiments/smoke/lora.yaml [--key value ...]

Keys are those of `RecipeArguments` (settings.py) and of `transformers.TrainingArguments`. The same command continues a
run that was interrupted. --dry_run checks data, targets and memory instead.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
import time
import traceback
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
import transformers
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, Trainer, TrainingArguments, set_seed

import fira_hf  # registers optim="fira"
from recipes import files, measure
from recipes.commonsense import data, processes, rundir
from recipes.commonsense.dry_run import dry_run
from recipes.commonsense.model import load_model, load_tokenizer, wrap
from recipes.commonsense.scoring import score
from recipes.commonsense.settings import METHODS, RecipeArguments, load_settings, read_overrides, to_argv

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks transformers by the old name

# Says where the run was, not what it computed.
_UNRECORDED = {"output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token", "local_rank", "_n_gpu"}


def parse(settings: dict[str, Any]) -> tuple[RecipeArguments, TrainingArguments]:
    """Settings -> typed arguments. Raises ValueError for an unknown key or a value of the wrong kind."""
    known = [field.name for kind in (RecipeArguments, TrainingArguments) for field in fields(kind) if field.init]
    for key in settings:
        if key not in known:
            near = ", ".join(difflib.get_close_matches(key, known)) or "see settings.py and TrainingArguments"
            raise ValueError(f"There is no setting {key!r}; near it: {near}.")
    if processes.count() > 1 and not torch.accelerator.is_available():
        # Unless it is said, accelerate overlooks the other processes, and each would train by itself.
        settings = {"use_cpu": True} | settings
    parser = HfArgumentParser((RecipeArguments, TrainingArguments), allow_abbrev=False, exit_on_error=False)
    try:
        arguments, training = parser.parse_args_into_dataclasses(to_argv(settings), look_for_args_file=False)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}.") from None
    if training.optim in ("fira", "galore_adamw"):
        is_lora = METHODS[arguments.method].lora
        training.optim_target_modules = ["lora_A", "lora_B"] if is_lora else arguments.target_modules
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
    _share_batch(training)
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


def _share_batch(training: TrainingArguments) -> None:
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


def run(arguments: RecipeArguments, training: TrainingArguments) -> dict[str, Any]:
    """Train and score; returns what the run found out."""
    questions = data.load_questions(arguments)
    train_records, validation_records = data.load_training(arguments)
    with training.main_process_first():  # the embedded model is converted once
        tokenizer = load_tokenizer(arguments.model)
    encoded = data.encode_all(train_records, tokenizer, arguments.cutoff_len, arguments.train_on_inputs)
    # The validation loss is that of the response, however the training labels are chosen: methods and learning rates
    # are compared by it.
    validation = None
    if validation_records:
        validation = data.encode_all(validation_records, tokenizer, arguments.cutoff_len, train_on_inputs=False)

    set_seed(training.seed)
    model = wrap(load_model(arguments.model, arguments.dtype), arguments)
    callbacks = [measure.StepTime()] + ([fira_hf.FiraCallback()] if training.optim == "fira" else [])
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=encoded,
        eval_dataset=validation,
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=_checkpoint(Path(training.output_dir)))
    memory = measure.peak_memory()
    figures = {"peak_memory": memory, "eval_loss": _validate(trainer) if validation else None} | _figures(trainer)
    start = time.perf_counter()
    accuracy = score(trainer.model, tokenizer, questions, arguments)
    if arguments.keep_model:
        if trainer.is_fsdp_enabled:  # the checkpoints are sharded, as which a model is not saved
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(Path(training.output_dir, "model")))
    return figures | {
        "scoring_seconds": time.perf_counter() - start,
        "accuracy": accuracy,
        "average": sum(task["accuracy"] for task in accuracy.values()) / len(accuracy) if accuracy else None,
    }


def _validate(trainer: Trainer) -> float:
    """The validation loss after the last step, which an evaluation in training may have found already."""
    last = trainer.state.log_history[-2:]  # the very last entry sums up the training
    known = [
        entry["eval_loss"] for entry in last if "eval_loss" in entry and entry["step"] == trainer.state.global_step
    ]
    return known[0] if known else trainer.evaluate()["eval_loss"]


def _figures(trainer: Trainer) -> dict[str, Any]:
    """Costs and losses of a training that has ended."""
    state = trainer.state
    lengths = list(map(len, trainer.train_dataset["input_ids"]))
    tokens = state.epoch * sum(lengths)
    # A resume replaces the callback, so it is looked up.
    seconds = next(c.seconds for c in trainer.callback_handler.callbacks if isinstance(c, measure.StepTime))
    return {
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "optimizer_state_bytes": measure.state_bytes(trainer.optimizer),
        "steps": state.global_step,
        "training_examples": len(lengths),
        "training_tokens": round(tokens),
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "train_loss": next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None),
        "history": [_history(entry) for entry in state.log_history],
    }


def _checkpoint(folder: Path) -> str | None:
    checkpoint = rundir.last_checkpoint(folder)
    if checkpoint is None:
        return None
    print(f"Continuing from {checkpoint}")
    return str(checkpoint)


def _history(entry: dict[str, Any]) -> dict[str, Any]:
    kept = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    return {key: value for key, value in entry.items() if key in kept or key.startswith("fira_")}


def _leave_progress_to_the_main_process() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end of the process
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if not processes.is_main():
        _leave_progress_to_the_main_process()
    try:
        experiment = Path(words[0])
        settings = load_settings(experiment, read_overrides(words[1:]))
        settings.setdefault("output_dir", str(Path("runs", experiment.parent.name, experiment.stem)))
        if settings.pop("dry_run", False):
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
            print(f"error: {error}", file=sys.stderr)
        return 2

    with training.main_process_first(local=False):
        if processes.is_main():
            files.write_json(folder / rundir.SETTINGS, settings)
            (folder / rundir.TRACEBACK).unlink(missing_ok=True)  # that of an earlier attempt
    recorded = {key: value for key, value in settings.items() if key != "output_dir"}
    provenance = measure.provenance(training.seed, ["python", "-m", "recipes.commonsense.train", *words])
    try:
        found = run(arguments, training)
    except Exception as error:  # whatever it is, it belongs into the record
        if rundir.is_first_failure(folder, traceback.format_exc()):
            rundir.write_failure(
                folder, recorded, f"{type(error).__name__}: {error}", provenance=provenance, seed=training.seed
            )
            print(f"error: {error}\nThe traceback is in {folder / rundir.TRACEBACK}", file=sys.stderr)
        return 1
    if not processes.is_main():
        return 0
    full = {key: value for key, value in training.to_dict().items() if key not in _UNRECORDED}
    result = {
        "status": "ok",
        "method": arguments.method,
        "seed": training.seed,
        **found,
        "settings": recorded,
        "provenance": provenance,
        "all_settings": asdict(arguments) | full,
    }
    files.write_json(folder / rundir.RESULT, result)
    rundir.remove_checkpoints(folder)
    return 0


if __name__ == "__main__":
    status = main()
    if status == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)
