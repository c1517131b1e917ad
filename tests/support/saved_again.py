"""Resume from a checkpoint and save it again, without a step in between. The options are those of the trainer."""

import sys

import sharding_on_cpu  # noqa: F401

from minigpt.config.parser import parse_arguments
from minigpt.training.run_dir import OutputDir
from train_accelerate import set_up

args = parse_arguments(sys.argv[1:])
with OutputDir(args) as output_dir:
    run = set_up(args, output_dir)
    run.checkpoints.save(run.state, run.model, run.optimizer, run.accelerator, stopping=True)
