"""Tasks of lm-evaluation-harness, with a model of this package."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minigpt.utils.errors import UserError, first_line

SHOWN = ("acc", "acc_norm", "exact_match", "f1", "bleu", "word_perplexity", "bits_per_byte")  # in tables


def check_tasks(names: Sequence[str], task_path: Path | None) -> Any:
    """The task manager of the harness. Raises UserError if it is not installed, or does not know a task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("tasks need lm-evaluation-harness: pip install 'minigpt-lm[tasks]'") from error
    manager = TaskManager(include_path=str(task_path) if task_path else None)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"tasks={name}: lm-evaluation-harness has no such task; `lm_eval ls tasks` lists them")
    return manager


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: Any,
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """What the harness reports: `results` by task, `versions`, `n-shot`, and `samples`, item by item.

    num_fewshot: None is what each task has. Raises UserError if the data of a task cannot be loaded.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=batch_size)
    try:
        report = simple_evaluate(
            language_model,
            tasks=list(names),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=True,
            bootstrap_iters=1000,
        )
    except (OSError, ValueError) as error:  # datasets raises both for data that it cannot find
        raise UserError(f"tasks={' '.join(names)}: {first_line(error)}") from error
    assert report is not None
    return dict(report)


class TaskResult(NamedTuple):
    """One metric of a task. `shots` is the number of examples before each item; `stderr` is None if it is unknown."""

    task: str
    shots: str
    metric: str
    value: float
    stderr: float | None


def rows(report: dict[str, Any]) -> Iterator[TaskResult]:
    """The metrics that are usually published."""
    for task, metrics in report["results"].items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if comma and metric in SHOWN and isinstance(value, int | float):
                error = metrics.get(f"{metric}_stderr,{filtered}")
                shots = str(report["n-shot"].get(task, ""))
                yield TaskResult(task, shots, metric, float(value), error if isinstance(error, float) else None)
