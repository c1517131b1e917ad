"""Read the folder of a run: its options, data, environment and metrics, as the model card needs them."""

import json
import math
import os
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from minigpt.config.arguments import Arguments
from minigpt.config.parser import read_config
from minigpt.training.provenance import is_local
from minigpt.utils.errors import UserError, first_line
from minigpt.utils.files import read_json
from minigpt.utils.run_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ARGUMENTS_FILE,
    CURVE_FILES,
    DATA_FILE,
    ENVIRONMENT_FILE,
    EVALUATIONS_DIR,
    METRICS_FILE,
    read_metrics,
)


class MetricLabel(NamedTuple):
    """What a metric is called on the Hub."""

    type: str  # in the front matter (model-index)
    title: str  # in the table


METRIC_LABELS = {
    "val/loss": MetricLabel("loss", "Loss (nats per token)"),
    "val/perplexity": MetricLabel("perplexity", "Perplexity (per token)"),
    "val/bits_per_byte": MetricLabel("bits_per_byte", "Bits per byte"),
    "hellaswag/acc": MetricLabel("accuracy", "HellaSwag, accuracy"),
    "hellaswag/acc_norm": MetricLabel("accuracy", "HellaSwag, accuracy normalized by bytes"),
    "hellaswag/acc_norm_tokens": MetricLabel("accuracy", "HellaSwag, accuracy normalized by tokens"),
    "memorization/copied_20": MetricLabel("copied", "Share of sampled tokens in copies of 20 training tokens or more"),
    "memorization/copied_50": MetricLabel("copied", "Share of sampled tokens in copies of 50 training tokens or more"),
    "memorization/train_continued": MetricLabel("continued", "Share of training prompts continued verbatim"),
    "memorization/validation_continued": MetricLabel("continued", "Share of validation prompts continued verbatim"),
}


Form = Any  # see _check_form
CONFIG_FORM: Form = {
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "hidden_size": int,
    "vocab_size": int,
    "max_position_embeddings": int,
}
FILES_FORM: Form = [{"path": str, "bytes": int, "sha256": str}]
DATA_FORM: Form = {
    "fingerprint": str,
    "tokenizer_hash": str | None,
    "source": dict.fromkeys(("dataset_name", "corpus", "dataset_folder"), str | None)
    | dict.fromkeys(("train_file", "validation_file"), FILES_FORM),
    "splits": {
        "*": dict.fromkeys(("documents", "tokens", "text_bytes"), int | None) | {"shards": [{"file": str}]},
    },
}
ENVIRONMENT_FORM: Form = {
    **dict.fromkeys(("base_model", "base_folder", "device", "mixed_precision"), str | None),
    "processes": int,
    "versions": {"*": str | None},
}
ADAPTER_FORM: Form = {"base_model_name_or_path": str | None}
TASK_FORM: Form = {"task": str, "shots": str, "metric": str, "value": int | float}
METRICS_FORM: Form = {"tasks": [TASK_FORM]} | dict.fromkeys(
    ("step", "elapsed_s", "train/loss", *METRIC_LABELS), int | float
)


@dataclass(frozen=True)
class RunSummary:
    """The records of a run. What was not recorded is empty."""

    model_dir: Path
    config: dict[str, Any]  # config.json of the model; empty for an adapter
    adapter_config: dict[str, Any]  # adapter_config.json of PEFT; empty for a whole model
    options: dict[str, Any]  # arguments.yaml, with the defaults filled in
    data: dict[str, Any]  # data.json: the manifest of the token shards
    environment: dict[str, Any]
    metrics: list[dict[str, float]]
    later_evaluations: list[dict[str, Any]]  # by other commands, with --output RUN/evaluations/…
    has_loss_plot: bool

    @property
    def training(self) -> dict[str, float]:
        """The last line of metrics.jsonl with a training loss."""
        return next((line for line in reversed(self.metrics) if "train/loss" in line), {})

    @property
    def evaluation(self) -> dict[str, float]:
        """`step` and the finite metrics of the model in the folder: the best model, or the last one."""
        lines = [line for line in self.metrics if any(name in line for name in METRIC_LABELS)]
        finite_losses = [line for line in lines if math.isfinite(line.get("val/loss", math.nan))]
        if self.options.get("load_best_model_at_end") and finite_losses:
            step = min(finite_losses, key=lambda line: line["val/loss"])["step"]
        else:
            step = lines[-1]["step"] if lines else 0
        metrics: dict[str, float] = {"step": step}
        for line in lines:
            if line["step"] == step:
                metrics |= {name: line[name] for name in METRIC_LABELS if math.isfinite(line.get(name, math.nan))}
        for result in self.later_evaluations:
            later = (name for name in METRIC_LABELS if name.startswith(("hellaswag/", "memorization/")))
            metrics |= {name: result[name] for name in later if name in result}
        return metrics

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The results of `minigpt eval --tasks`."""
        return [result for record in self.later_evaluations for result in record.get("tasks", [])]

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter of another model instead of a whole model."""
        return bool(self.adapter_config) and not self.config

    @property
    def is_chat_model(self) -> bool:
        """Whether the model was fine-tuned on conversations: its tokenizer has a chat template."""
        if (self.model_dir / "chat_template.jinja").is_file():
            return True
        return bool(_read_record(self.model_dir / "tokenizer_config.json", {}).get("chat_template"))

    @property
    def parameters(self) -> int:
        """Number of trainable parameters in the weight files. Raises UserError if one is damaged."""
        count = 0
        for path in self.model_dir.glob(ADAPTER_WEIGHTS if self.is_adapter else "model*.safetensors"):
            try:
                with safe_open(path, framework="numpy") as file:
                    count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable safetensors file: {first_line(error)}") from error
        return count

    @property
    def dataset(self) -> str | None:
        """The name of the dataset on the Hub, if the text comes from there."""
        return self.data.get("source", {}).get("dataset_name")

    @property
    def data_names(self) -> list[str]:
        """What the training text is called: a dataset, a corpus, a folder, or files. Empty if unknown."""
        source = self.data.get("source", {})
        name = self.dataset or source.get("corpus") or source.get("dataset_folder")
        return [name] if name else [record["path"] for record in source.get("train_file", [])]

    @property
    def base_on_hub(self) -> str | None:
        """The name on the Hub of the model that was fine-tuned. None: from scratch, or it was a folder."""
        name = self.environment.get("base_model")
        if name or self.environment.get("base_folder"):
            return name
        base = self.adapter_config.get("base_model_name_or_path") or ""
        return base if base and not is_local(base) and base.count("/") <= 1 else None

    @property
    def base_model(self) -> str | None:
        """The model that was fine-tuned: a name on the Hub, or the last part of a folder. None: from scratch."""
        base = self.base_on_hub or self.environment.get("base_folder")
        return base or Path(self.adapter_config.get("base_model_name_or_path") or "").name or None

    @property
    def example_prompt(self) -> str:
        """A prompt, or a question, that the tokenizer can encode. One of characters refuses those it does not know."""
        neutral = "What can you do?" if self.is_chat_model else "The"
        path = self.model_dir / "tokenizer.json"
        if not path.is_file():
            return neutral
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception for a damaged file
            raise UserError(f"{path}: not a tokenizer: {first_line(error)}") from error
        sample_prompts = self.options.get("sample_prompts") or []
        for prompt in sorted([*sample_prompts, neutral, "\n"], key=lambda text: not text.strip()):  # blank ones last
            try:
                if tokenizer.encode(prompt, add_special_tokens=False).ids:
                    return prompt
            except Exception:  # tokenizers raises a bare Exception for a character without an id
                continue
        return min(tokenizer.get_vocab(with_added_tokens=False))


def read_run_summary(run_dir: Path, model_dir: Path | None = None) -> RunSummary:
    """Read the records in `run_dir`. The model may be in another folder, such as one of the run's checkpoints.

    Raises UserError if one of the files is damaged.
    """
    model_dir = model_dir or run_dir
    paths = (run_dir / ARGUMENTS_FILE, model_dir / ARGUMENTS_FILE)
    arguments_path = next((path for path in paths if path.is_file()), None)
    defaults = {field.name: field.default for field in fields(Arguments) if field.default is not MISSING}
    metrics_path = run_dir / METRICS_FILE
    return RunSummary(
        model_dir=model_dir,
        config=_read_record(model_dir / "config.json", CONFIG_FORM),
        adapter_config=_read_record(model_dir / ADAPTER_CONFIG, ADAPTER_FORM),
        options=defaults | read_config(arguments_path) if arguments_path else {},
        data=_read_record(run_dir / DATA_FILE, DATA_FORM),
        environment=_read_record(run_dir / ENVIRONMENT_FILE, ENVIRONMENT_FORM),
        metrics=_read_metrics(metrics_path),
        later_evaluations=[
            _read_record(path, METRICS_FORM) for path in sorted((run_dir / EVALUATIONS_DIR).glob("*.json"))
        ],
        has_loss_plot=(run_dir / CURVE_FILES[0]).is_file(),
    )


def _read_record(path: Path, form: Form) -> dict[str, Any]:
    """The object in a JSON file of a run; empty if there is no file. Raises UserError if a value has another form."""
    if not os.path.lexists(path):
        return {}
    record = read_json(path, "the JSON file of a run")
    _check_form(record, form, str(path))
    return record


def _read_metrics(path: Path) -> list[dict[str, float]]:
    metrics = read_metrics(path) if os.path.lexists(path) else []
    for line in metrics:
        _check_form(line, METRICS_FORM, f"{path}, step {line['step']}")
    return metrics


def _check_form(value: Any, form: Form, place: str) -> None:
    """Raises UserError if `value` has not the form that the card needs.

    A form is a type, a list with the form of every item, or an object with the form of each key ("*": of all others).
    Keys may be missing, except in the items of a list.
    """
    if isinstance(form, dict):
        if not isinstance(value, dict):
            raise UserError(f"{place} is {type(value).__name__} instead of an object")
        for key, inner in value.items():
            if (inner_form := form.get(key, form.get("*"))) is not None:
                _check_form(inner, inner_form, f"{place}: {key}")
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise UserError(f"{place} is {type(value).__name__} instead of a list")
        for item in value:
            _check_form(item, form[0], place)
            if missing := [key for key in form[0] if key not in item]:
                raise UserError(f"{place}: an item has no {missing[0]}")
    elif not isinstance(value, form) or isinstance(value, bool):
        raise UserError(f"{place} is {json.dumps(value)}, not of type {getattr(form, '__name__', form)}")
