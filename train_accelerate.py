"""Train a GPT.

    accelerate launch --config_file accelerate_configs/X.yaml train_accelerate.py configs/Y.yaml [--option value]

Read from the top: `run_steps` is the loop over the steps, `take_step` makes one update, and `set_up` prepares
everything before the first one. Everything they call is in the package `minigpt/`. Without arguments this trains the
preset `quickstart`.
"""

import math
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from minigpt.utils.errors import end_quietly_on_ctrl_c

if __name__ == "__main__":
    end_quietly_on_ctrl_c(os.environ.get("MINIGPT_PROGRAM", "train_accelerate.py"))  # importing torch takes seconds

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from transformers import PreTrainedTokenizerFast

from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments
from minigpt.data.datamodule import (
    DataModule,
    check_ids,
    load_data,
    open_data_module,
    prepare_data,
    samples_per_step,
    steps_of_run,
)
from minigpt.data.prepare import cache_folder
from minigpt.data.samples import Batch
from minigpt.hub.background_push import BackgroundPush
from minigpt.hub.model_card import write_card
from minigpt.hub.secret_scan import refuse_secrets_on_command_line
from minigpt.modeling.flops import train_flops_per_token
from minigpt.optim.lr_schedule import build_schedule, set_learning_rate
from minigpt.optim.optimizer import build_optimizer
from minigpt.planning.forecast import forecast
from minigpt.training.accelerator import (
    check_for_gpu,
    clear_gradients,
    exchange_gradients,
    on_device,
    start_accelerator,
    whole_tensor,
)
from minigpt.training.checkpoint import Checkpoints
from minigpt.training.model_files import write_final_model
from minigpt.training.model_statistics import ModelStatistics
from minigpt.training.nonfinite import SkippedSteps
from minigpt.training.optional_files import LINE_BYTES, SMALL_FILES_BYTES, OptionalFiles
from minigpt.training.out_of_memory import out_of_memory_in_one_line
from minigpt.training.overview import describe
from minigpt.training.periodic import HellaSwagEvaluation, SampleTexts, ValidationLoss
from minigpt.training.plot import plot_runs
from minigpt.training.preemption import StopRequest
from minigpt.training.profiling import StepProfiler
from minigpt.training.provenance import record_provenance
from minigpt.training.rank_consistency import check_rank_consistency
from minigpt.training.rank_times import RankTimes
from minigpt.training.resume import (
    best_checkpoint,
    carry_over,
    changed_options,
    check_length,
    checkpoint_to_resume,
    load_training_state,
    restore_optimizer,
    set_aside_later_checkpoints,
)
from minigpt.training.run_dir import OutputDir, check_room
from minigpt.training.run_length import RunLength
from minigpt.training.run_log import TrainingLog
from minigpt.training.setup import build_model
from minigpt.training.state import TrainingClock, TrainingState, seed_step
from minigpt.utils.errors import EXIT_DIVERGED, EXIT_STOPPED, UserError, file_errors_are_user_errors, one_line_errors
from minigpt.utils.formatting import format_duration
from minigpt.utils.hardware import why_no_gpu


@dataclass
class Run:
    """Everything that the steps of a run use."""

    args: Arguments
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerFast
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    length: RunLength
    data_module: DataModule
    batches: Iterator[Batch]
    state: TrainingState
    log: TrainingLog
    rank_times: RankTimes
    profiler: StepProfiler
    statistics: ModelStatistics
    validation: ValidationLoss | None
    hellaswag: HellaSwagEvaluation | None
    samples: SampleTexts
    optional_files: OptionalFiles
    skipped_steps: SkippedSteps
    checkpoints: Checkpoints
    pushes: BackgroundPush
    output_dir: OutputDir


def train(args: Arguments, run_length: type[RunLength] = RunLength) -> int:
    """Start or resume the training that `args` describe. Returns the exit code: 0, 75 (stopped) or 76 (diverged)."""
    with out_of_memory_in_one_line(args), StopRequest() as stop, OutputDir(args) as output_dir:
        with file_errors_are_user_errors():
            run = set_up(args, output_dir, run_length)
        try:
            return run_steps(run, stop)
        finally:
            run.checkpoints.finish()  # one may still be being written in the background
            run.profiler.close()


def run_steps(run: Run, stop: StopRequest) -> int:
    """Make the steps of a run, and what is due between them. Returns the exit code."""
    args, state, log, accelerator = run.args, run.state, run.log, run.accelerator
    stop.listen()
    clock = TrainingClock(state)
    run.model.train()

    while not state.is_done:
        learning_rate = run.length.learning_rate(state)
        with inspected(run):
            loss, grad_norm = take_step(run, learning_rate)
        run.output_dir.discard_earlier_run()
        log.step_done()
        if log.due(state):
            clock.tick()
            run.length.correct(state, accelerator)
        stopping = stop.received_by_any_rank()
        if stopping or is_pause(run):
            run.skipped_steps.settle(state, run.model)
        diverged = run.skipped_steps.too_many(state)
        stopping |= diverged
        save_due = run.checkpoints.due(state) or stopping
        with run.checkpoints.saved_on_error(save_due, state, run.model, run.optimizer, accelerator):
            if log.due(state) or stopping:
                mean_loss = float(accelerator.reduce(loss, "mean"))
                clock.tick()
                log.training(state, mean_loss, float(grad_norm), learning_rate)
                if slow_rank := run.rank_times.slow_rank(state.step):
                    log.print(f"  note: {slow_rank}")
            with clock.paused():
                improved = validate(run)
        with clock.paused():
            saved = False
            if save_due or (improved and args.saves_best):
                saved = run.checkpoints.save(state, run.model, run.optimizer, accelerator, stopping)
            # after the checkpoint, which does not need them: if they fail, no step is lost
            if run.hellaswag is not None and run.hellaswag.due(state):
                log.evaluation(state, run.hellaswag.run(run.model, accelerator), is_best=False)
            if run.samples.due(state):
                log.samples(state, run.samples.run(run.model, accelerator))
            if saved and not state.is_done and not stopping:
                run.pushes.start(state.step)
        if stopping and not state.is_done:
            reason = "diverged" if diverged else "stopped"
            log.print(f"{reason} at step {state.step}; resume with --resume_from_checkpoint latest")
            log.close()
            return EXIT_DIVERGED if diverged else EXIT_STOPPED

    run.checkpoints.finish()
    write_final_model(args, state, run.model, run.tokenizer, accelerator)
    if accelerator.is_main_process:
        write_plot_and_card(run)
    duration = format_duration(state.elapsed_s)
    log.print(f"done: {state.step} steps in {duration} of training; the model is in {args.run_dir}")
    tell_what_next(run)
    log.close()
    stop.release()  # the model is complete: the upload may be interrupted
    run.pushes.finish()
    return 0


@contextmanager
def inspected(run: Run) -> Iterator[None]:
    """Inside, a step is made; it is profiled, or its statistics are logged, if that is due."""
    run.profiler.before_step(run.state)
    with run.statistics.measured(run.state) as has_statistics:
        yield
    if has_statistics:
        run.log.record(run.state, run.statistics.metrics)
    if table := run.profiler.after_step(run.state):
        run.log.print(f"  the profile is in {table.parent}")


def is_pause(run: Run) -> bool:
    """Whether the host waits for the device after this step, to log, evaluate or save."""
    state = run.state
    return (
        any(part.due(state) for part in (run.log, run.checkpoints, run.samples))
        or (run.validation is not None and run.validation.due(state))
        or (run.hellaswag is not None and run.hellaswag.due(state))
    )


def validate(run: Run) -> bool:
    """Measure the validation loss if it is due. Returns whether it is the lowest so far."""
    if run.validation is None or not run.validation.due(run.state):
        return False
    metrics = run.validation.run(run.model, run.accelerator)
    improved = run.state.is_best(metrics["val/loss"])
    run.log.evaluation(run.state, metrics, improved)
    return improved


def write_plot_and_card(run: Run) -> None:
    """Draw the curves of the run and write its model card. Without a logged loss or room on the disk, say so."""
    try:
        run.optional_files.write("plots", SMALL_FILES_BYTES, lambda: plot_runs([run.args.run_dir]))
    except UserError as error:
        run.log.print(f"  note: no plot: {error}")
    run.optional_files.write("model cards", LINE_BYTES, lambda: write_card(run.args.run_dir))


def tell_what_next(run: Run) -> None:
    """Say how to try the model and, if the fitted law knows such a run, what as many minutes again would bring."""
    args = run.args
    if args.train_minutes:
        with suppress(UserError):
            outlook = forecast(args.run_dir, args.train_minutes)
            run.log.print(f"  forecast: {outlook}: {outlook.command}")
    verb = "chat" if run.tokenizer.chat_template else "generate --interactive"
    run.log.print(f"  try it: minigpt {verb} --model {shlex.quote(str(args.run_dir))}")


def take_step(run: Run, learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one update. Returns this rank's share of the mean loss (nats per token) and the norm of the gradient.

    A step whose gradient is not finite is skipped. Both results stay on the device, so that the host need not wait.
    """
    args, accelerator, state = run.args, run.accelerator, run.state
    samples = samples_per_step(args, accelerator.num_processes)
    targets = run.data_module.target_count(state.samples_seen, samples)  # of all ranks, without communication
    divisor = max(1, targets) / accelerator.num_processes  # ranks average their gradients; the loss is a sum
    set_learning_rate(run.optimizer, learning_rate)
    seed_step(args.seed, state.step, accelerator.process_index)
    loss = torch.zeros((), device=accelerator.device)
    for batch, is_last in micro_batches(run.batches, args.gradient_accumulation_steps):
        with exchange_gradients(accelerator, run.model, is_last):
            with run.rank_times.forward():
                share = run.model(**batch, num_items_in_batch=1, use_cache=False, skip_logits=True).loss / divisor
            accelerator.backward(share)
        loss += share.detach()
    grad_norm = whole_tensor(accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm or math.inf))
    sample_ids = partial(run.data_module.sample_ids, state.samples_seen, samples)
    run.skipped_steps.settle(state, run.model)  # the step before: by now the device has finished it
    run.skipped_steps.update(run.optimizer, grad_norm, sample_ids, learning_rate, state, run.model)
    clear_gradients(accelerator, run.optimizer)
    state.advance(samples, targets)
    return loss, grad_norm


def set_up(args: Arguments, output_dir: OutputDir, run_length: type[RunLength] = RunLength) -> Run:
    """Prepare everything before the first step. Nothing on disk changes until all of it is checked."""
    output_dir.check()
    check_for_gpu(args)
    data_folders = prepare_data(args)  # may take hours, longer than a process group waits
    accelerator = start_accelerator(args)
    if accelerator.is_main_process:
        output_dir.lock()
    resume_from, notes = checkpoint_to_resume(args, accelerator)
    if not args.use_cpu and (reason := why_no_gpu()):
        notes.append(reason)
    shards, tokenizer = load_data(args, data_folders)
    state = load_training_state(resume_from, args, shards.fingerprint)
    set_seed(args.seed)
    model = build_model(args, tokenizer, resume_from)
    config, parameters, trained = model.config, model.num_parameters(), model.num_parameters(only_trainable=True)
    check_ids(shards, config.vocab_size)
    check_rank_consistency(args, config, shards.fingerprint, state.step, accelerator)
    check_room(args, trained)
    optimizer = build_optimizer(model, args, accelerator.device)
    data_module = open_data_module(args, shards, tokenizer.eos_token_id, cache_folder(args))
    max_steps = steps_of_run(args, data_module.order.samples_per_epoch, accelerator.num_processes)
    check_length(args, resume_from, state, max_steps)
    length = run_length(args, build_schedule(args, max_steps, accelerator.num_processes), state)
    best = best_checkpoint(args, resume_from, state, accelerator)
    validation, hellaswag, eval_batch_size = None, None, args.eval_batch_size
    if data_module.validation:
        validation = ValidationLoss(data_module.validation, eval_batch_size, args.eval_steps)
    if args.hellaswag_steps is not None:
        hellaswag = HellaSwagEvaluation(args, tokenizer, eval_batch_size)
    pushes = BackgroundPush(args, accelerator.is_main_process)
    changes = changed_options(resume_from, args, state, accelerator) if resume_from is not None else []
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        output_dir.start()
        if resume_from is not None:
            notes += set_aside_later_checkpoints(args, state.step)
        if best is not None:
            notes.append(carry_over(best, state, args.run_dir))
        record_provenance(args, shards, data_module.packing_summary(), accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_fsdp2:
        output_dir.check_shared(*broadcast_object_list([args.as_yaml()]))
    model, optimizer = accelerator.prepare(model, optimizer)
    if resume_from is not None:
        restore_optimizer(resume_from, state, model, optimizer, accelerator)
    batches = data_module.batches(args, state.samples_seen, accelerator.process_index, accelerator.num_processes)
    rank_times = RankTimes(accelerator, state.step)
    optional_files = OptionalFiles(args.run_dir)
    flops = train_flops_per_token(parameters, config, args.block_size, trained)
    log = TrainingLog(args, state, accelerator, flops, optional_files)
    log.print(describe(args, accelerator, config, parameters, trained, shards, data_module, max_steps))
    for note in notes:
        log.print(f"  note: {note}")
    if resume_from is not None:
        log.print(f"  resuming from {resume_from} after step {state.step}")
    if changes:
        log.print(f"  resumed with other options: {', '.join(changes)}")
    return Run(
        args=args,
        accelerator=accelerator,
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        length=length,
        data_module=data_module,
        batches=rank_times.fetching(on_device(batches, accelerator.device, config)),
        state=state,
        log=log,
        rank_times=rank_times,
        profiler=StepProfiler(args, accelerator),
        statistics=ModelStatistics(args, model, accelerator),
        validation=validation,
        hellaswag=hellaswag,
        samples=SampleTexts(args, args.seed, tokenizer, shards.train.documents),
        optional_files=optional_files,
        skipped_steps=SkippedSteps(args, tokenizer, optional_files, accelerator),
        checkpoints=Checkpoints(args, tokenizer),
        pushes=pushes,
        output_dir=output_dir,
    )


def micro_batches(batches: Iterator[Batch], count: int) -> Iterator[tuple[Batch, bool]]:
    """The next `count` micro-batches, each with whether it is the last of its step."""
    return ((batch, number == count) for number, batch in enumerate(islice(batches, count), start=1))


def main(run_length: type[RunLength] = RunLength) -> None:
    """Train with the options of the command line, and exit with the code that `train` returns.

    A subclass of `RunLength` gives a run another learning rate: examples/custom_schedule.py.
    """
    transformers.utils.logging.disable_progress_bar()  # bars for writing weights would break up the log,
    transformers.utils.logging.set_verbosity_error()  # and so would warnings; what cannot be loaded is an error
    program = os.environ.get("MINIGPT_PROGRAM", Path(sys.argv[0]).name)
    with one_line_errors(program):
        refuse_secrets_on_command_line(sys.argv[1:])
        with file_errors_are_user_errors():
            args = parse_arguments(sys.argv[1:], program=program)
        sys.exit(train(args, run_length))


if __name__ == "__main__":
    main()
