"""The methods of this recipe, and its own arguments beside those of the Trainer. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.settings import Method, Recipe, RestartArguments, one_of

# Where data_dir does not name a folder.
EMBEDDED = "embedded"
C4 = "c4"

RANKS = (4, 16, 64, 128, 512)
ADAMW = ("adamw_torch", "adamw_torch_fused")
FIRA = Method(lora=False, optimizers=("fira", "fira_layerwise"))
GALORE = Method(lora=False, optimizers=("galore_adamw",))
METHODS = {
    "adamw": Method(lora=False, optimizers=ADAMW),
    "adamw-two-rates": Method(lora=False, optimizers=ADAMW),
    "fira": FIRA,
    "fira-hf": FIRA,
    "galore": GALORE,
    "flora": FIRA,
    "apollo": Method(lora=False, optimizers=("apollo_adamw",)),
    "lora": Method(lora=True, optimizers=ADAMW),
    "lora-two-rates": Method(lora=True, optimizers=ADAMW),
    "relora": Method(lora=True, optimizers=ADAMW),
    # What continues a pretrained model beside these.
    "lora-equal-bytes": Method(lora=True, optimizers=ADAMW),
    "subspace-muon": FIRA,
    "muon": FIRA,
    # The paper's ablation and sweeps: what each is lies in the settings of its experiment.
    "fira-matrix": FIRA,
    "fira-without-scaling": FIRA,
    "fira-without-limiter": FIRA,
    "fira-clipping": FIRA,
    "fira-shrink": FIRA,
    "fira-tensor-scaling": FIRA,
    "fira-only-scaling": FIRA,
    "fira-gamma-1.1": FIRA,
    "fira-gamma-1.001": FIRA,
    "fira-gamma-1": FIRA,
    "fira-rmsprop": FIRA,
    "fira-lion": FIRA,
    "fira-adafactor": FIRA,
    **{f"fira-rank-{rank}": FIRA for rank in RANKS},
    **{f"galore-rank-{rank}": GALORE for rank in RANKS},
}
RECIPE = Recipe(
    package="recipes.pretraining",
    methods=METHODS,
    paths=frozenset({"output_dir", "data_dir", "other_data_dir", "model", "model_config", "tokenizer"}),
    derived={
        "optim_target_modules": "it is the linear layers of attention and MLP, as published",
        "include_num_input_tokens_seen": "tokens are always counted, without padding",
    },
)


@dataclass
class RecipeArguments(RestartArguments):
    """The recipe's settings beside `transformers.TrainingArguments`."""

    method: str = field(metadata={"help": "One of " + ", ".join(METHODS) + "."})
    model_config: str | None = field(
        default=None, metadata={"help": "config.json of the LLaMA that is trained from random weights."}
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "In place of model_config: the pretrained model to continue from, with its own tokenizer; "
            "smollm2-135m-instruct, or the path or hub name of any causal language model."
        },
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32 or bfloat16."})
    data_dir: str = field(
        default=EMBEDDED,
        metadata={
            "help": "Folder with train.txt and valid.txt, or train.jsonl and valid.jsonl with a text a line; "
            f"{C4}: C4-en from the hub; {EMBEDDED}: a text that Python carries."
        },
    )
    other_data_dir: str | None = field(
        default=None,
        metadata={"help": "Like data_dir, of which only valid is read: what does a pretrained model forget of it?"},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Path or hub name; by default one is learned from the training text, or the model's own."},
    )
    sequence_length: int = field(default=256, metadata={"help": "Tokens in a sequence."})
    eval_tokens: int = field(default=10_000_000, metadata={"help": "Evaluate on the first so many tokens."})
    lora_rank: int = field(default=128, metadata={"help": "Rank of LoRA's A and B."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale is lora_alpha / lora_rank."})
    dense_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of embeddings, norms and output head (*-two-rates; Fira's: optim_args)."},
    )
    analysis_steps: int | None = field(
        default=None,
        metadata={"help": "Record scaling factors, energy and limiter every so many optimizer steps (fira, adamw)."},
    )
    keep_model: bool = field(default=True, metadata={"help": "Save the trained model in output_dir/model."})

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("sequence_length", "eval_tokens", "lora_rank", "lora_alpha", "analysis_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        self._check_model()
        method = METHODS[self.method]
        if self.analysis_steps and (method.lora or method.optimizers[0] not in (*ADAMW, *FIRA.optimizers)):
            raise ValueError(
                f"analysis_steps is {self.analysis_steps}, but what method {self.method} scales cannot be compared: "
                "it is for adamw and fira; leave it out."
            )
        self.check_restarts(self.method)
        if self.method.endswith("-two-rates") != (self.dense_lr is not None):
            raise ValueError(
                f"method is {self.method} and dense_lr {self.dense_lr}; adamw-two-rates and lora-two-rates need it, "
                "no other has it."
            )
        if self.data_dir == C4 and self.tokenizer is None and self.model is None:
            raise ValueError(
                f"data_dir {C4} is a stream, from which no tokenizer is learned; set tokenizer (t5-base)."
            )

    def _check_model(self) -> None:
        if (self.model is None) == (self.model_config is None):
            both = f"model is {self.model} and model_config {self.model_config}"
            raise ValueError(
                f"{both}; set one of them: model to continue from its weights, model_config to begin anew."
            )
        if self.model is None and self.other_data_dir is not None:
            raise ValueError(
                f"other_data_dir is {self.other_data_dir}, but a model from random weights has nothing to forget; "
                "leave it out, or set model in place of model_config."
            )
        if self.model is not None and self.tokenizer is not None:
            raise ValueError(f"tokenizer is {self.tokenizer}, but {self.model} has its own; leave it out.")
        if self.model is not None and self.method == "lora-two-rates":
            raise ValueError(
                "method lora-two-rates has a rate for embeddings and norms, which LoRA on a pretrained model leaves "
                "as they are; choose lora."
            )
