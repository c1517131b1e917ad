"""Laws of the learning-rate schedule: parity with torch and transformers, its limits, and every group scaled alike."""

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from minigpt.config.parser import parse_arguments
from minigpt.optim.lr_schedule import Schedule, build_schedule, learning_rate_at, set_learning_rate
from minigpt.optim.optimizer import build_optimizer

DECAYS = ["cosine", "linear", "warmup_stable_decay"]
WARMUP_STEPS, MAX_STEPS = 10, 110
LEARNING_RATE, MUON_LEARNING_RATE, MIN_LEARNING_RATE = 6e-4, 0.02, 7e-5


def schedule(kind: str, warmup_steps: int = WARMUP_STEPS) -> Schedule:
    return Schedule(1.0, 0.1, warmup_steps, MAX_STEPS, lr_scheduler_type=kind)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_equals_torchs_linear_schedule(kind: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 11, end_factor=1.0, total_iters=10)
    for step in range(WARMUP_STEPS + 1):
        assert learning_rate_at(step, schedule(kind)) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


def test_cosine_equals_the_closed_form_of_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=MAX_STEPS, eta_min=0.1)
    for step in range(MAX_STEPS):
        assert learning_rate_at(step, schedule("cosine", 0)) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("num_decay_steps", [40, MAX_STEPS - WARMUP_STEPS])
def test_stable_phase_and_linear_decay_equal_the_schedule_of_transformers(num_decay_steps: int) -> None:
    from transformers import get_wsd_schedule

    ours = Schedule(1.0, 0.1, WARMUP_STEPS, MAX_STEPS, "warmup_stable_decay", num_decay_steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_wsd_schedule(
        optimizer, WARMUP_STEPS, num_decay_steps, num_training_steps=MAX_STEPS, decay_type="linear", min_lr_ratio=0.1
    )
    for step in range(MAX_STEPS + 1):
        if step >= WARMUP_STEPS:  # transformers starts its warm-up at the minimum, MiniGPT above zero
            assert learning_rate_at(step, ours) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
            if num_decay_steps == MAX_STEPS - WARMUP_STEPS:  # no stable phase: a plain linear decay
                assert learning_rate_at(step, ours) == learning_rate_at(step, schedule("linear"))
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("warmup_steps", [0, 0.03, 0.5, 1, 7])
@pytest.mark.parametrize("max_steps", [7, 110, 3001])
def test_a_warm_up_below_1_is_a_part_of_all_steps_as_in_transformers(warmup_steps: float, max_steps: int) -> None:
    words = ["--corpus", "python-docs", "--warmup_steps", str(warmup_steps)]
    ours = build_schedule(parse_arguments(words), max_steps, processes=1).warmup_steps
    assert ours == TrainingArguments(warmup_steps=warmup_steps).get_warmup_steps(max_steps)


def rates_of_run(processes: int, *options: str) -> list[list[float]]:
    """The rates of all parameter groups, Muon's last, at every step and at `MAX_STEPS`, where the decay ends."""
    words = (
        f"--corpus python-docs --optimizer muon --muon_learning_rate {MUON_LEARNING_RATE} "
        f"--learning_rate {LEARNING_RATE} --min_learning_rate {MIN_LEARNING_RATE} --warmup_steps {WARMUP_STEPS}"
    )
    args = parse_arguments([*words.split(), *options], "")
    layers, head = nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2)
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"layers": layers}), "lm_head": head})
    optimizer = build_optimizer(model, args, torch.device("cpu"))
    run_schedule = build_schedule(args, MAX_STEPS, processes)
    rates = []
    for step in range(MAX_STEPS + 1):
        set_learning_rate(optimizer, learning_rate_at(step, run_schedule))
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize("kind", [*DECAYS, "constant"])
@pytest.mark.parametrize("processes", [3, 8])
def test_scaled_rates_are_those_of_one_process_times_the_number_of_processes(kind: str, processes: int) -> None:
    options = ["--lr_scheduler_type", kind]
    one_process = rates_of_run(1, *options)
    scaled = rates_of_run(processes, *options, "--scale_learning_rate")
    for rates, expected in zip(scaled, one_process, strict=True):
        assert rates == pytest.approx([processes * rate for rate in expected], rel=1e-12)
    assert rates_of_run(processes, *options) == one_process  # scaling is off by default


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("processes", [1, 3])
def test_decay_ends_exactly_at_the_minimum_and_muon_stays_above_its_share_of_it(kind: str, processes: int) -> None:
    rates = rates_of_run(processes, "--lr_scheduler_type", kind, "--scale_learning_rate")
    minimum = MIN_LEARNING_RATE * processes
    muon_minimum = minimum * (MUON_LEARNING_RATE / LEARNING_RATE)
    assert max(rates) == rates[WARMUP_STEPS]
    assert rates[WARMUP_STEPS:] == sorted(rates[WARMUP_STEPS:], reverse=True)
    assert all(muon_rate >= muon_minimum for *_, muon_rate in rates[WARMUP_STEPS:])
    assert rates[-2][0] > minimum
    assert rates[-1] == [minimum, minimum, muon_minimum]


def test_impossible_schedules_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match="warmup_steps=120 is more than the 110 steps"):
        schedule("cosine", 120)
    with pytest.raises(ValueError, match="num_decay_steps=101 are more than the 110 steps"):
        Schedule(1.0, 0.1, WARMUP_STEPS, MAX_STEPS, lr_scheduler_type="warmup_stable_decay", num_decay_steps=101)
    with pytest.raises(ValueError, match="step=-1"):
        learning_rate_at(-1, schedule("cosine"))
