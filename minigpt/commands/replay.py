"""Replay a training step that was skipped because its gradient was not finite."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.errors import CommandParser, UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt replay`."""
    parser = CommandParser("minigpt replay", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="bad_steps/step-<step>/replay.json of a run")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="autocast to it"
    )
    parser.add_argument("--device", help="default: a GPU if there is one, else the CPU")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """`minigpt replay`. Raises UserError where the record, its data or its weights are not what they were."""
    import torch

    from minigpt.config.parser import parse_arguments
    from minigpt.data.datamodule import load_data, open_data_module
    from minigpt.training.nonfinite import read_record
    from minigpt.training.replay import Step
    from minigpt.utils.run_files import ARGUMENTS_FILE
    from modeling_minigpt import MiniGPTForCausalLM

    record, folder = read_record(args.file), args.file.parent
    options = parse_arguments([str(folder / ARGUMENTS_FILE)], folder / ARGUMENTS_FILE)
    shards, tokenizer = load_data(options)
    if shards.fingerprint != record["data_fingerprint"]:
        raise UserError(f"the data of {args.file} are not the same any more; the step cannot be run again")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = MiniGPTForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=options.attn_implementation
    )
    samples = open_data_module(options, shards, tokenizer.eos_token_id).train
    step = Step(model.to(device).train(), samples, options, record, getattr(torch, args.dtype))
    with step.watched():
        loss, grad_norm = step.run()
    print(f"step {record['step'] + 1}: loss {loss:.6f} nats per token, gradient norm {grad_norm:.6f}")
    for line in step.findings(tokenizer):
        print(line)
