"""Compare the decoding speed of MiniGPT with transformers' GPT-2, and with llama.cpp.

The models have the shape of GPT-2 124M and the same random weights, and decode greedily in turns.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from minigpt.utils.command_line import DTYPES, CommandParser
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench generate`."""
    from minigpt.benchmarks.report import add_device_options, add_report_option, check_options

    modes = ["eager", "loop", "compiled"]
    parser = CommandParser("minigpt bench generate", __doc__)
    add = parser.add_argument
    add("--batch_sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    add("--dtypes", nargs="+", default=DTYPES[:2], choices=DTYPES, help="default: float32 bfloat16")
    add(
        "--modes",
        nargs="+",
        choices=modes,
        help="eager and compiled: `generate`; loop: MiniGPT in the loop of `minigpt generate` on a CPU (default: all)",
    )
    add("--no_packing", action="store_true", help="on a CPU, keep the matrices as from_pretrained loads them")
    add("--new_tokens", type=int, default=48, metavar="N", help="tokens per turn (default: %(default)s)")
    add("--turns", type=int, default=7, metavar="N", help="turns of each model (default: %(default)s)")
    add("--llama_bench", metavar="PATH", help="also measure batch 1 on a CPU with this llama-bench, in the same turns")
    add("--layers", type=int, default=12, help=argparse.SUPPRESS)  # tests use a small model
    add_device_options(parser)
    add_report_option(parser)
    args = parser.parse_args(argv)
    check_options(args, "new_tokens", "turns", "layers", "batch_sizes", "threads")
    return args


def run(args: argparse.Namespace) -> None:
    """Print the table. Raises UserError if the device cannot be used."""
    import torch
    from transformers.utils import logging

    from minigpt.benchmarks.generate import (
        equal_models,
        gguf_file,
        llama_cpp_speed,
        markdown,
        measure,
        memory_bandwidth,
    )
    from minigpt.benchmarks.report import choose_device, write_report
    from minigpt.modeling.packed_linear import pack_linears

    logging.set_verbosity_error()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    modes = args.modes or (["eager", "loop", "compiled"] if device == "cpu" else ["eager", "compiled"])
    if device != "cpu" and ("loop" in modes or args.llama_bench is not None):
        raise UserError(f"device={device}: the mode loop and --llama_bench measure on a CPU only; add --device cpu")
    bandwidth = memory_bandwidth(device)
    rows = []
    for dtype in args.dtypes:
        minigpt, gpt2 = equal_models(dtype, device, args.layers)
        with tempfile.TemporaryDirectory() as folder:
            llama_cpp: Callable[[], float] | None = None
            if args.llama_bench is not None:
                file, threads = gguf_file(minigpt, Path(folder)), torch.get_num_threads()
                llama_cpp = partial(llama_cpp_speed, args.llama_bench, file, args.new_tokens, threads)
            if not args.no_packing:
                pack_linears(minigpt)
            for mode in modes:
                for batch_size in args.batch_sizes:
                    peer = llama_cpp if batch_size == 1 else None
                    rows.append(measure(minigpt, gpt2, mode, batch_size, args.new_tokens, args.turns, llama_cpp=peer))
                    # other load on the machine can only lower a measurement, so the best one counts
                    bandwidth = max(bandwidth, memory_bandwidth(device))
                    print(markdown([rows[-1]], bandwidth).splitlines()[-1], flush=True)
    figures = {"bandwidth_gb_per_s": bandwidth, "rows": [asdict(row) for row in rows]}
    conditions = f"Memory delivers {bandwidth:.1f} GB/s."
    write_report(figures, markdown(rows, bandwidth), device=device, output=args.output, conditions=conditions)
