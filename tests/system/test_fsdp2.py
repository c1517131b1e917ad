"""Laws of sharded training (FSDP2): one rank and two sharded ranks resume from each other's checkpoints."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import Arguments, OptimizerArguments
from minigpt.data.samples import Batch, Samples
from minigpt.modeling.activation_checkpointing import enable_activation_checkpointing
from minigpt.optim.optimizer import build_optimizer
from minigpt.training.checkpoint import Checkpoints
from minigpt.training.periodic import ValidationLoss
from minigpt.training.resume import restore_optimizer
from minigpt.training.state import TrainingState
from minigpt.utils.run_files import find_checkpoints
from modeling_minigpt import MiniGPTForCausalLM

FULL = StateDictOptions(full_state_dict=True)


class FakeAccelerator:
    """The part of an Accelerator that saving, loading and evaluation use."""

    scaler = None
    device = torch.device("cpu")

    def __init__(self, rank: int, processes: int = 1) -> None:
        self.process_index, self.num_processes, self.is_main_process = rank, processes, rank == 0

    def reduce(self, numbers: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        torch.distributed.all_reduce(numbers)
        return numbers

    def unwrap_model(self, model: nn.Module, **_: Any) -> nn.Module:
        return model

    def wait_for_everyone(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


class FiveTexts(Samples):
    """An odd number: with one text per batch, one of two ranks has one batch more."""

    def __getitems__(self, sample_ids: list[int]) -> Batch:
        ids = torch.stack(
            [torch.randint(0, 32, (17,), generator=torch.Generator().manual_seed(n)) for n in sample_ids]
        )
        return {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:].contiguous()}

    def target_count(self, sample_ids: Sequence[int]) -> int:
        return 16 * len(sample_ids)

    def full_pass(self) -> range:
        return range(5)


def new_model() -> MiniGPTForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    return MiniGPTForCausalLM(MiniGPTConfig(vocab_size=32, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **shape))


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The same batch on every rank, so the mean over the ranks is the gradient of one."""
    for step in steps:
        ids = torch.randint(0, 32, (4, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: FakeAccelerator
) -> None:
    args = Arguments(train_file=["text.txt"], output_dir=str(run_dir), save_total_limit=None)
    checkpoints = Checkpoints(args, Tokenizer(), 10)
    checkpoints.save(TrainingState(step=step), model, optimizer, accelerator)  # type: ignore[arg-type]


def resume_sharded(rank: int, port: int, start: Path, run_dir: Path, args: OptimizerArguments) -> None:
    """One of two ranks: load `start` into a sharded model, take a step, save."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo")
    weights = MiniGPTForCausalLM.from_pretrained(start).state_dict()
    model, mesh = new_model(), init_device_mesh("cpu", (2,))
    enable_activation_checkpointing(model, "selective")
    for layer in model.transformer.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    set_model_state_dict(model, weights, options=FULL)
    optimizer = build_optimizer(model, args, torch.device("cpu"))
    accelerator = FakeAccelerator(rank, 2)
    restore_optimizer(start, TrainingState(), model, optimizer, accelerator)  # type: ignore[arg-type]
    state = optimizer.state[model.transformer.layers[0].mlp.up_proj.weight]
    moment = state["momentum" if args.optimizer == "muon" else "exp_avg"]
    assert moment.to_local().numel() == moment.numel() // 2, "the moments are not sharded"
    evaluation = ValidationLoss(FiveTexts(), batch_size=1, eval_steps=0, max_steps=10)
    unsharded = MiniGPTForCausalLM.from_pretrained(start)
    expected = evaluation.run(unsharded, FakeAccelerator(0))  # type: ignore[arg-type]
    assert abs(evaluation.run(model, accelerator)["val/loss"] - expected["val/loss"]) < 1e-6  # type: ignore[arg-type]
    take_steps(model, optimizer, range(3, 4))
    save(run_dir, 4, model, optimizer, accelerator)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_rank_and_two_sharded_ranks_resume_from_each_others_checkpoints(tmp_path: Path, name: str) -> None:
    args = OptimizerArguments(optimizer=name)
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    model = new_model()
    optimizer = build_optimizer(model, args, torch.device("cpu"))
    take_steps(model, optimizer, range(3))
    alone.mkdir()
    sharded.mkdir()
    save(alone, 3, model, optimizer, FakeAccelerator(0))
    take_steps(model, optimizer, range(3, 4))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (start,) = find_checkpoints(alone)
    torch.multiprocessing.spawn(resume_sharded, (port, start, sharded, args), nprocs=2)

    (end,) = find_checkpoints(sharded)
    returned = MiniGPTForCausalLM.from_pretrained(end)
    for (name, one), two in zip(model.named_parameters(), returned.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-6), name  # float32 sums in another order
    restored = build_optimizer(returned, args, torch.device("cpu"))
    restore_optimizer(end, TrainingState(), returned, restored, FakeAccelerator(0))  # type: ignore[arg-type]
    for one, two in zip(model.parameters(), returned.parameters(), strict=True):
        assert optimizer.state[one].keys() == restored.state[two].keys()
        for moment, value in optimizer.state[one].items():
            assert torch.allclose(value, restored.state[two][moment], rtol=0, atol=1e-6), moment
    take_steps(model, optimizer, range(4, 6))
    take_steps(returned.train(), restored, range(4, 6))
    for one, two in zip(model.parameters(), returned.parameters(), strict=True):
        # AdamW divides by the root of a second moment that may be as small as the difference of the sums
        assert torch.allclose(one, two, rtol=0, atol=1e-5)
