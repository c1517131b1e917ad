"""One turn of the training benchmark, in its own process.

python -m minigpt.benchmark_turn '{"way": "nanogpt", ...}'      prints one line of JSON

Every way trains the same shape on the same random tokens with AdamW and clipped gradients: `bare` is our model in
twenty lines, `nanogpt` the model and optimizer of the user's own checkout, `transformers` GPT-2 under Trainer.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from configuration_minigpt import MiniGPTConfig
from minigpt.modeling.gpt2 import gpt2_config
from minigpt.modeling.loss import in_place_cross_entropy
from minigpt.utils.hardware import peak_memory_gib
from minigpt.utils.malloc import keep_freed_memory
from modeling_minigpt import MiniGPTForCausalLM

LEARNING_RATE, BETAS, WEIGHT_DECAY = 6e-4, (0.9, 0.95), 0.1


@dataclass(frozen=True)
class Turn:
    """What is trained, and for how long."""

    way: str
    layers: int
    heads: int
    hidden: int
    vocab_size: int
    block_size: int
    batch_size: int
    bf16: bool
    compile: bool
    device: str
    steps: int  # timed ones; `warmup` steps before them are not counted
    warmup: int
    threads: int | None = None
    nanogpt: str | None = None


def config_of(shape: dict[str, int]) -> MiniGPTConfig:
    """GPT-2 in a shape of `minigpt bench train`, without dropout."""
    return MiniGPTConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_position_embeddings=shape["block_size"],
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
    )


def step_seconds(turn: Turn) -> list[float]:
    """Seconds of every timed step."""
    torch.manual_seed(0)
    if turn.way == "transformers":
        return _trainer(turn)
    model, optimizer, loss_of = (_nanogpt if turn.way == "nanogpt" else _bare)(turn)
    if turn.compile:
        model.compile()
    tokens = torch.randint(turn.vocab_size, (turn.batch_size * turn.block_size * 8 + 1,))
    seconds = []
    for step in range(turn.warmup + turn.steps):
        begin = time.perf_counter()
        starts = torch.randint(len(tokens) - turn.block_size, (turn.batch_size,)).tolist()
        inputs, targets = (
            torch.stack([tokens[start + shift : start + shift + turn.block_size] for start in starts]).to(turn.device)
            for shift in (0, 1)
        )
        with torch.autocast(turn.device, torch.bfloat16, enabled=turn.bf16):
            loss = loss_of(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        if step >= turn.warmup:
            seconds.append(time.perf_counter() - begin)
    return seconds


def _bare(turn: Turn) -> tuple[nn.Module, torch.optim.Optimizer, Callable[..., torch.Tensor]]:
    if turn.device == "cpu":
        keep_freed_memory()
    model = MiniGPTForCausalLM(config_of(vars(turn))).to(turn.device).train()
    model.loss_function = in_place_cross_entropy
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        options = {"num_items_in_batch": targets.numel(), "use_cache": False, "skip_logits": True}
        loss: torch.Tensor = model(input_ids=inputs, shift_labels=targets, **options).loss
        return loss

    return model, optimizer, loss_of


def _nanogpt(turn: Turn) -> tuple[nn.Module, torch.optim.Optimizer, Callable[..., torch.Tensor]]:
    sys.path.insert(0, str(turn.nanogpt))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    shape = {"n_layer": turn.layers, "n_head": turn.heads, "n_embd": turn.hidden, "block_size": turn.block_size}
    model = GPT(GPTConfig(**shape, vocab_size=turn.vocab_size, dropout=0.0, bias=True)).to(turn.device).train()
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, turn.device)
    return model, optimizer, lambda inputs, targets: model(inputs, targets)[1]


def _trainer(turn: Turn) -> list[float]:
    """GPT-2 under transformers' Trainer with its fused AdamW; the time is from one step's end to the next."""
    from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        ends: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if turn.device == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    steps = turn.warmup + turn.steps
    rows = torch.randint(turn.vocab_size, (steps * turn.batch_size, turn.block_size))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=turn.batch_size,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            adam_beta2=BETAS[1],
            optim="adamw_torch_fused",
            bf16=turn.bf16,
            torch_compile=turn.compile,
            use_cpu=turn.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = GPT2LMHeadModel(gpt2_config(config_of(vars(turn))))
        data = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model, arguments, train_dataset=data, callbacks=[Clock()]).train()
    timed = Clock.ends[turn.warmup - 1 :]
    return [end - begin for begin, end in pairwise(timed)]


def main() -> None:
    turn = Turn(**json.loads(sys.argv[1]))
    if turn.threads is not None:
        torch.set_num_threads(turn.threads)
    seconds = step_seconds(turn)
    memory_gib = peak_memory_gib(torch.device(turn.device))
    print(json.dumps({"turn": asdict(turn), "seconds": seconds, "memory_gib": memory_gib}))


if __name__ == "__main__":
    main()
