"""The log of a run: progress lines, metrics.jsonl and trackers."""

import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from minigpt.config.arguments import Arguments
from minigpt.training.optional_files import LINE_BYTES, OptionalFiles
from minigpt.training.state import TrainingState
from minigpt.utils.errors import UserError
from minigpt.utils.files import append_line, write_atomically
from minigpt.utils.formatting import format_count, format_duration
from minigpt.utils.hardware import peak_flops, peak_memory_gib
from minigpt.utils.progress import Progress, print_line
from minigpt.utils.run_files import METRICS_FILE, read_metrics

TRACKERS = ("tensorboard", "wandb", "trackio")


def requested_trackers(report_to: list[str]) -> list[str]:
    """The trackers in `report_to`; 'all' means every one installed. Raises UserError if a package is missing."""
    installed = [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    if "none" in report_to:
        return []
    if "all" in report_to:
        return installed
    for name in report_to:
        if name not in installed:
            raise UserError(f"report_to={name}: the package {name} is not installed; try: pip install {name}")
    return list(report_to)


class TrainingLog:
    """Every metric of a run goes through here: to metrics.jsonl, the trackers and the screen.

    Metric names: `train/loss` (nats per token), `train/lr`, `train/grad_norm` (before clipping), `train/mfu`,
    `train/tokens_per_sec`, `train/peak_memory_gib`, `val/...` and `hellaswag/...`. A terminal also has a progress bar.
    """

    def __init__(
        self,
        args: Arguments,
        state: TrainingState,
        accelerator: Accelerator,
        flops_per_token: float,
        optional_files: OptionalFiles,
    ) -> None:
        self.args, self.accelerator = args, accelerator
        self.flops_per_token, self.optional_files = flops_per_token, optional_files
        self.path = args.run_dir / METRICS_FILE
        self._last_tokens, self._last_elapsed_s = state.tokens_seen, state.elapsed_s
        is_compiled = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        self._compiles_since = time.perf_counter() if is_compiled else None
        if accelerator.is_main_process:
            forget_after(self.path, state.step)
        if accelerator.log_with:
            name = args.run_name or args.run_dir.resolve().name
            settings = {
                "tensorboard": {"purge_step": state.step + 1},
                "wandb": {"name": name, "id": state.run_id, "resume": "allow", "dir": str(args.run_dir)},
                "trackio": {"name": f"{name}-{state.run_id}", "resume": "allow"},
            }
            accelerator.init_trackers("minigpt", init_kwargs=settings)
            if accelerator.is_main_process:
                for tracker in accelerator.trackers:
                    if tracker.name != "tensorboard":  # event files are published, and options name local folders
                        tracker.store_init_configuration(_plain(vars(args)))
        self.progress = Progress(
            "training",
            state.max_steps,
            "step",
            initial=state.step,
            delay=0,
            plain=False,
            enabled=accelerator.is_main_process,
        )

    def due(self, state: TrainingState) -> bool:
        return state.step == 1 or state.is_due(self.args.logging_steps)

    def training(self, state: TrainingState, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Log one step: its loss (nats per token, over all ranks), gradient norm before clipping, and speed."""
        metrics = {"train/loss": loss, "train/lr": learning_rate, "train/grad_norm": grad_norm}
        seconds, tokens = state.elapsed_s - self._last_elapsed_s, state.tokens_seen - self._last_tokens
        tokens_per_sec = tokens / seconds if seconds > 0 else math.nan
        metrics["train/tokens_per_sec"] = tokens_per_sec
        metrics["train/peak_memory_gib"] = peak_memory_gib(self.accelerator.device)
        peak = peak_flops(self.accelerator.device)
        if peak is not None:
            metrics["train/mfu"] = tokens_per_sec * self.flops_per_token / (peak * self.accelerator.num_processes)
        self._last_tokens, self._last_elapsed_s = state.tokens_seen, state.elapsed_s
        self.record(state, metrics)
        speed = f"{format_count(tokens_per_sec)} tokens/s"
        memory = f"{metrics['train/peak_memory_gib']:.1f} GiB"
        self.progress.set_total(state.max_steps)
        self.progress.set_status(f"loss {loss:.4f}, {speed}, {memory}")
        self.print(self._progress_line(state, metrics))

    def evaluation(self, state: TrainingState, metrics: dict[str, float], is_best: bool) -> None:
        """Log the metrics of evaluations: `val/...`, `hellaswag/...`, or both."""
        self.record(state, metrics)
        if "val/loss" in metrics:
            parts = [f"loss {metrics['val/loss']:.4f}", f"perplexity {metrics['val/perplexity']:.2f}"]
            if "val/bits_per_byte" in metrics:
                parts.append(f"{metrics['val/bits_per_byte']:.3f} bits per byte")
            self.print(f"  validation: {', '.join(parts)}{' (best so far)' if is_best else ''}")
        if "hellaswag/acc" in metrics:
            acc, acc_norm = metrics["hellaswag/acc"], metrics["hellaswag/acc_norm"]
            self.print(f"  HellaSwag: accuracy {acc:.1%}, normalized by bytes {acc_norm:.1%}")

    def samples(self, state: TrainingState, texts: dict[str, str]) -> None:
        """Print sample texts by prompt, and send them to the trackers that take text."""
        for prompt, text in texts.items():
            indented = text.strip("\n").replace("\n", "\n  | ")
            self.print(f"  sample from {prompt!r}:\n  | {indented}")
        if self.accelerator.is_main_process and self.accelerator.trackers:
            self.optional_files.write("samples of the trackers", LINE_BYTES, lambda: self._track_samples(state, texts))

    def _track_samples(self, state: TrainingState, texts: dict[str, str]) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                for number, text in enumerate(texts.values()):
                    tracker.writer.add_text(f"samples/{number}", f"    {text}".replace("\n", "\n    "), state.step)
            elif tracker.name == "wandb":
                rows = [[state.step, prompt, text] for prompt, text in texts.items()]
                tracker.log_table("samples", ["step", "prompt", "text"], rows, step=state.step)
            else:
                tracker.log({f"samples/{number}": text for number, text in enumerate(texts.values())}, step=state.step)

    def record(self, state: TrainingState, metrics: dict[str, float]) -> None:
        """Write one line of metrics.jsonl, and the same to every tracker, without NaN and infinities."""
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self.accelerator.is_main_process:  # the trackers of the other ranks do nothing
            line = json.dumps({"step": state.step, "elapsed_s": round(state.elapsed_s, 3), **metrics})
            self.optional_files.write("metrics", LINE_BYTES, lambda: append_line(self.path, line))
            self.optional_files.write(
                "entries of the trackers", LINE_BYTES, lambda: self.accelerator.log(metrics, step=state.step)
            )

    def step_done(self) -> None:
        """Move the progress bar on by one step. The first step of a compiled model is reported with its time."""
        if self._compiles_since is not None:
            seconds = time.perf_counter() - self._compiles_since
            self.print(f"  the first step took {seconds:.1f} s, with compilation")
            self._compiles_since = None
        self.progress.update()

    def close(self) -> None:
        """Remove the progress bar and close the trackers."""
        self.progress.close()
        self.optional_files.write("entries of the trackers", 0, self.accelerator.end_training)

    def print(self, text: str) -> None:
        """Print on the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            print_line(text)

    def _progress_line(self, state: TrainingState, metrics: dict[str, float]) -> str:
        width = len(str(state.max_steps))
        seconds_left = (state.max_steps - state.step) * state.elapsed_s / state.step
        mfu = f" | mfu {metrics['train/mfu']:.1%}" if "train/mfu" in metrics else ""
        return (
            f"step {state.step:>{width}}/{state.max_steps} | loss {metrics['train/loss']:.4f} "
            f"| lr {metrics['train/lr']:.2e} | {format_count(metrics['train/tokens_per_sec'])} tokens/s{mfu} "
            f"| {metrics['train/peak_memory_gib']:.1f} GiB | {format_duration(seconds_left)} left"
        )


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that come after `step`: a resumed run writes them again."""
    if path.exists():
        lines = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        write_atomically(path, "".join(lines))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values that the configuration of every tracker accepts."""
    return {
        key: value if isinstance(value, str | int | float | bool) else str(value)
        for key, value in values.items()
        if value is not None
    }
