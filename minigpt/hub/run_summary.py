"""Read everything a model card says from the folder of a run."""

import json
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from minigpt.config.arguments import Arguments
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import DATA_FILE, ENVIRONMENT_FILE, EVALUATIONS_DIR, METRICS_FILE

METRIC_NAMES = {  # name in metrics.jsonl: (type in model-index, name in the table)
    "val/loss": ("loss", "Loss (nats per token)"),
    "val/perplexity": ("perplexity", "Perplexity (per token)"),
    "val/bits_per_byte": ("bits_per_byte", "Bits per byte"),
    "hellaswag/acc": ("accuracy", "HellaSwag, accuracy"),
    "hellaswag/acc_norm": ("accuracy", "HellaSwag, accuracy normalised by bytes"),
    "hellaswag/acc_norm_tokens": ("accuracy", "HellaSwag, accuracy normalised by tokens"),
}


@dataclass(frozen=True)
class Facts:
    """What a folder tells of a model. Whatever is not known is empty, and the card says nothing about it."""

    model_dir: Path
    config: dict[str, Any]
    options: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, float]]
    later: list[dict[str, Any]]  # what `minigpt hellaswag --output RUN/evaluations/…` found after the training
    has_curve: bool

    @property
    def training(self) -> dict[str, float]:
        """The last log line of training."""
        return next((line for line in reversed(self.metrics) if "train/loss" in line), {})

    @property
    def evaluation(self) -> dict[str, float]:
        """`step` and the finite metrics of the model that the folder holds: the best one, or the last."""
        lines = [line for line in self.metrics if any(name in line for name in METRIC_NAMES)]
        losses = [line for line in lines if "val/loss" in line and math.isfinite(line["val/loss"])]
        of_best = self.options.get("load_best_model_at_end") and losses
        last = min(losses, key=lambda line: line["val/loss"]) if of_best else lines[-1] if lines else {}
        found = {"step": last.get("step", 0)}
        for line in (line for line in lines if line["step"] == last["step"]):
            found |= {name: line[name] for name in METRIC_NAMES if math.isfinite(line.get(name, math.nan))}
        for result in self.later:
            found |= {name: result[name] for name in METRIC_NAMES if name.startswith("hellaswag/") and name in result}
        return found

    @property
    def parameters(self) -> int:
        """Trainable numbers in the weight files."""
        count = 0
        for path in self.model_dir.glob("model*.safetensors"):
            with safe_open(path, framework="numpy") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        return count

    @property
    def dataset(self) -> str | None:
        """The name of the data set on the Hub, if the text is from there."""
        return self.data.get("source", {}).get("dataset_name")

    @property
    def data_name(self) -> str:
        """What people would call the text."""
        source = self.data.get("source", {})
        files = ", ".join(record["path"] for record in source.get("train_file", [])[:3])
        more = ", …" if len(source.get("train_file", [])) > 3 else ""
        return self.dataset or source.get("corpus") or source.get("dataset_folder") or (files or "token shards") + more


def read_run_summary(run_dir: Path, model_dir: Path | None = None) -> Facts:
    """Read the folder of a run; the model may lie in another folder, such as one of the run's checkpoints.

    Raises UserError when a file of it is damaged.
    """
    model_dir = model_dir or run_dir
    arguments = next((f for f in (run_dir / "arguments.yaml", model_dir / "arguments.yaml") if f.is_file()), None)
    options = {f.name: f.default for f in fields(Arguments) if f.default is not MISSING}
    return Facts(
        model_dir=model_dir,
        config=_read_json(model_dir / "config.json"),
        options=options | _read_yaml(arguments) if arguments else {},
        data=_read_json(run_dir / DATA_FILE),
        environment=_read_json(run_dir / ENVIRONMENT_FILE),
        metrics=_read_lines(run_dir / METRICS_FILE),
        later=[_read_json(path) for path in sorted((run_dir / EVALUATIONS_DIR).glob("*.json"))],
        has_curve=(run_dir / "loss.png").is_file(),
    )


def _read_lines(path: Path) -> list[dict[str, float]]:
    try:  # not tracking.read_metrics: it would import torch, seconds before the first word of an upload
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    except ValueError as error:
        raise UserError(f"{path}: a line is not JSON: {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
