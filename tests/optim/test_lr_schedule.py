import pytest

from minigpt.optim.lr_schedule import Schedule, learning_rate_at


def schedule(kind: str, warmup_steps: int = 10) -> Schedule:
    return Schedule(1.0, 0.1, warmup_steps, max_steps=110, lr_scheduler_type=kind)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_rises_by_equal_steps_to_the_peak(kind: str) -> None:
    rates = [learning_rate_at(step, schedule(kind)) for step in range(11)]
    assert rates == pytest.approx([(step + 1) / 11 for step in range(11)])


@pytest.mark.parametrize(("kind", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_decay_passes_its_middle_and_ends_at_the_floor(kind: str, middle: float) -> None:
    assert learning_rate_at(60, schedule(kind)) == pytest.approx(middle)
    assert learning_rate_at(110, schedule(kind)) == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_cosine_equals_the_closed_form_of_torch() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=110, eta_min=0.1)
    for step in range(110):
        assert learning_rate_at(step, schedule("cosine", 0)) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


def test_warm_up_stable_decay_equals_the_schedule_of_transformers_behind_the_warm_up() -> None:
    import torch
    from transformers import get_wsd_schedule

    ours = Schedule(1.0, 0.1, 10, max_steps=110, lr_scheduler_type="warmup_stable_decay", num_decay_steps=40)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_wsd_schedule(optimizer, 10, 40, num_training_steps=110, decay_type="linear", min_lr_ratio=0.1)
    for step in range(111):
        if step >= 10:  # theirs starts its warm-up at the floor, where the first step would do next to nothing
            assert learning_rate_at(step, ours) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


def test_impossible_schedules_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match="warmup_steps=120 is more than the 110 steps"):
        schedule("cosine", 120)
    with pytest.raises(ValueError, match="num_decay_steps=101 are more than the 110 steps"):
        Schedule(1.0, 0.1, 10, max_steps=110, lr_scheduler_type="warmup_stable_decay", num_decay_steps=101)
    with pytest.raises(ValueError, match="step=-1"):
        learning_rate_at(-1, schedule("cosine"))
