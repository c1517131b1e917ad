"""Measure models on tasks with the Python API of lm-evaluation-harness, next to each other.

    pip install lm_eval
    python examples/lm_evaluation_harness.py runs/quickstart runs/mine --tasks capitals --include_path my_tasks

`my_tasks/capitals.yaml` is a task of your own; without --include_path only those of the harness are known:

    task: capitals
    dataset_path: json
    dataset_kwargs: {data_files: {validation: my_tasks/capitals.jsonl}}
    validation_split: validation
    output_type: multiple_choice
    doc_to_text: "{{question}}"
    doc_to_choice: choices
    doc_to_target: label
    metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]

A line of `my_tasks/capitals.jsonl`:

    {"question": "The capital of France is", "choices": [" Rome", " Paris"], "label": 1}

`minigpt eval --tasks` gives the same numbers. `report["samples"]`, here, has every item with the model's answer.
The models run their own code (trust_remote_code): name only models that you trust.
"""

import argparse

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of runs, or names on the Hub")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--include_path", help="folder with YAML files of further tasks")
    parser.add_argument("--num_fewshot", type=int, help="examples before each item (default: the task's)")
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()
    manager = TaskManager(include_path=args.include_path)
    if unknown := [task for task in args.tasks if task not in manager.all_tasks]:
        parser.error(f"tasks={' '.join(unknown)}: there is no such task; give the folder of yours as --include_path")

    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    for name in args.models:
        try:
            model = HFLM(name, trust_remote_code=True, dtype="float32", device=device, batch_size=args.batch_size)
        except OSError as error:
            parser.error(f"{name}: {str(error).splitlines()[0]}")
        report = simple_evaluate(model, tasks=args.tasks, num_fewshot=args.num_fewshot, task_manager=manager)
        print(name, make_table(report), sep="\n")


if __name__ == "__main__":
    main()
