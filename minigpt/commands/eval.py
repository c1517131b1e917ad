"""Loss, perplexity and bits per byte over a whole text, or over the answers in conversations; or published tasks.

minigpt eval --model runs/mine --text_file my.txt
minigpt eval --model runs/mine --tasks arc_easy,piqa --output runs/mine/evaluations/tasks.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.utils.command_line import (
    CommandParser,
    add_model_options,
    check_output_file,
    check_positive,
    write_result,
)
from minigpt.utils.errors import UserError
from minigpt.utils.files import write_atomically
from minigpt.utils.formatting import markdown_table

if TYPE_CHECKING:
    from accelerate import Accelerator

    from minigpt.data.chat import Example


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt eval`."""
    parser = CommandParser("minigpt eval", __doc__)
    add = parser.add_argument
    add_model_options(parser, several_models=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DIR", help="folder of prepared token shards")
    source.add_argument(
        "--text_file", type=Path, metavar="FILE", help="UTF-8 text, encoded with the tokenizer of each model"
    )
    source.add_argument(
        "--conversations",
        metavar="FILE",
        help="conversations or prompts with completions, as JSON lines, or python-chat: the loss of the answers, and "
        "the share that the model gives exactly",
    )
    source.add_argument(
        "--tasks",
        type=lambda names: [name for name in names.split(",") if name],
        metavar="NAME,NAME",
        help="tasks of lm-evaluation-harness, such as arc_easy,piqa",
    )
    add("--task_path", type=Path, metavar="DIR", help="folder with YAML files of further tasks, of local data too")
    add("--num_fewshot", type=int, metavar="N", help="examples before each item of --tasks (default: the task's)")
    add("--items", metavar="FILE", help="write each answer to --conversations or --tasks to this file, as JSON lines")
    add("--limit", type=int, metavar="N", help="use only the first N conversations, or items of a task (default: all)")
    add("--split", choices=["validation", "train"], default="validation", help="split of --data (default: validation)")
    add("--block_size", type=int, metavar="N", help="tokens per window (default: the longest context of the model)")
    add("--stride", type=int, metavar="N", help="tokens between the starts of windows (default: block_size)")
    add("--batch_size", type=int, default=8, metavar="N", help="windows per batch and process (default: %(default)s)")
    add("--use_cpu", action="store_true", help="use the CPU even if there is an accelerator")
    add("--json", action="store_true", help="print JSON instead of a table")
    add(
        "--output",
        metavar="FILE",
        help="also write the results to this file, as JSON; the model card shows those of --tasks in "
        "RUN/evaluations/tasks.json",
    )
    args = parser.parse_args(argv)
    check_positive(args, "block_size", "stride", "batch_size", "limit")
    check_output_file(args, "output", "items")
    for name in ("items", "limit"):
        if getattr(args, name) is not None and args.conversations is None and args.tasks is None:
            raise UserError(f"{name}={getattr(args, name)} requires --conversations or --tasks")
    for name in ("task_path", "num_fewshot"):
        if getattr(args, name) is not None and args.tasks is None:
            raise UserError(f"{name}={getattr(args, name)} requires --tasks")
    if args.task_path is not None and not args.task_path.is_dir():
        raise UserError(f"task_path={args.task_path} is no folder")
    if args.tasks is not None and len(args.model) > 1:
        raise UserError("--tasks takes one model; give one --model")
    if args.items is not None and len(args.model) > 1:
        raise UserError("--items holds the answers of one model; give one --model")
    return args


def run(args: argparse.Namespace) -> None:
    """`minigpt eval`; under `accelerate launch -m minigpt eval ...` all processes share the windows.

    Raises UserError if a model cannot be loaded, or if it, its tokenizer and the text do not fit together.
    """
    import torch
    from accelerate import Accelerator
    from transformers.utils import logging

    from minigpt.evaluation.conversations import read_conversations

    if args.tasks is not None:
        run_tasks(args)
        return
    logging.set_verbosity_error()  # otherwise transformers warns about every text longer than the context
    accelerator = Accelerator(cpu=args.use_cpu or not torch.accelerator.is_available())
    conversations = read_conversations(args.conversations, args.limit) if args.conversations else []
    results = {name: evaluate(name, conversations, args, accelerator) for name in args.model}
    if accelerator.is_main_process:
        print(json.dumps(results, indent=2) if args.json else results_table(results))
        if args.output:
            record = {"text": args.data or args.conversations or str(args.text_file), "results": results}
            write_result(args.output, record)


def run_tasks(args: argparse.Namespace) -> None:
    """`--tasks`. Raises UserError if the harness is not installed, or a task or its data cannot be found."""
    from transformers.utils import logging

    from minigpt.data.tokenizer import load_tokenizer
    from minigpt.evaluation.tasks import check_tasks, evaluate_tasks, rows
    from minigpt.modeling.loading import find_model, load_model

    logging.set_verbosity_error()
    manager = check_tasks(args.tasks, args.task_path)
    source = find_model(args.model[0])
    tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code)
    device = "cpu" if args.use_cpu else None
    model = load_model(source, dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code, pack=True)
    report = evaluate_tasks(
        model,
        tokenizer,
        args.tasks,
        manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
    )
    found = list(rows(report))
    if args.items:
        items = [{"task": task, **item} for task, answered in report["samples"].items() for item in answered]
        write_atomically(Path(args.items), "".join(json.dumps(item, default=str) + "\n" for item in items))
    results = [row._asdict() for row in found]
    if args.output:
        record = {"model": args.model[0], "tasks": results, "versions": report["versions"]}
        write_result(args.output, record)
    cells = [(row.task, row.shots, row.metric, f"{row.value:.4f}", f"{row.stderr or 0:.4f}") for row in found]
    table = markdown_table(("task", "shots", "metric", "value", "± (se)"), cells)
    print(json.dumps(results, indent=2) if args.json else table)


def evaluate(
    name: str, conversations: "list[Example]", args: argparse.Namespace, accelerator: "Accelerator"
) -> dict[str, float]:
    """The metrics of one model. Raises UserError as `run`."""
    from minigpt.data.tokenizer import load_tokenizer
    from minigpt.evaluation.conversations import answer_questions, assistant_words, exact_match, give_plain_template
    from minigpt.evaluation.perplexity import evaluate_model, read_split, read_text_file
    from minigpt.modeling.loading import find_model, load_model

    source = find_model(name)
    tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code)
    if conversations:
        if give_plain_template(tokenizer) and accelerator.is_main_process:
            print(f"({name} has no chat template; using plain)", file=sys.stderr)
        text = assistant_words(conversations, tokenizer)
    elif args.text_file is not None:
        text = read_text_file(args.text_file, tokenizer)
    else:
        text = read_split(args.data, args.split, tokenizer)
    model = load_model(
        source, dtype=args.dtype, device=accelerator.device, trust_remote_code=args.trust_remote_code, pack=True
    )
    score = evaluate_model(
        model,
        text,
        block_size=args.block_size,
        stride=args.stride,
        batch_size=args.batch_size,
        accelerator=accelerator,
        description=name,
    )
    if not conversations:
        return score.as_dict()
    answers = answer_questions(model, tokenizer, conversations, args.batch_size, accelerator)
    if args.items and accelerator.is_main_process:
        records = [{**vars(answer), "exact": answer.is_exact} for answer in answers]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_atomically(Path(args.items), "\n".join(lines) + "\n")
    return score.as_dict() | exact_match(answers)


def results_table(results: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown table, one row per model."""
    head = ("model", "loss", "± (se)", "perplexity", "word ppl", "bits/byte", "tokens")
    rows = [
        (
            name,
            f"{result['loss']:.4f}",
            f"{result['standard_error']:.4f}",
            f"{result['perplexity']:.3f}",
            f"{result['word_perplexity']:.2f}",
            f"{result['bits_per_byte']:.4f}",
            f"{result['tokens']:,}",
        )
        for name, result in results.items()
    ]
    table = markdown_table(head, rows, numeric=True)
    kinds = [metric for metric in next(iter(results.values())) if metric.startswith("exact_match")]
    if not kinds:
        return table
    kind_head = (
        "model",
        *(kind.removeprefix("exact_match/").replace("exact_match", "exact answers") for kind in kinds),
    )
    shares = [(name, *(f"{result[kind]:.1%}" for kind in kinds)) for name, result in results.items()]
    return f"{table}\n\n{markdown_table(kind_head, shares, numeric=True)}"
