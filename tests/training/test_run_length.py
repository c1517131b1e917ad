"""Laws of `train_minutes`: a run ends on time, its learning rate follows the time, and it can be resumed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from minigpt.config.arguments import Arguments
from minigpt.data.datamodule import STEPS_OF_A_TIME
from minigpt.optim.lr_schedule import Schedule, learning_rate_at
from minigpt.training.run_length import RunLength
from minigpt.training.state import TrainingState

WARMUP_STEPS = 5
LINEAR = Schedule(1.0, 0.0, WARMUP_STEPS, STEPS_OF_A_TIME, "linear")
MINUTES = 2.0


def simulated_run(step_seconds: Callable[[int], float], logging_steps: int) -> tuple[TrainingState, list[float]]:
    """Take steps of these durations with a limit of two minutes. Returns the last state and the learning rates."""
    accelerator = Accelerator(cpu=True)
    state = TrainingState()
    length = RunLength(Arguments(train_file=["text"], train_minutes=MINUTES), LINEAR, state)
    rates = []
    while not state.is_done:
        rates.append(length.learning_rate(state))
        state.elapsed_s += step_seconds(state.step)
        state.advance(1, 1)
        if state.step == 1 or state.is_due(logging_steps):
            length.correct(state, accelerator)
    return state, rates


@pytest.mark.parametrize("logging_steps", [1, 10])
@pytest.mark.parametrize(
    "step_seconds",
    [
        lambda step: 0.5,
        lambda step: 20.0 if step == 0 else 0.5,  # the first step compiles
        lambda step: 0.5 if step < 60 else 1.0,  # another job comes
        lambda step: 0.4 + 0.3 * (step % 7 == 0),
    ],
    ids=["steady", "slow_start", "slower", "uneven"],
)
def test_a_run_ends_on_time_and_its_rate_follows_the_time(
    step_seconds: Callable[[int], float], logging_steps: int
) -> None:
    state, rates = simulated_run(step_seconds, logging_steps)
    assert state.elapsed_s == pytest.approx(60 * MINUTES, abs=1.5)
    seconds = [sum(map(step_seconds, range(step))) for step in range(len(rates))]
    for step, rate in enumerate(rates):
        if step < WARMUP_STEPS:
            assert rate == learning_rate_at(step, LINEAR)
        elif step > max(WARMUP_STEPS, logging_steps):
            assert rate == pytest.approx(1 - seconds[step] / (60 * MINUTES), abs=0.06)
    assert rates[-1] < 0.05


def test_without_a_limit_nothing_is_corrected() -> None:
    state, schedule = TrainingState(), replace(LINEAR, max_steps=20)
    length = RunLength(Arguments(train_file=["text"]), schedule, state)
    assert state.max_steps == 20
    for _ in range(20):
        assert length.learning_rate(state) == learning_rate_at(state.step, schedule)
        state.elapsed_s += 100
        state.advance(1, 1)
        length.correct(state, Accelerator(cpu=True))
    assert state.is_done


def test_training_stops_after_the_minutes(tiny_run: list[str], train_here: Callable[[list[str]], int]) -> None:
    minutes = 0.03
    assert train_here([*tiny_run, "--train_minutes", str(minutes)]) == 0  # in place of the 12 steps of tiny_run
    run_dir = Path(tiny_run[tiny_run.index("--output_dir") + 1])
    last = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()][-1]
    assert last["step"] > 12
    assert last["elapsed_s"] == pytest.approx(60 * minutes, rel=0.15)
    state = json.loads((run_dir / f"checkpoint-{last['step']}" / "training_state.json").read_text())
    assert state["max_steps"] == last["step"]


def test_a_resumed_run_takes_the_rates_of_the_uninterrupted_one_until_the_next_correction() -> None:
    args = Arguments(train_file=["text"], train_minutes=MINUTES)
    state = TrainingState(step=40, elapsed_s=30.0, max_steps=160, timed_step=40, timed_share=0.25)
    uninterrupted, resumed = RunLength(args, LINEAR, state), RunLength(args, LINEAR, replace(state, step=44))
    later = replace(state, step=44)
    assert uninterrupted.learning_rate(later) == resumed.learning_rate(later) == pytest.approx(0.725, abs=1e-4)


def test_a_finished_run_continues_with_more_minutes() -> None:
    state = TrainingState(step=100, elapsed_s=60.0, max_steps=100, timed_step=100, timed_share=1.0)
    RunLength(Arguments(train_file=["text"], train_minutes=3.0), LINEAR, state)
    assert state.max_steps == 300
    assert state.timed_share == pytest.approx(1 / 3)


def test_a_decay_in_steps_does_not_fit_a_run_in_minutes() -> None:
    with pytest.raises(ValueError, match="num_decay_steps has no effect with train_minutes"):
        Arguments(train_file=["text"], train_minutes=1.0, lr_scheduler_type="warmup_stable_decay", num_decay_steps=5)


def test_the_option_is_recorded(tmp_path: Path) -> None:
    assert yaml.safe_load(Arguments(train_file=["text"], train_minutes=1.5).as_yaml())["train_minutes"] == 1.5
