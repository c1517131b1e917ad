"""Compare a model in llama.cpp, in ONNX Runtime and in MiniGPT: fidelity, size and decoding speed on the CPU.

The model is exported to each engine's formats in all types. The reference is MiniGPT in float32.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from minigpt.utils.command_line import CommandParser
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench engines`."""
    from minigpt.benchmarks.report import add_report_option, check_options

    parser = CommandParser("minigpt bench engines", __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="MiniGPT folder (a run or a checkpoint) or Hub name")
    add("--text_file", type=Path, required=True, metavar="FILE", help="UTF-8 text for the fidelity and the prompts")
    add("--window_tokens", type=int, default=64, metavar="N", help="of the five parts of the text (default: 64)")
    add("--new_tokens", type=int, default=48, metavar="N", help="tokens per turn (default: %(default)s)")
    add("--turns", type=int, default=7, metavar="N", help="turns of each engine (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--llama_bench", metavar="PATH", help="also measure with this llama-bench, built for this machine")
    add_report_option(parser)
    args = parser.parse_args(argv)
    check_options(args, "new_tokens", "turns", "threads")
    if args.window_tokens < 2:
        raise UserError(f"window_tokens={args.window_tokens} must be at least 2")
    return args


def run(args: argparse.Namespace) -> None:
    """Print the table. Raises UserError if a package is missing, or the model or the text cannot be used."""
    import torch

    try:
        onnxruntime, xllamacpp = version("onnxruntime"), version("xllamacpp")
    except PackageNotFoundError as error:
        raise UserError(f"this needs the {error.name} package: pip install onnxruntime xllamacpp") from error
    from minigpt.benchmarks.engines import compare, llama_bench, load_engines, markdown, sample_windows
    from minigpt.benchmarks.report import write_report
    from minigpt.export.source import load_source

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        source = load_source(args.model, "other engines")
        windows = sample_windows(source, args.text_file, args.window_tokens, args.new_tokens)
        engines = load_engines(args.model, source, Path(folder), threads)
        rows = compare(engines, source.tokenizer, windows, args.new_tokens, args.turns)
        if args.llama_bench is not None:
            files = sorted(Path(folder).glob("*.gguf"))
            rows += [llama_bench(args.llama_bench, file, args.new_tokens, args.turns, threads) for file in files]
    conditions = (
        f"{args.model}, {args.new_tokens} new tokens after {args.window_tokens // 2}, {args.turns} turns; onnxruntime "
        f"{onnxruntime}, xllamacpp {xllamacpp}."
    )
    figures = {"rows": [asdict(row) for row in rows]}
    write_report(figures, markdown(rows), device="cpu", output=args.output, conditions=conditions)
