"""Compare the training speed of MiniGPT with nanoGPT and transformers' Trainer.

The trainers take turns, each turn in a process of its own. Ratios are taken turn by turn, so that other load on the
machine affects all trainers alike.

trainers:
  minigpt        train_accelerate.py
  minigpt-ddp    the same on two processes, each with half of the batch
  bare           MiniGPT's model in a minimal training loop
  nanogpt        the model and optimizer of --nanogpt, as shipped (float32 on a CPU, bfloat16 on a GPU)
  nanogpt-bf16   the same with bfloat16 autocast; on a GPU nanogpt already uses it, so this one is skipped
  transformers   GPT-2 under transformers' Trainer
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from minigpt.utils.command_line import CommandParser
from minigpt.utils.errors import UserError

SHAPE_OPTIONS = ("layers", "heads", "hidden", "vocab_size", "block_size", "batch_size")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench train`."""
    from minigpt.benchmarks.report import (
        add_device_options,
        add_nanogpt_option,
        add_report_option,
        check_nanogpt,
        check_options,
    )
    from minigpt.benchmarks.train import SHAPES, SINGLE_PROCESS_TRAINERS, TRAINERS

    parser = CommandParser("minigpt bench train", __doc__)
    add = parser.add_argument
    add(
        "--shape",
        choices=sorted(SHAPES),
        default="124m",
        help="GPT-2 124M with 12 samples per batch on a GPU and 1 on a CPU, or nanoGPT's recipe for a CPU "
        "(default: 124m)",
    )
    for name in SHAPE_OPTIONS:
        add(f"--{name}", type=int, metavar="N", help="default: as in --shape")
    add("--trainers", nargs="+", choices=TRAINERS, metavar="T", help="default: all with a single process")
    add_nanogpt_option(parser)
    add(
        "--mixed_precision",
        choices=["no", "bf16"],
        default="bf16",
        help="precision of every trainer except nanogpt (default: %(default)s)",
    )
    add("--compile", action="store_true", help="compile every model")
    add(
        "--gradient_checkpointing",
        choices=["no", "selective", "full"],
        default="no",
        help="for minigpt only (default: no)",
    )
    add("--turns", type=int, default=5, metavar="N", help="turns of each trainer (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="timed steps per turn (default: 50 on a GPU, else 4)")
    add("--warmup", type=int, metavar="N", help="steps before the timed ones (default: 20 on a GPU, else 2)")
    add_device_options(parser)
    add_report_option(parser)
    args = parser.parse_args(argv)

    check_options(args, *SHAPE_OPTIONS, "turns", "steps", "warmup", "threads")
    args.trainers = args.trainers or [
        trainer for trainer in SINGLE_PROCESS_TRAINERS if args.nanogpt or not trainer.startswith("nanogpt")
    ]
    if "minigpt" not in args.trainers:
        raise UserError("trainers must contain minigpt: the ratios are relative to it")
    if any(trainer.startswith("nanogpt") for trainer in args.trainers):
        check_nanogpt(args.nanogpt, "give a checkout of nanoGPT, or other --trainers")
    return args


def run(args: argparse.Namespace) -> None:
    """Print the table. Raises UserError if the device cannot be used, or the batch cannot be divided."""
    import torch

    from minigpt.benchmarks.report import choose_device, write_report
    from minigpt.benchmarks.train import (
        GPU_BATCH_SIZE,
        SHAPES,
        Options,
        Turn,
        describe,
        markdown,
        summarize,
        take_turn,
    )
    from minigpt.utils.hardware import matrix_product_flops, peak_flops

    device = choose_device(args.device)
    on_gpu = device == "cuda"
    changed = {name: getattr(args, name) for name in SHAPE_OPTIONS if getattr(args, name) is not None}
    if on_gpu and args.shape == "124m":
        changed = {"batch_size": GPU_BATCH_SIZE} | changed
    shape = replace(SHAPES[args.shape], **changed)
    trainers = args.trainers
    if on_gpu and "nanogpt" in trainers:
        trainers = [trainer for trainer in trainers if trainer != "nanogpt-bf16"]
    if "minigpt-ddp" in trainers and shape.batch_size % 2:
        raise UserError("minigpt-ddp divides the batch between two processes; give an even --batch_size")
    options = Options(
        device=device,
        mixed_precision=args.mixed_precision,
        compile=args.compile,
        gradient_checkpointing=args.gradient_checkpointing,
        steps=args.steps or (50 if on_gpu else 4),
        warmup=args.warmup or (20 if on_gpu else 2),
        threads=args.threads,
        nanogpt=args.nanogpt,
    )
    data_sheet_flops = peak_flops(torch.device(device)) if args.mixed_precision == "bf16" else None
    product_flops = matrix_product_flops(options.device, options.mixed_precision == "bf16", options.threads)
    turns: dict[str, list[Turn]] = {trainer: [] for trainer in trainers}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, args.turns + 1):
            for trainer in trainers:
                turn = take_turn(trainer, shape, options, Path(folder))
                turns[trainer].append(turn)
                step_ms = statistics.median(turn.seconds) * 1e3
                print(f"turn {number} of {args.turns}, {trainer}: {step_ms:.3f} ms per step", flush=True)
    rows = summarize(turns, shape, product_flops, data_sheet_flops)
    figures = {
        "shape": asdict(shape),
        "options": asdict(options),
        "matrix_product_flops": product_flops,
        "data_sheet_flops": data_sheet_flops,
        "rows": [asdict(row) for row in rows],
        "turns": {trainer: [asdict(turn) for turn in its_turns] for trainer, its_turns in turns.items()},
    }
    conditions = describe(shape, options, product_flops, data_sheet_flops)
    write_report(figures, markdown(rows), device=options.device, output=args.output, conditions=conditions)
