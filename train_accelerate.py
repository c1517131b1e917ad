"""Train a GPT.

    accelerate launch --config_file accelerate_configs/X.yaml train_accelerate.py configs/Y.yaml [--option value]

Read downward: `train` sets up what a run needs and walks through its steps; everything it calls has one module in
`minigpt/` that answers one question. Without any argument it trains configs/quickstart.yaml.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, send_to_device, set_seed

from minigpt.arguments import Arguments
from minigpt.build import build_model, check_ids, check_output_dir, clear_output_dir, load_data
from minigpt.card import write_card
from minigpt.checkpoint import (
    Checkpoints,
    checkpoint_to_resume,
    load_training_state,
    restore_optimizer,
    write_final_model,
)
from minigpt.command_line import parse_arguments
from minigpt.data import Batch, SampleOrder, TokenBlocks, TrainBatches, loader, samples_per_step, steps_of_run
from minigpt.errors import one_line_errors
from minigpt.evaluation import Evaluation
from minigpt.generate import sample_text
from minigpt.metrics import train_flops_per_token
from minigpt.optim import build_optimizer
from minigpt.plan import describe
from minigpt.plot import plot_runs
from minigpt.provenance import record_provenance
from minigpt.publish import HubPushes
from minigpt.schedule import Schedule, learning_rate_at, set_learning_rate
from minigpt.secret_scan import refuse_secret_words
from minigpt.state import TrainingClock, TrainingState, is_due
from minigpt.stopping import EXIT_STOPPED, StopRequest
from minigpt.tracking import TrainingLog, clock_time, requested_trackers


def train(args: Arguments) -> int:
    """Run or go on with the training that `args` describe. Returns the exit code."""
    # ---- what the run starts from -----------------------------------------------------------------------------
    accelerator = start_accelerator(args)
    check_output_dir(args)
    resume_from = checkpoint_to_resume(args)
    with accelerator.main_process_first():
        shards, tokenizer = load_data(args)
    state = TrainingState(data_fingerprint=shards.fingerprint)
    if resume_from is not None:
        state = load_training_state(resume_from, shards.fingerprint)

    set_seed(args.seed)
    model = build_model(args, tokenizer, resume_from)
    config, parameters = model.config, model.num_parameters()
    check_ids(shards, config.vocab_size)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = build_optimizer(model, args, accelerator.device)

    order = SampleOrder(len(shards.train), args.block_size, args.seed, args.stride)
    processes = accelerator.num_processes
    max_steps = steps_of_run(args, order.samples, processes)
    rate_scale = processes if args.scale_learning_rate else 1
    schedule = Schedule(
        learning_rate=args.learning_rate * rate_scale,
        min_learning_rate=args.min_learning_rate * rate_scale,
        warmup_steps=args.warmup_steps,
        max_steps=max_steps,
        lr_scheduler_type=args.lr_scheduler_type,
    )
    eval_batch_size = args.per_device_eval_batch_size or args.per_device_train_batch_size
    evaluation = shards.validation and Evaluation(
        shards.validation, args.block_size, eval_batch_size, args.eval_steps, max_steps
    )

    pushes = HubPushes(args, accelerator.is_main_process)

    # ---- from here on the output folder changes ---------------------------------------------------------------
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        clear_output_dir(args)
        record_provenance(args, shards, accelerator)
    accelerator.wait_for_everyone()
    model, optimizer = accelerator.prepare(model, optimizer)
    if resume_from is not None:
        restore_optimizer(resume_from, state, model, optimizer, accelerator)
    flops_per_token = train_flops_per_token(
        parameters - config.max_position_embeddings * config.hidden_size,
        config.num_hidden_layers,
        config.hidden_size,
        args.block_size,
    )
    log = TrainingLog(args, state, accelerator, max_steps, flops_per_token)
    checkpoints = Checkpoints(args, tokenizer, max_steps)
    batches = train_batches(args, TokenBlocks(shards.train, args.block_size), order, state, accelerator)
    stop = StopRequest()
    log.say(describe(args, accelerator, config, parameters, shards, order, max_steps))
    if resume_from is not None:
        log.say(f"  goes on from {resume_from} after step {state.step}")

    # ---- the steps --------------------------------------------------------------------------------------------
    model.train()
    clock = TrainingClock(state)
    targets_per_process = args.gradient_accumulation_steps * args.per_device_train_batch_size * args.block_size
    while state.step < max_steps:
        learning_rate = learning_rate_at(state.step, schedule)
        set_learning_rate(optimizer, learning_rate)
        seed_step(args.seed, state.step, accelerator.process_index)

        loss = torch.zeros((), device=accelerator.device)
        for batch, is_last in micro_batches(batches, args.gradient_accumulation_steps):
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            with nullcontext() if is_last else accelerator.no_sync(model):
                # summed loss over the targets of this process in this step; averaging over processes, which all
                # have as many, makes it the exact mean over every target of the step
                share = model(**batch, num_items_in_batch=targets_per_process, use_cache=False, skip_logits=True).loss
                accelerator.backward(share)
            loss += share.detach()
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        state.advance(samples_per_step(args, processes), targets_per_process * processes)

        stopping = stop.agreed()
        if log.due(state) or stopping:  # the only wait for the device
            mean_loss = float(accelerator.reduce(loss, "mean"))
            clock.tick()
            log.training(state, mean_loss, grad_norm, learning_rate)
        with clock.paused():
            improved = False
            if evaluation and evaluation.due(state):
                metrics = evaluation.run(model, accelerator)
                improved = state.is_best(metrics["val/loss"])
                log.validation(state, metrics, improved)
            if is_due(state.step, args.sample_steps, max_steps):
                log.samples(state, sample_texts(args, model, tokenizer, accelerator))
            if checkpoints.due(state) or improved or stopping:
                checkpoints.save(state, model, optimizer, accelerator)
                if state.step < max_steps and not stopping:
                    pushes.start(state.step)
        if stopping and state.step < max_steps:
            log.say(f"stopped at step {state.step}; go on with --resume_from_checkpoint latest")
            accelerator.end_training()
            return EXIT_STOPPED

    # ---- the result -------------------------------------------------------------------------------------------
    write_final_model(args, state, model, tokenizer, accelerator)
    if accelerator.is_main_process:
        plot_runs([args.run_dir])
        write_card(args.run_dir)
    log.say(f"done: {max_steps} steps in {clock_time(state.elapsed_s)} of training; the model is in {args.run_dir}")
    accelerator.end_training()
    pushes.finish()
    return 0


def start_accelerator(args: Arguments) -> Accelerator:
    """Accelerate with the launch profile's processes, device, precision and compilation."""
    accelerator = Accelerator(
        cpu=args.use_cpu or not torch.accelerator.is_available(),  # said aloud, or several CPU processes stay apart
        mixed_precision=args.mixed_precision,
        log_with=requested_trackers(args.report_to) or None,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(args.run_dir / "tensorboard")
        ),
    )
    if args.optimizer == "muon" and accelerator.is_fsdp2:
        raise ValueError("optimizer=muon needs whole matrices and FSDP2 shards them; use optimizer=adamw")
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    return accelerator


def train_batches(
    args: Arguments, blocks: TokenBlocks, order: SampleOrder, state: TrainingState, accelerator: Accelerator
) -> Iterator[Batch]:
    """This process's micro-batches from the first sample that the run has not seen, without end."""
    batches = TrainBatches(
        order=order,
        start=state.samples_seen,
        micro_batch=args.per_device_train_batch_size,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    return iter(loader(blocks, batches, args.dataloader_num_workers))


def micro_batches(batches: Iterator[Batch], number: int) -> Iterator[tuple[Batch, bool]]:
    """The next `number` micro-batches, each with whether it is the last of its step."""
    return ((batch, place == number) for place, batch in enumerate(islice(batches, number), start=1))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout by (seed, step, process): a resumed run needs no saved generator, nothing else can disturb it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def sample_texts(args: Arguments, model: torch.nn.Module, tokenizer: Any, accelerator: Accelerator) -> dict[str, str]:
    """A continuation of every sample prompt, from the same seed each time. All processes take part (FSDP needs it)."""
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    texts = sample_text(
        bare,
        tokenizer,
        args.sample_prompts,
        max_new_tokens=args.sample_max_new_tokens,
        temperature=0.8,
        top_k=50,
        top_p=None,
        seed=args.seed,
    )
    return dict(zip(args.sample_prompts, texts, strict=True))


def main() -> None:
    transformers.utils.logging.disable_progress_bar()  # of writing weights, in the middle of the progress lines
    with one_line_errors("train_accelerate.py"):
        refuse_secret_words(sys.argv[1:])
        sys.exit(train(parse_arguments(sys.argv[1:], Path(__file__).parent / "configs" / "quickstart.yaml")))


if __name__ == "__main__":
    main()
