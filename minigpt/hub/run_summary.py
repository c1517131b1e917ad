"""Read the folder of a run: its options, data, environment and metrics, as the model card needs them."""

import json
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from minigpt.config.arguments import Arguments
from minigpt.config.parser import read_config
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import (
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
}


@dataclass(frozen=True)
class RunSummary:
    """The records of a run. What was not recorded is empty."""

    model_dir: Path
    config: dict[str, Any]  # config.json of the model
    options: dict[str, Any]  # arguments.yaml, with the defaults filled in
    data: dict[str, Any]  # data.json: the manifest of the token shards
    environment: dict[str, Any]
    metrics: list[dict[str, float]]
    later_evaluations: list[dict[str, Any]]  # written by `minigpt hellaswag --output RUN/evaluations/…`
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
            hellaswag = (name for name in METRIC_LABELS if name.startswith("hellaswag/"))
            metrics |= {name: result[name] for name in hellaswag if name in result}
        return metrics

    @property
    def parameters(self) -> int:
        """Number of trainable parameters in the weight files."""
        count = 0
        for path in self.model_dir.glob("model*.safetensors"):
            with safe_open(path, framework="numpy") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
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
    def base_model(self) -> str | None:
        """The model that was fine-tuned: a name on the Hub, or the last part of a folder. None: from scratch."""
        return self.environment.get("base_model") or self.environment.get("base_folder")

    @property
    def example_prompt(self) -> str:
        """A prompt that the tokenizer can encode. A tokenizer of characters refuses those it was not trained on."""
        path = self.model_dir / "tokenizer.json"
        if not path.is_file():
            return "The"
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        sample_prompts = self.options.get("sample_prompts") or []
        for prompt in sorted([*sample_prompts, "The", "\n"], key=lambda text: not text.strip()):  # blank ones last
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
        config=_read_json(model_dir / "config.json"),
        options=defaults | read_config(arguments_path) if arguments_path else {},
        data=_read_json(run_dir / DATA_FILE),
        environment=_read_json(run_dir / ENVIRONMENT_FILE),
        metrics=read_metrics(metrics_path) if metrics_path.is_file() else [],
        later_evaluations=[_read_json(path) for path in sorted((run_dir / EVALUATIONS_DIR).glob("*.json"))],
        has_loss_plot=(run_dir / CURVE_FILES[0]).is_file(),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # json.JSONDecodeError or UnicodeDecodeError
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no names with values; is it the file of a run?")
    return values
