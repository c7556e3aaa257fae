"""The methods of this recipe, and its own arguments beside those of the Trainer. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.commonsense.tasks import TASKS
from recipes.settings import BEFORE, Method, Recipe, RestartArguments, one_of

ADAMW = ("adamw_torch", "adamw_torch_fused")
METHODS = {
    "lora": Method(lora=True, optimizers=ADAMW),
    "dora": Method(lora=True, optimizers=ADAMW),
    "relora": Method(lora=True, optimizers=ADAMW),
    "lora-equal-bytes": Method(lora=True, optimizers=ADAMW),
    "fira-on-lora": Method(lora=True, optimizers=("fira",)),
    "qlora": Method(lora=True, optimizers=ADAMW, four_bits=True),
    "fira-on-qlora": Method(lora=True, optimizers=("fira",), four_bits=True),
    "galore-on-lora": Method(lora=True, optimizers=("galore_adamw",)),
    "flora-on-lora": Method(lora=True, optimizers=("fira",)),
    "fira-full": Method(lora=False, optimizers=("fira",)),
    "fira-int8-full": Method(lora=False, optimizers=("fira",)),
    "fira-published-full": Method(lora=False, optimizers=("fira",)),
    "subspace-muon-full": Method(lora=False, optimizers=("fira",)),
    "muon-full": Method(lora=False, optimizers=("fira",)),
    "galore-full": Method(lora=False, optimizers=("galore_adamw",)),
    "flora-full": Method(lora=False, optimizers=("fira",)),
    "adamw-full": Method(lora=False, optimizers=ADAMW),
}
RECIPE = Recipe(
    package="recipes.commonsense",
    methods=METHODS,
    paths=frozenset({"output_dir", "data_dir", "train_file", "model", "model_config"}),
    before=frozenset(
        {"model", "dtype", "fp16", "bf16", "use_cpu", "data_dir", "train_file", "tasks", "max_train_per_task"}
        | {"max_test_per_task", "val_set_size", "answer_format", "cutoff_len", "scoring", "scoring_batch_size"}
        | {"per_device_eval_batch_size"}
    ),
    derived={"optim_target_modules": "it follows from the method; name the layers with target_modules"},
)


@dataclass
class RecipeArguments(RestartArguments):
    """The recipe's settings beside `transformers.TrainingArguments`."""

    method: str = field(metadata={"help": "One of " + ", ".join(METHODS) + "."})
    model: str = field(
        default="smollm2-135m-instruct",
        metadata={"help": "The embedded model, or the path or hub name of any causal language model."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights (of those in 4 bits: of their products): float32, bfloat16 or float16."},
    )
    data_dir: str = field(
        default="recipes/commonsense/data", metadata={"help": "Folder with <task>/train.json and <task>/test.json."}
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "One file with the training examples of all tasks, instead of <task>/train.json."},
    )
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Which tasks, by folder name."})
    max_train_per_task: int | None = field(
        default=None, metadata={"help": "At most so many training examples a task."}
    )
    max_test_per_task: int | None = field(
        default=None, metadata={"help": "At most so many questions a task; 0: none."}
    )
    val_set_size: int = field(default=120, metadata={"help": "Training examples set aside for the validation loss."})
    answer_format: str = field(
        default="label",
        metadata={"help": "label (as published: 'the correct answer is answer2') or text (the option's own text)."},
    )
    train_on_inputs: bool | None = field(
        default=None,
        metadata={"help": "Learn the prompt as well as the answer (the default of label); false: the answer only."},
    )
    cutoff_len: int = field(default=256, metadata={"help": "Training examples are cut to so many tokens."})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        metadata={"help": "Linear layers that LoRA wraps, or whose gradients Fira and GaLore project."},
    )
    lora_rank: int = field(default=32, metadata={"help": "Rank of LoRA's A and B."})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA's scale is lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before LoRA's A."})
    scoring: str = field(default="loglik", metadata={"help": "loglik (fast) or generate (as published)."})
    scoring_batch_size: int = field(default=16, metadata={"help": "Questions scored at once."})
    keep_model: bool = field(
        default=True, metadata={"help": "Save the trained model (or adapter) in output_dir/model."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check data, targets and memory, and train nothing."})
    model_config: str | None = field(
        default=None, metadata={"help": "config.json for a dry run where the model itself is not at hand."}
    )

    def __post_init__(self) -> None:
        one_of("method", self.method, (*METHODS, BEFORE))
        one_of("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        self.check_restarts(self.method)
        one_of("scoring", self.scoring, ("loglik", "generate"))
        one_of("answer_format", self.answer_format, ("label", "text"))
        if self.answer_format == "text":
            self._check_text()
        if self.train_on_inputs is None:
            self.train_on_inputs = self.answer_format == "label"
        for task in self.tasks:
            one_of("tasks", task, TASKS)
        for name in ("cutoff_len", "lora_rank", "lora_alpha", "scoring_batch_size", "max_train_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        for name in ("val_set_size", "max_test_per_task"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative.")
        if self.train_file is not None and self.max_train_per_task is not None:
            raise ValueError("max_train_per_task needs <task>/train.json; a train_file does not name its tasks.")

    def _check_text(self) -> None:
        if self.train_on_inputs:
            raise ValueError("train_on_inputs is true, but answer_format text learns the answer alone; leave it out.")
        if self.scoring == "generate":
            raise ValueError("scoring is 'generate', but answer_format text is scored by likelihood; leave it out.")
        if self.train_file is not None:
            raise ValueError("answer_format text needs <task>/train.json; a train_file does not name its tasks.")
