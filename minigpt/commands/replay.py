"""Replay a step that was skipped because its gradient was not finite, and print what is not finite first."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import DTYPES, CommandParser
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt replay`."""
    parser = CommandParser("minigpt replay", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="skipped_steps/step-<step>/replay.json of a run")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of autocast; float32 turns it off (default: %(default)s)",
    )
    parser.add_argument("--device", help="default: the accelerator of this machine, else the CPU")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Replay the step and print what is not finite.

    Raises UserError if the record, its data, its weights or the device cannot be used.
    """
    import torch

    from minigpt.config.parser import parse_arguments
    from minigpt.data.datamodule import load_data, open_data_module
    from minigpt.data.prepare import cache_folder
    from minigpt.modeling.loading import load_model
    from minigpt.modeling.lora import add_adapter, load_adapter_weights
    from minigpt.training.nonfinite import StepRecord
    from minigpt.training.replay import ReplayedStep
    from minigpt.utils.run_files import ARGUMENTS_FILE
    from modeling_minigpt import MiniGPTForCausalLM

    record, folder = StepRecord.load(args.file), args.file.absolute().parent
    options = parse_arguments([str(folder / ARGUMENTS_FILE)], program="minigpt replay")
    shards, tokenizer = load_data(options)
    if shards.fingerprint != record.data_fingerprint:
        raise UserError(f"{args.file}: the data of the run have changed since; restore them to replay the step")
    model = load_model(
        options.model_name_or_path if options.use_peft and options.model_name_or_path else folder,
        dtype=torch.float32,
        device=args.device,
        attn_implementation=options.attn_implementation,
        allow_nonfinite=True,  # to find where they come from
    )
    assert isinstance(model, MiniGPTForCausalLM)
    if options.use_peft:
        add_adapter(model, options)
        load_adapter_weights(model, folder)
    samples = open_data_module(options, shards, tokenizer.eos_token_id, cache_folder(options)).train
    try:
        samples.target_count(record.samples)
    except IndexError as error:
        raise UserError(f"{args.file}: its samples are outside the data: {error}") from error
    step = ReplayedStep(model.train(), samples, options, record, getattr(torch, args.dtype))
    with step.watched():
        loss, grad_norm = step.run()
    print(f"step {record.step + 1}: loss {loss:.6f} nats per token, gradient norm {grad_norm:.6f}")
    for finding in step.findings(tokenizer):
        print(finding)
