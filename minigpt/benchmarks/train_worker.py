"""Train once with one baseline trainer, in its own process, and print the time of each step as a line of JSON.

Every trainer trains the same shape on the same random tokens, with AdamW and gradient clipping. `bare` is MiniGPT's
model in a minimal loop, `nanogpt` the model and optimizer of the user's checkout, `transformers` GPT-2 under Trainer.
`minigpt bench train` starts it as: python -m minigpt.benchmarks.train_worker TASK, a `Task` as JSON.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from configuration_minigpt import MiniGPTConfig
from minigpt.benchmarks.train import Shape, Turn, round_up, steps_timed_together
from minigpt.modeling.gpt2 import gpt2_config
from minigpt.modeling.loss import in_place_cross_entropy
from minigpt.utils.hardware import peak_memory_gib
from minigpt.utils.malloc import keep_freed_memory
from modeling_minigpt import MiniGPTForCausalLM

LEARNING_RATE, BETAS, WEIGHT_DECAY = 6e-4, (0.9, 0.95), 0.1

ComputeLoss = Callable[[Tensor, Tensor], Tensor]  # inputs and targets [B, T] → mean loss


@dataclass(frozen=True)
class Task:
    """What is trained, how, and for how long. `steps` are timed, after `warmup` steps that are not."""

    trainer: str
    shape: Shape
    bf16: bool
    compile: bool
    device: str
    steps: int
    warmup: int
    compile_backend: str = "inductor"
    threads: int | None = None
    nanogpt: str | None = None

    @staticmethod
    def from_json(text: str) -> "Task":
        """The task that `json.dumps` made of a dictionary of these fields."""
        values = json.loads(text)
        return Task(**(values | {"shape": Shape(**values["shape"])}))


def build_config(shape: Shape) -> MiniGPTConfig:
    """GPT-2 in a given shape, without dropout."""
    return MiniGPTConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.block_size,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )


def step_seconds(task: Task) -> list[float]:
    """Seconds of every timed step, or of several timed together: their mean (see `steps_timed_together`)."""
    torch.manual_seed(0)
    if task.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as MiniGPT's trainer and nanoGPT's train.py
    if task.trainer == "transformers":
        return _trainer_step_seconds(task)
    model, optimizer, compute_loss = (build_nanogpt if task.trainer == "nanogpt" else build_bare)(task)
    if task.compile:
        model.compile(backend=task.compile_backend)
    together, warmup, steps = _rounded_counts(task)
    batches = random_batches(task)
    ends = []
    for step in range(1, warmup + steps + 1):
        loss = take_step(task, model, optimizer, compute_loss, next(batches))
        if step % together == 0:
            loss.item()  # waits for the device
            ends.append(time.perf_counter())
    return [(end - start) / together for start, end in pairwise(ends[warmup // together - 1 :])]


def take_step(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, compute_loss: "ComputeLoss", batch: list[Tensor]
) -> Tensor:
    """One update in a minimal training loop, which nowhere waits for the device. Returns the loss."""
    with torch.autocast(task.device, torch.bfloat16, enabled=task.bf16):
        loss = compute_loss(*batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def random_batches(task: Task) -> Iterator[list[Tensor]]:
    """Inputs and targets [B, T] of random tokens, without end."""
    batch_size, block_size = task.shape.batch_size, task.shape.block_size
    tokens = torch.randint(task.shape.vocab_size, (task.shape.tokens * 8 + 1,))
    while True:
        starts = torch.randint(len(tokens) - block_size, (batch_size,)).tolist()
        shifted = [torch.stack([tokens[start + shift :][:block_size] for start in starts]) for shift in (0, 1)]
        if task.device == "cuda":  # only a copy from pinned memory does not make the host wait
            shifted = [tensor.pin_memory() for tensor in shifted]
        yield [tensor.to(task.device, non_blocking=True) for tensor in shifted]


def _rounded_counts(task: Task) -> tuple[int, int, int]:
    """How many steps are timed together, and the steps of warm-up and of measurement, as multiples of that."""
    together = steps_timed_together(task.shape, task.device)
    return together, round_up(task.warmup, together), round_up(task.steps, together)


def build_bare(task: Task) -> tuple[nn.Module, torch.optim.Optimizer, ComputeLoss]:
    """MiniGPT's model with its loss, and AdamW."""
    if task.device == "cpu":
        keep_freed_memory()
    model = MiniGPTForCausalLM(build_config(task.shape)).train()
    model.to(task.device)
    model.loss_function = in_place_cross_entropy
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)

    def compute_loss(inputs: Tensor, targets: Tensor) -> Tensor:
        options = {"num_items_in_batch": targets.numel(), "use_cache": False, "skip_logits": True}
        loss: Tensor = model(input_ids=inputs, shift_labels=targets, **options).loss
        return loss

    return model, optimizer, compute_loss


def build_nanogpt(task: Task) -> tuple[nn.Module, torch.optim.Optimizer, ComputeLoss]:
    """The model and optimizer of nanoGPT's checkout."""
    sys.path.insert(0, str(task.nanogpt))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    shape = task.shape
    options = {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.hidden, "block_size": shape.block_size}
    model = GPT(GPTConfig(**options, vocab_size=shape.vocab_size, dropout=0.0, bias=True)).to(task.device).train()
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, task.device)
    return model, optimizer, lambda inputs, targets: model(inputs, targets)[1]


def _trainer_step_seconds(task: Task) -> list[float]:
    """Train GPT-2 under transformers' Trainer with fused AdamW. A step is timed from the end of the one before it."""
    from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    together, warmup, timed_steps = _rounded_counts(task)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % together:
                return
            if task.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    shape, steps = task.shape, warmup + timed_steps
    samples = torch.randint(shape.vocab_size, (steps * shape.batch_size, shape.block_size))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape.batch_size,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            adam_beta2=BETAS[1],
            optim="adamw_torch_fused",
            bf16=task.bf16,
            tf32=True if task.device == "cuda" else None,
            torch_compile=task.compile,
            torch_compile_backend=task.compile_backend if task.compile else None,
            use_cpu=task.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = GPT2LMHeadModel(gpt2_config(build_config(shape)))
        dataset: Any = [{"input_ids": sample, "labels": sample} for sample in samples]
        Trainer(model, arguments, train_dataset=dataset, callbacks=[Clock()]).train()
    return [(end - start) / together for start, end in pairwise(ends[warmup // together - 1 :])]


def main() -> None:
    """Run the task in the first command-line argument, and print a `Turn` as JSON."""
    task = Task.from_json(sys.argv[1])
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    seconds = step_seconds(task)
    print(json.dumps(asdict(Turn(seconds, peak_memory_gib(torch.device(task.device))))))


if __name__ == "__main__":
    main()
