"""Laws of the choice of a run for a given time: the best of all combinations, within what is given and what fits."""

import itertools

import numpy as np
import pytest

from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments
from minigpt.planning.scaling_law import DROPOUT_COST, LAW, LAW_WITH_DROPOUT, ModelSize, TextNumbers
from minigpt.planning.text_profile import TextProfile, TokenizedSample, Vocabulary
from minigpt.planning.time_budget import ALMOST, CLOSE, LAYERS, MeasuredSpeed, TimedRun, choose_run
from minigpt.utils.errors import UserError

PEAK = 1e11
TEXT_BYTES = 2e7
VOCABULARIES = [Vocabulary(512, 1.9), Vocabulary(2048, 3.0), Vocabulary(8192, 3.9)]
TEXT = TextNumbers(difficulty=1.4, slope=1.2, vocabulary_gain=0.12)


@pytest.fixture(autouse=True)
def profile(monkeypatch: pytest.MonkeyPatch) -> TextProfile:
    """A text with three vocabularies, instead of one that would have to be looked at for each test."""
    ids = np.zeros(1, np.int64)
    text = TextProfile(TEXT_BYTES, {"LATIN": 1.0}, [TokenizedSample(each, ids, ids, 1, 1) for each in VOCABULARIES])
    monkeypatch.setattr("minigpt.planning.time_budget.profile_text", lambda args, sizes: text)
    return text


def flops_per_token(args: Arguments, vocab_size: int) -> float:
    assert args.hidden_size is not None
    assert args.num_hidden_layers is not None
    return 6 * args.hidden_size * (12 * args.num_hidden_layers * args.hidden_size + vocab_size)


class FakeDevice:
    """Larger models reach more FLOP/s on it, and models above `largest` FLOPs per token do not fit."""

    def __init__(
        self, scale: float = 1.0, largest: float = float("inf"), processes: int = 1, micro_batch: int = 10**9
    ) -> None:
        self.scale, self.largest, self.processes, self.micro_batch = scale, largest, processes, micro_batch

    def measure_text(self, args: Arguments, profile: TextProfile) -> TextNumbers:
        return TEXT

    def peak_flops(self) -> float:
        return PEAK

    def speed(self, args: Arguments, vocab_size: int) -> MeasuredSpeed | None:
        flops = flops_per_token(args, vocab_size)
        if flops > self.largest:
            return None
        tokens_per_s = self.scale * 0.5 * PEAK / (1 + 1e7 / flops) / flops
        return MeasuredSpeed(tokens_per_s, min(args.per_device_train_batch_size, self.micro_batch))


def choice(*words: str, minutes: float = 5, device: FakeDevice | None = None) -> TimedRun:
    device = device or FakeDevice()
    args = parse_arguments(["--corpus", "python-docs", "--use_cpu", "--train_minutes", str(minutes), *words])
    given = {word[2:] for word in words if word.startswith("--")} | {"corpus", "train_minutes", "use_cpu"}
    return choose_run(args, given, device.processes, device=device)


@pytest.mark.parametrize("minutes", [0.2, 1, 3, 10, 60, 1000])
def test_no_combination_is_predicted_to_be_better_than_the_chosen_one(minutes: float) -> None:
    """With speeds that only a measurement tells; all combinations are computed here without any search."""
    run = choice(minutes=minutes)
    losses, after_all_minutes = {}, {}
    for (width, layers), vocabulary in itertools.product(LAYERS.items(), VOCABULARIES):
        args = run.args.with_values(hidden_size=width, num_hidden_layers=layers, num_attention_heads=1)
        measured = FakeDevice().speed(args, vocabulary.size)
        assert measured is not None
        size = ModelSize.of(width, layers, vocabulary.size)
        by_dropout: list[list[tuple[float, float]]] = []  # of every length, the longest first: loss, epochs
        for law, cost in ((LAW, 1.0), (LAW_WITH_DROPOUT, DROPOUT_COST)):
            by_dropout.append([])
            for number in range(41):
                text_bytes = 60 * minutes / 2 ** (number / 4) * measured.tokens_per_s * vocabulary.bytes_per_token
                epochs = text_bytes / TEXT_BYTES
                slope = TEXT.slope * (2048 / vocabulary.size) ** TEXT.vocabulary_gain
                loss = TEXT.difficulty * cost * law.relative_loss(size, text_bytes, epochs, slope)
                by_dropout[-1].append((loss, epochs))
        lengths = min(by_dropout, key=min)
        lowest = min(loss for loss, _ in lengths)
        after_all_minutes[width, layers, vocabulary.size] = lengths[0][0]
        # a shorter run that is almost as good is preferred where it reads the text again
        losses[width, layers, vocabulary.size] = [
            loss for loss, epochs in lengths if loss == lowest or (epochs > 1 and loss <= ALMOST * lowest)
        ][-1]
    chosen = (run.args.hidden_size, run.args.num_hidden_layers, run.args.tokenizer_vocab_size)
    assert losses[chosen] <= CLOSE * min(losses.values())
    assert run.bits_per_byte == pytest.approx(losses[chosen])
    assert run.predictions[0].after_all_minutes == pytest.approx(after_all_minutes[chosen])


@pytest.mark.parametrize(("minutes", "reason"), [(700, "less than 0.5%"), (10000, "over-fit")])
def test_a_shorter_run_says_whether_more_time_would_do_harm(minutes: float, reason: str) -> None:
    run = choice("--hidden_size", "256", minutes=minutes)
    best = run.predictions[0]
    assert best.minutes < minutes
    assert (best.after_all_minutes > best.bits_per_byte) == (reason == "over-fit")
    assert reason in next(line for line in run.lines() if line.startswith("time"))


def test_more_time_and_a_faster_device_are_the_same_and_never_worse() -> None:
    losses = [choice(minutes=minutes).bits_per_byte for minutes in (0.5, 1, 2, 4, 8, 16)]
    assert all(later <= CLOSE * earlier for earlier, later in itertools.pairwise(losses))
    for device in (FakeDevice(scale=2.0), FakeDevice(processes=2)):
        assert choice(minutes=2, device=device).bits_per_byte == pytest.approx(losses[3], rel=CLOSE - 1)


@pytest.mark.parametrize("processes", [1, 4])
def test_the_run_takes_the_time(processes: int) -> None:
    """Steps, their tokens and the measured speed give the minutes."""
    run = choice(minutes=7, device=FakeDevice(processes=processes))
    samples = processes * run.args.per_device_train_batch_size * run.args.gradient_accumulation_steps
    tokens = run.steps * samples * run.args.block_size
    assert tokens / run.tokens_per_s == pytest.approx(7 * 60, rel=0.01)


def test_the_batch_grows_with_the_tokens_that_are_read_and_not_with_those_hoped_for() -> None:
    """A device that is far slower than its peak reads less than the search hoped for at first."""
    slow, fast = choice(minutes=3, device=FakeDevice(scale=0.01)), choice(minutes=3)
    for run in (slow, fast):
        batch = run.args.per_device_train_batch_size * run.args.block_size
        assert 0.7 < batch / (2048 * (run.predictions[0].tokens / 1.2e6) ** 0.5) < 1.42 or batch == 128


@pytest.mark.parametrize(
    "words",
    [
        "--hidden_size 160",
        "--hidden_size 100 --num_attention_heads 5",
        "--num_hidden_layers 3 --tokenizer_vocab_size 2048",
        "--block_size 64 --per_device_train_batch_size 3",
        "--optimizer adamw",
        "--optimizer adamw --learning_rate 5e-4 --dropout 0.3",
        "--warmup_steps 7 --logging_steps 3 --eval_steps 11 --save_steps 13 --validation_split_percentage 3.5",
    ],
)
def test_what_is_given_is_kept(words: str) -> None:
    args = choice(*words.split()).args
    for name, value in zip(words.split()[::2], words.split()[1::2], strict=True):
        assert str(getattr(args, name[2:])) in (value, str(float(value)) if value[0].isdigit() else "")


def test_rates_fall_with_the_width_and_that_of_muon_more_slowly() -> None:
    narrow, middle, wide = (choice("--hidden_size", str(width)).args for width in (192, 384, 768))
    for narrower, wider in ((narrow, middle), (middle, wide)):
        assert wider.learning_rate < wider.muon_learning_rate < narrower.muon_learning_rate
    assert narrow.learning_rate / wide.learning_rate == pytest.approx(4, rel=0.05)
    assert narrow.muon_learning_rate / wide.muon_learning_rate == pytest.approx(2, rel=0.05)


def test_heads_divide_the_width() -> None:
    for width in (64, 90, 97, 100, 1600):
        args = choice("--hidden_size", str(width)).args
        assert width % args.num_attention_heads == 0


def test_a_model_that_does_not_fit_is_not_chosen() -> None:
    unlimited = choice(minutes=300)
    assert unlimited.args.hidden_size is not None
    limit = 6 * 128 * (12 * 4 * 128 + 8192)
    small = choice(minutes=300, device=FakeDevice(largest=limit))
    assert flops_per_token(small.args, small.args.tokenizer_vocab_size) <= limit
    assert flops_per_token(unlimited.args, unlimited.args.tokenizer_vocab_size) > limit
    with pytest.raises(UserError, match="no model fits"):
        choice(device=FakeDevice(largest=0))


def test_the_micro_batch_that_fits_is_part_of_the_run() -> None:
    whole, accumulated = choice().args, choice(device=FakeDevice(micro_batch=4)).args
    assert whole.per_device_train_batch_size > 4
    assert accumulated.per_device_train_batch_size == 4
    assert 4 * accumulated.gradient_accumulation_steps == whole.per_device_train_batch_size


@pytest.mark.parametrize(("processes", "limit"), [(3, 4), (1, 5), (7, 2)])
def test_no_sample_is_lost_where_the_limit_does_not_divide_the_batch(processes: int, limit: int) -> None:
    whole = choice(device=FakeDevice(processes=processes)).args
    divided = choice(device=FakeDevice(processes=processes, micro_batch=limit)).args
    assert divided.per_device_train_batch_size <= limit
    samples = [args.per_device_train_batch_size * args.gradient_accumulation_steps for args in (whole, divided)]
    assert samples[0] == samples[1]


def test_a_given_batch_that_does_not_fit_is_refused_and_not_divided() -> None:
    with pytest.raises(UserError, match="no model fits"):
        choice("--per_device_train_batch_size", "6", device=FakeDevice(micro_batch=4))
