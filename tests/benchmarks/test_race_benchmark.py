"""`minigpt bench race`: the curve of nanoGPT's output is its losses at the time that was spent on training."""

from pathlib import Path

from minigpt.benchmarks.race import draw, nanogpt_curve, table, trained_s

LOG = """
step 0: train loss 4.20, val loss 4.21
iter 0: loss 4.1900, time 9000.00ms, mfu -100.00%
iter 1: loss 4.0000, time 1000.00ms, mfu -100.00%
iter 2: loss 3.9000, time 3000.00ms, mfu -100.00%
step 3: train loss 3.70, val loss 3.80
iter 3: loss 3.7000, time 8000.00ms, mfu 1.00%
iter 4: loss 3.6000, time 2000.00ms, mfu 1.00%
step 5: train loss 3.40, val loss 3.50
"""


def test_an_evaluation_is_not_training() -> None:
    """Steps 1, 2 and 4 take two seconds in the mean; steps 0 and 3 count as much."""
    assert nanogpt_curve(LOG.split("step 5")[0]) == [(0.0, 4.21), (6.0, 3.80)]
    assert trained_s(LOG) == 6.0
    assert trained_s("") == 0.0


def test_the_table_has_the_last_evaluation_before_each_quarter(tmp_path: Path) -> None:
    theirs, ours = [(0.0, 4.2), (14.0, 3.0), (61.0, 2.0)], [(20.0, 2.5), (60.0, 1.5)]
    rows = [line.split("|")[1:-1] for line in table(theirs, ours, 1.0).splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0.25", "3.000", ""],
        ["0.5", "3.000", "2.500"],
        ["0.75", "3.000", "2.500"],
        ["1", "3.000", "1.500"],
    ]
    draw(theirs, ours, tmp_path / "race.png")
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_without_a_plain_step_has_no_time() -> None:
    assert nanogpt_curve("step 0: train loss 4.2, val loss 4.2\niter 0: loss 4.2, time 10.00ms") == [(0.0, 4.2)]
