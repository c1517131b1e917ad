"""Train a GPT.

    accelerate launch --config_file accelerate_configs/X.yaml train_accelerate.py configs/Y.yaml [--option value]

Read from the top: `run_steps` is the loop over the steps, `take_step` makes one update, and `set_up` prepares
everything before the first one. Everything they call is in the package `minigpt/`. Without arguments this trains the
preset `quickstart`.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from transformers import PreTrainedTokenizerFast

from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments
from minigpt.data.datamodule import DataModule, check_ids, load_data, open_data_module, samples_per_step, steps_of_run
from minigpt.data.samples import Batch
from minigpt.hub.background_push import BackgroundPush
from minigpt.hub.model_card import write_card
from minigpt.hub.secret_scan import refuse_secrets_on_command_line
from minigpt.modeling.flops import train_flops_per_token
from minigpt.optim.lr_schedule import Schedule, build_schedule, learning_rate_at, set_learning_rate
from minigpt.optim.optimizer import build_optimizer
from minigpt.training.accelerator import exchange_gradients, start_accelerator
from minigpt.training.checkpoint import Checkpoints
from minigpt.training.model_files import write_final_model
from minigpt.training.nonfinite import SkippedSteps, is_applicable
from minigpt.training.overview import describe
from minigpt.training.periodic import HellaSwagEvaluation, SampleTexts, ValidationLoss, build_evaluations
from minigpt.training.plot import plot_runs
from minigpt.training.preemption import StopRequest
from minigpt.training.provenance import record_provenance
from minigpt.training.rank_consistency import check_rank_consistency
from minigpt.training.resume import (
    checkpoint_to_resume,
    load_training_state,
    restore_optimizer,
    set_aside_later_checkpoints,
)
from minigpt.training.run_dir import OutputDir, check_room
from minigpt.training.run_log import TrainingLog, as_float
from minigpt.training.setup import build_model
from minigpt.training.state import TrainingClock, TrainingState, seed_step
from minigpt.utils.errors import EXIT_DIVERGED, EXIT_STOPPED, file_errors_are_user_errors, one_line_errors
from minigpt.utils.formatting import format_duration


@dataclass
class Run:
    """Everything that the steps of a run use."""

    args: Arguments
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerFast
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    data_module: DataModule
    batches: Iterator[Batch]
    state: TrainingState
    log: TrainingLog
    evaluations: list[ValidationLoss | HellaSwagEvaluation]
    samples: SampleTexts
    skipped_steps: SkippedSteps
    checkpoints: Checkpoints
    pushes: BackgroundPush
    output_dir: OutputDir


def train(args: Arguments) -> int:
    """Start or resume the training that `args` describe. Returns the exit code: 0, 75 (stopped) or 76 (diverged)."""
    with StopRequest() as stop, OutputDir(args) as output_dir:
        with file_errors_are_user_errors():
            run = set_up(args, output_dir)
        return run_steps(run, stop)


def run_steps(run: Run, stop: StopRequest) -> int:
    """Make the steps of a run, and what is due between them. Returns the exit code."""
    args, state, log, accelerator, max_steps = run.args, run.state, run.log, run.accelerator, run.schedule.max_steps
    stop.listen()
    clock = TrainingClock(state)
    run.model.train()

    while state.step < max_steps:
        learning_rate = learning_rate_at(state.step, run.schedule)
        loss, grad_norm = take_step(run, learning_rate)
        run.output_dir.discard_earlier_run()
        log.step_done()
        diverged = run.skipped_steps.too_many(state)
        stopping = stop.received_by_any_rank() or diverged
        if log.due(state) or stopping:
            mean_loss = float(accelerator.reduce(loss, "mean"))
            clock.tick()
            log.training(state, mean_loss, grad_norm, learning_rate)
        with clock.paused():
            improved = False
            for evaluation in run.evaluations:
                if evaluation.due(state):
                    metrics = evaluation.run(run.model, accelerator)
                    improved |= state.is_best(metrics.get("val/loss"))
                    log.evaluation(state, metrics, improved)
            if run.samples.due(state):
                log.samples(state, run.samples.run(run.model, accelerator))
            if run.checkpoints.due(state) or (improved and args.saves_best) or stopping:
                run.checkpoints.save(state, run.model, run.optimizer, accelerator, stopping)
                if state.step < max_steps and not stopping:
                    run.pushes.start(state.step)
        if stopping and state.step < max_steps:
            reason = "diverged" if diverged else "stopped"
            log.print(f"{reason} at step {state.step}; resume with --resume_from_checkpoint latest")
            log.close()
            return EXIT_DIVERGED if diverged else EXIT_STOPPED

    run.checkpoints.finish()
    write_final_model(args, state, run.model, run.tokenizer, accelerator)
    if accelerator.is_main_process:
        plot_runs([args.run_dir])
        write_card(args.run_dir)
    duration = format_duration(state.elapsed_s)
    log.print(f"done: {max_steps} steps in {duration} of training; the model is in {args.run_dir}")
    log.close()
    stop.release()  # the model is complete: the upload may be interrupted
    run.pushes.finish()
    return 0


def take_step(run: Run, learning_rate: float) -> tuple[torch.Tensor, float]:
    """Make one update. Returns this rank's share of the mean loss (nats per token) and the norm of the gradient.

    A step whose gradient is not finite is skipped.
    """
    args, accelerator, state = run.args, run.accelerator, run.state
    samples = samples_per_step(args, accelerator.num_processes)
    targets = run.data_module.target_count(state.samples_seen, samples)  # of all ranks, without communication
    divisor = max(1, targets) / accelerator.num_processes  # ranks average their gradients; the loss is a sum
    set_learning_rate(run.optimizer, learning_rate)
    seed_step(args.seed, state.step, accelerator.process_index)
    loss = torch.zeros((), device=accelerator.device)
    for batch, is_last in micro_batches(run.batches, args.gradient_accumulation_steps):
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        with exchange_gradients(accelerator, run.model, is_last):
            share = run.model(**batch, num_items_in_batch=divisor, use_cache=False, skip_logits=True).loss
            accelerator.backward(share)
        loss += share.detach()
    grad_norm = as_float(accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm or math.inf))
    if is_applicable(grad_norm, accelerator.scaler):
        run.optimizer.step()
    else:
        sample_ids = run.data_module.sample_ids(state.samples_seen, samples)
        run.skipped_steps.record(state, run.model, accelerator, sample_ids, learning_rate, grad_norm)
    run.optimizer.zero_grad()
    state.advance(samples, targets)
    return loss, grad_norm


def set_up(args: Arguments, output_dir: OutputDir) -> Run:
    """Prepare everything before the first step. Nothing on disk changes until all of it is checked."""
    accelerator = start_accelerator(args)
    output_dir.check()
    if accelerator.is_main_process:
        output_dir.lock()
    resume_from, notes = checkpoint_to_resume(args)
    with accelerator.main_process_first():
        shards, tokenizer = load_data(args)
    state = load_training_state(resume_from, args, shards.fingerprint)
    set_seed(args.seed)
    model = build_model(args, tokenizer, resume_from)
    config, parameters = model.config, model.num_parameters()
    check_ids(shards, config.vocab_size)
    check_rank_consistency(args, config, shards.fingerprint, state.step, accelerator)
    check_room(args, parameters)
    optimizer = build_optimizer(model, args, accelerator.device)
    data_module = open_data_module(args, shards, tokenizer.eos_token_id)
    max_steps = steps_of_run(args, data_module.order.samples_per_epoch, accelerator.num_processes)
    schedule = build_schedule(args, max_steps, accelerator.num_processes)
    evaluations = build_evaluations(args, data_module, tokenizer, max_steps)
    pushes = BackgroundPush(args, accelerator.is_main_process)
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        output_dir.start()
        if resume_from is not None:
            notes += set_aside_later_checkpoints(args, state.step)
        record_provenance(args, shards, data_module.packing_summary(), accelerator)
    accelerator.wait_for_everyone()
    model, optimizer = accelerator.prepare(model, optimizer)
    if resume_from is not None:
        restore_optimizer(resume_from, state, model, optimizer, accelerator)
    log = TrainingLog(args, state, accelerator, max_steps, train_flops_per_token(parameters, config, args.block_size))
    log.print(describe(args, accelerator, config, parameters, shards, data_module, max_steps))
    for note in notes:
        log.print(f"  note: {note}")
    if resume_from is not None:
        log.print(f"  resuming from {resume_from} after step {state.step}")
    return Run(
        args=args,
        accelerator=accelerator,
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        data_module=data_module,
        batches=data_module.batches(args, state.samples_seen, accelerator.process_index, accelerator.num_processes),
        state=state,
        log=log,
        evaluations=evaluations,
        samples=SampleTexts(args, args.seed, tokenizer, max_steps),
        skipped_steps=SkippedSteps(args, tokenizer),
        checkpoints=Checkpoints(args, tokenizer, max_steps),
        pushes=pushes,
        output_dir=output_dir,
    )


def micro_batches(batches: Iterator[Batch], count: int) -> Iterator[tuple[Batch, bool]]:
    """The next `count` micro-batches, each with whether it is the last of its step."""
    return ((batch, number == count) for number, batch in enumerate(islice(batches, count), start=1))


def main() -> None:
    """Train with the options of the command line, and exit with the code that `train` returns."""
    transformers.utils.logging.disable_progress_bar()  # bars for writing weights would break up the log
    program = os.environ.get("MINIGPT_PROGRAM", "train_accelerate.py")
    with one_line_errors(program):
        refuse_secrets_on_command_line(sys.argv[1:])
        sys.exit(train(parse_arguments(sys.argv[1:], program=program)))


if __name__ == "__main__":
    main()
