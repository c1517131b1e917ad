"""Laws of stop requests: the first signal is remembered, and only a late second Ctrl-C ends the process at once."""

import os
import signal
from collections.abc import Iterator

import pytest

from minigpt.training.preemption import SIGNALS, StopRequest


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    with StopRequest() as stop:
        yield stop
    assert {number: signal.getsignal(number) for number in numbers} == handlers


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send itself these signals")
@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_asks_for_a_stop_and_the_first_one_is_remembered(stop: StopRequest, name: str) -> None:
    stop.listen()
    assert not stop.received_by_any_rank()
    signal.raise_signal(getattr(signal, name))
    signal.raise_signal(signal.SIGTERM)
    assert stop.received_by_any_rank()
    assert stop.received == name


def test_a_second_ctrl_c_ends_the_process_only_after_the_patience(
    stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop.listen()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # torchrun's copy of the same Ctrl-C
    monkeypatch.setattr(stop, "PATIENCE_S", -1.0)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGUSR1")
def test_before_the_steps_sigusr1_is_remembered_and_the_other_signals_end_the_process(stop: StopRequest) -> None:
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    stop.listen()
    assert stop.received_by_any_rank()


def test_after_the_steps_ctrl_c_ends_the_process(stop: StopRequest) -> None:
    stop.listen()
    stop.release()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
