"""The options of a training run. Each is described once, here, for YAML files and the command line alike."""

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from minigpt.utils.errors import UserError

SHAPE_OPTIONS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
    "qkv_bias",
)
LORA_OPTIONS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora")
TEXT_SOURCES = ("data", "train_file", "dataset_name", "corpus")


def option(help: str, default: Any = None) -> Any:
    """A dataclass field that is also a command-line option. Lists are copied for every instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


class Checked:
    """Base of the option groups. `problems` of a group yields a message for each impossible value or combination.

    A message names the value, the rule and the way out. All messages are raised together as one UserError.
    """

    def __post_init__(self) -> None:
        owners = [cls for cls in reversed(type(self).__mro__) if "problems" in vars(cls)]
        problems = [problem for cls in owners for problem in vars(cls)["problems"](self)]
        if problems:
            raise UserError("; ".join(problems))

    def with_values(self, **values: Any) -> Self:
        """A copy with other values, checked again."""
        return replace(self, **values)  # type: ignore[type-var]


def _below(arguments: Any, minimum: float, *names: str) -> Iterator[str]:
    """A message for every named value that is given and less than `minimum`."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not minimum <= value < math.inf:
            yield f"{name}={value} must be a number of at least {minimum}"


@dataclass(frozen=True)
class ModelArguments(Checked):
    """What is trained: a model from scratch, or an existing one."""

    _argument_group_name = "model"

    model_name_or_path: str | None = option(
        "Start from a MiniGPT or GPT-2, a folder or Hub name (default: from scratch)"
    )
    hidden_size: int | None = option("Width of the model (default: 768)")
    num_hidden_layers: int | None = option("Number of layers (default: 12)")
    num_attention_heads: int | None = option("Attention heads per layer (default: 12)")
    intermediate_size: int | None = option("Width of the MLP (default: 4 x hidden_size)")
    max_position_embeddings: int | None = option("Longest context, in tokens (default: block_size)")
    vocab_size: int | None = option("Rows of the embedding (default: the tokenizer's size)")
    pad_vocab_size_to_multiple_of: int | None = option(
        "Round the vocabulary size up; the extra ids are never generated"
    )
    tie_word_embeddings: bool | None = option("Share the input and output embedding (default: true)")
    qkv_bias: bool | None = option("Bias on the query, key and value projections (default: true)")
    initializer_gain: float | None = option(
        "Initial standard deviation of the q, k, v and up projections times sqrt(fan_in); 0.55 in GPT-2 124M "
        "(default: GPT-2's standard deviation 0.02 at any width)"
    )
    dropout: float | None = option(
        "Dropout on embeddings, attention and residuals (default: 0, or the loaded model's)"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = option(
        "Attention kernel", "sdpa"
    )
    use_peft: bool = option("Train a LoRA adapter, small matrices next to those of a frozen model", False)
    lora_r: int = option("Rank of the adapter's matrices", 16)
    lora_alpha: int = option("The adapter's output is scaled by lora_alpha / lora_r", 32)
    lora_dropout: float = option("Dropout on the adapter's input", 0.05)
    lora_target_modules: list[str] | None = option(
        "Linear layers that get an adapter: q_proj, k_proj, v_proj, o_proj, up_proj, down_proj (default: all of them)"
    )
    use_rslora: bool = option("Scale by lora_alpha / sqrt(lora_r) instead (rsLoRA)", False)

    @property
    def shape(self) -> dict[str, Any]:
        """The options given that only a model from scratch can take, as config fields."""
        given = {name: getattr(self, name) for name in SHAPE_OPTIONS}
        return {name: value for name, value in given.items() if value is not None}

    def problems(self) -> Iterator[str]:
        """A sentence for each value that cannot be, or excludes another."""
        if self.model_name_or_path is not None and self.shape:
            given = ", ".join(f"{name}={value}" for name, value in self.shape.items())
            yield f"{given}: the shape is fixed by model_name_or_path={self.model_name_or_path}; drop one of them"
        if self.initializer_gain is not None and not self.initializer_gain > 0:
            yield f"initializer_gain={self.initializer_gain} must be above 0"
        if self.initializer_gain is not None and self.model_name_or_path is not None:
            yield f"initializer_gain is for new weights, not those of model_name_or_path={self.model_name_or_path}"
        if self.dropout is not None and not 0 <= self.dropout < 1:
            yield f"dropout={self.dropout} must be at least 0 and below 1"
        yield from _below(self, 1, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        yield from _below(self, 1, "max_position_embeddings", "vocab_size", "pad_vocab_size_to_multiple_of")
        if self.pad_vocab_size_to_multiple_of is not None and self.vocab_size is not None:
            yield f"vocab_size={self.vocab_size} is already given; drop it or pad_vocab_size_to_multiple_of"
        yield from self._lora_problems()

    def _lora_problems(self) -> Iterator[str]:
        yield from _below(self, 1, "lora_r", "lora_alpha")
        if not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout={self.lora_dropout} must be at least 0 and below 1"
        defaults = {name: ModelArguments.__dataclass_fields__[name].default for name in LORA_OPTIONS}
        given = ", ".join(
            f"{name}={getattr(self, name)}" for name in LORA_OPTIONS if getattr(self, name) != defaults[name]
        )
        if given and not self.use_peft:
            yield f"{given}: only an adapter has these options; add use_peft"
        if self.use_peft and self.model_name_or_path is None:
            yield "use_peft adapts an existing model; give it as model_name_or_path"
        if self.use_peft and self.pad_vocab_size_to_multiple_of is not None:
            yield (
                f"pad_vocab_size_to_multiple_of={self.pad_vocab_size_to_multiple_of}: an adapter does not change the "
                "vocabulary; drop it or use_peft"
            )
        if self.lora_target_modules == []:
            yield "lora_target_modules names no module; leave it out to adapt all linear layers"


@dataclass(frozen=True)
class DataArguments(Checked):
    """Where the text comes from, and how it becomes tokens."""

    _argument_group_name = "data"

    data: list[str] | None = option("Folders of token shards: MiniGPT's, nanoGPT's, build-nanogpt's or llm.c's")
    data_weights: list[float] | None = option("Share of the samples from each folder of data, if there are several")
    train_file: list[str] | None = option(
        "Text, JSONL, Parquet or Arrow files, or folders of them; text and JSONL may be .gz or .zst"
    )
    validation_file: list[str] | None = option(
        "Files to validate on (default: a part of the training text is held out)"
    )
    dataset_name: str | None = option("Hugging Face data set: a local folder or a Hub name")
    dataset_config_name: str | None = option("Configuration of the data set")
    dataset_split: str = option("Split of the data set to train on", "train")
    dataset_revision: str | None = option("Branch, tag or commit of the data set on the Hub")
    streaming: bool = option("Read the data set while it downloads, without a copy on disk", False)
    corpus: Literal["python-docs", "python-chat", "openwebtext", "fineweb-edu"] | None = option(
        "A named corpus. python-docs comes with Python, and python-chat, conversations, is made from it; openwebtext "
        "is 38 GB of text, fineweb-edu 46 GB (10B tokens)"
    )
    text_column: str = option("Field of JSONL lines and data sets that holds the text", "text")
    completion_only_loss: bool | None = option(
        "Compute the loss on completions only, or on the assistant's messages; for rows that have them (default: true)"
    )
    chat_template: str | None = option(
        "How conversations are written: chatml, plain (no new tokens), a Jinja file, or a tokenizer to take it from "
        "(default: the tokenizer's own, or chatml; plain for LoRA)"
    )
    validation_split_percentage: float = option(
        "Percentage of the text held out if there is no validation split: whole documents, always the same ones; one "
        "that is larger than this percentage of the text is cut at its end",
        10.0,
    )
    dedup: Literal["exact", "near"] | None = option(
        "Drop documents that repeat an earlier one, and training documents that repeat a validation document: "
        "exactly, or nearly"
    )
    dedup_threshold: float = option(
        "With dedup=near, the Jaccard similarity of five-word sequences from which on a document is dropped", 0.7
    )
    decontaminate: list[str] | None = option(
        "JSONL files of benchmark items: training documents that share 13 words in sequence with one are dropped"
    )
    tokenizer: str | None = option(
        "'bpe' or 'char' to train one, or a tokenizer folder or Hub name (default: bpe, or the model's)"
    )
    tokenizer_vocab_size: int = option("Vocabulary size of a trained 'bpe' tokenizer", 8192)
    tokenizer_special_tokens: list[str] = option(
        "Special tokens of a trained 'bpe' tokenizer besides <|endoftext|>", []
    )
    tokenizer_training_megabytes: int = option(
        "Megabytes of text that a 'bpe' tokenizer is trained on, spread over the corpus", 100
    )
    shard_tokens: int = option("Tokens per shard; an interrupted preparation repeats at most one shard", 100_000_000)
    preprocessing_num_workers: int | None = option("Processes that tokenize (default: one per core)")
    cache_dir: str | None = option("Where the trainer keeps the shards it prepares (default: ~/.cache/minigpt)")
    overwrite_cache: bool = option("Prepare the shards again even if they exist", False)

    def problems(self) -> Iterator[str]:
        """A sentence for each value that cannot be, or excludes another."""
        given = [name for name in TEXT_SOURCES if getattr(self, name)]
        if len(given) > 1:
            yield f"{' and '.join(given)} are given: choose one source of text"
        if not given:
            yield f"no text to train on: give one of {', '.join('--' + name for name in TEXT_SOURCES)}"
        weights = self.data_weights or []
        if len(weights) != (len(self.data or []) if weights or len(self.data or []) > 1 else 0):
            yield f"data_weights={weights}: give one number for each folder of data={self.data}"
        if not all(0 < weight < math.inf for weight in weights):
            yield f"data_weights={weights} must all be above 0"
        for name in ("completion_only_loss", "chat_template"):
            if getattr(self, name) is not None and self.data:
                yield f"{name} has no effect on data={' '.join(self.data)}: it decides how text is prepared; drop it"
        if self.validation_file and not self.train_file:
            yield "validation_file requires train_file"
        if not 0 < self.validation_split_percentage < 100:
            yield f"validation_split_percentage={self.validation_split_percentage} must be between 0 and 100"
        if not 0 < self.dedup_threshold <= 1:
            yield f"dedup_threshold={self.dedup_threshold} must be above 0 and at most 1"
        for name in ("dedup", "decontaminate"):
            if getattr(self, name) and (self.data or self.streaming):
                yield f"{name} reads the whole text before it is prepared; it cannot be data or streaming"
        yield from _below(self, 257, "tokenizer_vocab_size")  # 256 bytes and the end-of-text token
        yield from _below(self, 1, "preprocessing_num_workers", "tokenizer_training_megabytes", "shard_tokens")
        if self.streaming and not self.dataset_name and self.corpus not in ("openwebtext", "fineweb-edu"):
            yield "streaming requires dataset_name, or corpus openwebtext or fineweb-edu"
        if self.dataset_revision and not self.dataset_name and self.corpus not in ("openwebtext", "fineweb-edu"):
            yield "dataset_revision requires dataset_name, or corpus openwebtext or fineweb-edu"


@dataclass(frozen=True)
class BatchArguments(Checked):
    """How tokens become batches, and for how long."""

    _argument_group_name = "batches"

    block_size: int = option("Tokens per sample", 1024)
    stride: int | None = option(
        "Tokens between the starts of two samples; below block_size they overlap (default: block_size)"
    )
    packing_strategy: Literal["wrapped", "bfd", "bfd_split", "none"] = option(
        "How documents fill samples. wrapped: cut anywhere; bfd: whole documents by best fit, long ones truncated; "
        "bfd_split: the same, long ones split; none: one document per sample",
        "wrapped",
    )
    document_attention: bool = option("Keep the documents of a sample separate, in attention and in positions", False)
    per_device_train_batch_size: int = option("Samples in one micro-batch of one process", 8)
    gradient_accumulation_steps: int = option("Micro-batches per step and process", 1)
    per_device_eval_batch_size: int | None = option(
        "Samples per evaluation batch and process (default: as in training)"
    )
    max_steps: int | None = option("Number of steps (optimizer updates); overrides num_train_epochs")
    train_minutes: float = option(
        "Train for this many minutes, without evaluation and saving; the learning rate follows the time. Overrides "
        "max_steps and num_train_epochs (0: no limit)",
        0.0,
    )
    text_slope: float | None = option(
        "How much the loss falls while more of this text is read with this vocabulary, 1 for a typical text and 2,048 "
        "ids; for the forecast of more minutes. Measured where train_minutes chooses the model"
    )
    num_train_epochs: float = option("Passes over the training data, if max_steps is not given", 1.0)
    dataloader_num_workers: int = option("Processes that load batches for each training process", 0)
    seed: int = option("Seed of the initial weights, the data order and dropout", 1337)

    @property
    def eval_batch_size(self) -> int:
        return self.per_device_eval_batch_size or self.per_device_train_batch_size

    def problems(self) -> Iterator[str]:
        """A sentence for each value that cannot be, or excludes another."""
        yield from _below(self, 1, "block_size", "stride", "per_device_train_batch_size", "max_steps")
        yield from _below(self, 1, "gradient_accumulation_steps", "per_device_eval_batch_size")
        yield from _below(self, 0, "dataloader_num_workers", "seed", "train_minutes")
        if not self.num_train_epochs > 0:
            yield f"num_train_epochs={self.num_train_epochs} must be greater than 0"
        if self.text_slope is not None and not self.text_slope > 0:
            yield f"text_slope={self.text_slope} must be greater than 0"
        if self.stride is not None and self.stride > self.block_size:
            yield f"stride={self.stride} is greater than block_size={self.block_size} and would skip tokens"
        if self.stride is not None and self.packing_strategy != "wrapped":
            yield f"stride={self.stride} requires packing_strategy=wrapped, not {self.packing_strategy}"


@dataclass(frozen=True)
class OptimizerArguments(Checked):
    """How a gradient becomes an update."""

    _argument_group_name = "optimizer"

    optimizer: Literal["adamw", "muon"] = option(
        "adamw, or muon: Muon for the layers' matrices and AdamW for the rest", "adamw"
    )
    learning_rate: float = option("Peak learning rate of AdamW", 6e-4)
    muon_learning_rate: float = option("Peak learning rate of Muon, on the same schedule", 0.02)
    muon_momentum: float = option("Momentum of Muon", 0.95)
    muon_ns_steps: int = option("Newton-Schulz steps of Muon; 3 save time where layers are small", 5)
    min_learning_rate: float = option("Learning rate at the end of the decay", 0.0)
    lr_scheduler_type: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = option(
        "Shape of the learning rate after warm-up", "cosine"
    )
    num_decay_steps: int | None = option(
        "Steps of the linear decay of warmup_stable_decay (default: a fifth of the run)"
    )
    warmup_steps: float = option("Steps of linear warm-up; below 1: this part of all steps", 0)
    scale_learning_rate: bool = option("Multiply the learning rates by the number of processes", False)
    weight_decay: float = option("Weight decay of matrices; biases and norms have none", 0.1)
    adam_beta1: float = option("Decay of AdamW's first moment", 0.9)
    adam_beta2: float = option("Decay of AdamW's second moment", 0.95)
    adam_epsilon: float = option("Added to the denominator of AdamW", 1e-8)
    max_grad_norm: float = option("Clip the gradient to this norm; 0: no clipping", 1.0)
    max_skipped_steps: int = option(
        "Stop after more than this many steps were skipped because their gradient was not finite", 10
    )

    def problems(self) -> Iterator[str]:
        """A sentence for each value that cannot be, or excludes another."""
        yield from _below(self, 0, "learning_rate", "muon_learning_rate", "min_learning_rate", "warmup_steps")
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            yield f"warmup_steps={self.warmup_steps:g} must be a whole number, or less than 1: a part of all steps"
        yield from _below(self, 0, "weight_decay", "adam_epsilon", "max_grad_norm", "max_skipped_steps")
        yield from _below(self, 1, "num_decay_steps", "muon_ns_steps")
        if self.num_decay_steps is not None and self.lr_scheduler_type != "warmup_stable_decay":
            yield f"num_decay_steps={self.num_decay_steps} requires lr_scheduler_type=warmup_stable_decay"
        if self.learning_rate == 0:
            yield "learning_rate=0.0 must be above 0"
        if self.min_learning_rate > self.learning_rate:
            yield f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}"
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 0 and below 1"


@dataclass(frozen=True)
class RunArguments(Checked):
    """Output, evaluation, checkpoints and trackers of the run."""

    _argument_group_name = "run"

    output_dir: str = option("Folder of the run, for the model, its checkpoints and curves", "runs/minigpt")
    overwrite_output_dir: bool = option("Delete an earlier run in output_dir", False)
    resume_from_checkpoint: str | None = option("Resume from a checkpoint folder, or from 'latest' in output_dir")
    use_cpu: bool = option("Train on the CPU even if there is a GPU", False)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        "Precision of the computation (default: the launch profile's)"
    )
    ddp_timeout: int = option("Seconds that a process waits for the others before it fails", 1800)
    ddp_comm_hook: Literal["no", "bf16", "fp16"] = option(
        "Precision in which DDP averages gradients; no: float32", "no"
    )
    tf32: bool = option("Use TF32 for float32 matrix products on GPUs that have it", True)
    full_determinism: bool = option(
        "Use only deterministic GPU kernels, so that a run repeats bit for bit; slower. On a CPU it always does", False
    )
    torch_compile: bool = option(
        "Compile the model: the whole of it, or every layer under FSDP2 (default: the launch profile's)", False
    )
    torch_compile_backend: Literal["inductor", "aot_eager", "eager", "cudagraphs"] = option(
        "Compiler of torch_compile", "inductor"
    )
    gradient_checkpointing: Literal["no", "selective", "full"] = option(
        "Recompute activations in the backward pass to save memory. selective: the cheap ones; full: whole layers",
        "no",
    )
    logging_steps: int = option("Steps between log lines", 10)
    log_stats_steps: int = option("Steps between statistics of activations, weights and updates; 0: never", 0)
    profile_steps: list[int] | None = option("Profile the steps from the first to the last of these two numbers")
    memory_snapshot: bool = option(
        "Record what uses the memory of a CUDA GPU; if it runs out, write the record to profile/ in the run's folder",
        False,
    )
    eval_steps: int = option("Steps between validation losses over the whole split; 0: only at the end", 500)
    hellaswag_steps: int | None = option("Steps between HellaSwag accuracies; 0: only at the end (default: never)")
    hellaswag_file: str | None = option("JSONL file of HellaSwag items (default: the validation split on the Hub)")
    hellaswag_limit: int | None = option("Use only this many items of HellaSwag")
    save_steps: int = option("Steps between checkpoints; 0: only at the end", 1000)
    async_save: bool = option("Write checkpoints in the background while training continues", False)
    save_total_limit: int | None = option("Keep this many checkpoints, and the one with the lowest validation loss", 2)
    save_best: bool = option(
        "Also save a checkpoint when the validation loss is the lowest so far; load_best_model_at_end does it too",
        False,
    )
    load_best_model_at_end: bool = option("Make the checkpoint with the lowest validation loss the final model", False)
    sample_steps: int = option("Steps between sample texts; 0: only at the end", 0)
    sample_prompts: list[str] | None = option(
        'Prompts of the sample texts, questions if the model learns to chat (default: "", the start of a text, or a '
        "new line if the training text is a single document)"
    )
    sample_max_new_tokens: int = option("Tokens per sample text", 100)
    report_to: list[str] = option(
        "Trackers: tensorboard, wandb, trackio, all or none (default: tensorboard)", ["tensorboard"]
    )
    run_name: str | None = option("Name of the run in the trackers (default: the name of output_dir)")
    push_to_hub: bool = option("Push every checkpoint (in the background) and the final model to the Hub", False)
    hub_model_id: str | None = option(
        "Repository to push to, USER/NAME (default: the name of output_dir, under your account)"
    )
    hub_private_repo: bool = option("Make a new repository private", False)

    def problems(self) -> Iterator[str]:
        """A sentence for each value that cannot be, or excludes another."""
        yield from _below(self, 1, "logging_steps", "save_total_limit", "sample_max_new_tokens", "hellaswag_limit")
        yield from _below(self, 1, "ddp_timeout")
        yield from _below(self, 0, "eval_steps", "hellaswag_steps", "save_steps", "sample_steps", "log_stats_steps")
        if self.profile_steps is not None and not (
            len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1]
        ):
            yield f"profile_steps={self.profile_steps} must be two steps, the first from 1 on and not after the last"
        if self.hellaswag_steps is None and (self.hellaswag_file is not None or self.hellaswag_limit is not None):
            yield "hellaswag_file and hellaswag_limit require hellaswag_steps"
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private_repo):
            yield "hub_model_id and hub_private_repo require push_to_hub"
        known = {"tensorboard", "wandb", "trackio", "all", "none"}
        for tracker in self.report_to:
            if tracker not in known:
                yield f"report_to={tracker} is none of {', '.join(sorted(known))}"
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            yield "overwrite_output_dir would delete what resume_from_checkpoint needs; drop one of them"


@dataclass(frozen=True)
class Arguments(ModelArguments, DataArguments, BatchArguments, OptimizerArguments, RunArguments):
    """All options of a training run."""

    GROUPS = (ModelArguments, DataArguments, BatchArguments, OptimizerArguments, RunArguments)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir)

    @property
    def saves_best(self) -> bool:
        """Whether each improved validation loss is worth a checkpoint."""
        return self.save_best or self.load_best_model_at_end

    def problems(self) -> Iterator[str]:
        """A sentence for each value that cannot be, or excludes another."""
        if self.use_peft and self.optimizer == "muon":
            # it orthogonalizes the update of a whole weight matrix; an adapter's matrices are two factors of one
            yield "optimizer=muon is for whole weight matrices, and use_peft trains none; use optimizer=adamw"
        if self.num_decay_steps is not None and self.train_minutes:
            yield "num_decay_steps has no effect with train_minutes, where the last fifth of the time decays; drop one"

    def as_yaml(self) -> str:
        """Every option that differs from its default, in a form that `read_config` reads back."""
        unset = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        changed = {name: value for name, value in vars(self).items() if value != unset[name]}
        return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
