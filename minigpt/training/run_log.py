"""The log of a run: progress lines, metrics.jsonl and trackers."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from minigpt.config.arguments import Arguments
from minigpt.training.state import TrainingState, is_due
from minigpt.utils.errors import UserError
from minigpt.utils.formatting import format_count, format_duration
from minigpt.utils.hardware import peak_flops, peak_memory_gib
from minigpt.utils.run_files import METRICS_FILE

TRACKERS = ("tensorboard", "wandb", "trackio")


def requested_trackers(report_to: list[str]) -> list[str]:
    """The trackers that `report_to` names; 'all' is every one installed. Raises UserError for a missing package."""
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
    """Everything a run measures goes through here, under the names of DESIGN: `train/…`, `val/…`."""

    def __init__(
        self, args: Arguments, state: TrainingState, accelerator: Accelerator, max_steps: int, flops_per_token: float
    ) -> None:
        self.args, self.accelerator, self.max_steps = args, accelerator, max_steps
        self.flops_per_token = flops_per_token
        self.path = args.run_dir / METRICS_FILE
        self._last_tokens, self._last_elapsed_s = state.tokens_seen, state.elapsed_s
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
                self._tell_options()

    def _tell_options(self) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":  # its own store_init_configuration opens a further run at every start
                tracker.writer.add_text("arguments", "    " + self.args.as_yaml().replace("\n", "\n    "))
            else:
                tracker.store_init_configuration(_plain(vars(self.args)))

    def due(self, state: TrainingState) -> bool:
        return state.step == 1 or is_due(state.step, self.args.logging_steps, self.max_steps)

    def training(self, state: TrainingState, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Log one step: its loss (nats per token, over all processes), gradient norm before clipping, and speed."""
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
        self.say(self._progress_line(state, metrics))

    def evaluation(self, state: TrainingState, metrics: dict[str, float], is_best: bool) -> None:
        """Log what evaluations found: `val/…`, `hellaswag/…`, or both."""
        self.record(state, metrics)
        if "val/loss" in metrics:
            parts = [f"loss {metrics['val/loss']:.4f}", f"perplexity {metrics['val/perplexity']:.2f}"]
            if "val/bits_per_byte" in metrics:
                parts.append(f"{metrics['val/bits_per_byte']:.3f} bits per byte")
            self.say(f"  validation: {', '.join(parts)}{' (best so far)' if is_best else ''}")
        if "hellaswag/acc" in metrics:
            acc, by_bytes = metrics["hellaswag/acc"], metrics["hellaswag/acc_norm"]
            self.say(f"  HellaSwag: accuracy {acc:.1%}, normalised by bytes {by_bytes:.1%}")

    def samples(self, state: TrainingState, texts: dict[str, str]) -> None:
        """Show sample texts by prompt, and hand them to the trackers that take text."""
        for prompt, text in texts.items():
            indented = text.strip("\n").replace("\n", "\n  | ")
            self.say(f"  sample from {prompt!r}:\n  | {indented}")
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            if tracker.name == "tensorboard":
                for number, text in enumerate(texts.values()):
                    tracker.writer.add_text(f"samples/{number}", f"    {text}".replace("\n", "\n    "), state.step)
            elif tracker.name == "wandb":
                rows = [[state.step, prompt, text] for prompt, text in texts.items()]
                tracker.log_table("samples", ["step", "prompt", "text"], rows, step=state.step)
            else:
                tracker.log({f"samples/{number}": text for number, text in enumerate(texts.values())}, step=state.step)

    def record(self, state: TrainingState, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to every tracker; JSON has no word for what is not finite."""
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self.accelerator.is_main_process:
            line = {"step": state.step, "elapsed_s": round(state.elapsed_s, 3), **metrics}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log(metrics, step=state.step)

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def _progress_line(self, state: TrainingState, metrics: dict[str, float]) -> str:
        width = len(str(self.max_steps))
        seconds_left = (self.max_steps - state.step) * state.elapsed_s / state.step
        mfu = f" | mfu {metrics['train/mfu']:.1%}" if "train/mfu" in metrics else ""
        return (
            f"step {state.step:>{width}}/{self.max_steps} | loss {metrics['train/loss']:.4f} "
            f"| lr {metrics['train/lr']:.2e} | {format_count(metrics['train/tokens_per_sec'])} tokens/s{mfu} "
            f"| {metrics['train/peak_memory_gib']:.1f} GiB | {format_duration(seconds_left)} left"
        )


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that come after `step`: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:  # the last line may be cut off by a kill
            kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values that every tracker's configuration takes."""
    return {
        key: value if isinstance(value, str | int | float | bool) else str(value)
        for key, value in values.items()
        if value is not None
    }


def as_float(number: Any) -> float:
    """A number on the host; FSDP2 hands out sharded ones, and what was not measured is 0."""
    whole = number.full_tensor() if hasattr(number, "full_tensor") else number
    return float(whole or 0.0)
