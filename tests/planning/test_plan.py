"""Laws of `minigpt plan`: what it says of a run, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt.cli import main
from minigpt.config.arguments import Arguments
from minigpt.planning import step_time
from minigpt.planning.plan import planned_config
from support.runs import ROOT

TINY_SHAPE = (
    "--tokenizer_vocab_size 300 --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --block_size 16"
)
TINY_RUN = "--per_device_train_batch_size 4 --gradient_accumulation_steps 6 --max_steps 12 --use_cpu"
TINY = f"{TINY_SHAPE} {TINY_RUN}".split()
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["minigpt"])


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    main(["plan", QUICKSTART, *TINY, "--json", *words])
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that bad input gives."""
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_plan_says_steps_memory_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    plan = told(capsys)
    assert plan["tokens_per_step"] == 4 * 6 * 16
    assert plan["steps"] == 12
    assert plan["peak_gib"] == pytest.approx(sum(plan["memory_gib"].values()))
    assert 0 < plan["step_s"] < 10
    assert plan["run_s"] == pytest.approx(12 * plan["step_s"])


def test_the_table_ends_its_parts_with_their_sum(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", QUICKSTART, *TINY, "--no_probe"])
    rows = capsys.readouterr().out.split("GiB; ")[1].split("\n\n")[0].splitlines()[1:]
    *parts, total = [float(row.split()[-1]) for row in rows]
    assert total == pytest.approx(sum(parts), abs=0.0005 * (len(parts) + 1))  # each is rounded to 0.001


def test_devices_multiply_the_tokens_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "--devices", "4", "--no_probe")["tokens_per_step"] == 4 * 4 * 6 * 16


def test_a_proposal_is_within_the_memory_and_keeps_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    proposal = told(capsys, "--memory", "64", "--no_probe")["proposal"]
    assert proposal["per_device_train_batch_size"] * proposal["gradient_accumulation_steps"] == 24
    assert proposal["per_device_train_batch_size"] == 24
    assert proposal["peak_gib"] <= 64


def test_a_preset_that_names_no_text_can_be_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("hidden_size: 16\nnum_hidden_layers: 1\nnum_attention_heads: 2\nblock_size: 8\n")
    main(["plan", str(preset), "--no_probe", "--json", "--use_cpu"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] is None
    assert plan["parameters"] > 0


def test_ids_of_a_character_tokenizer_are_those_of_the_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcabc" * 50)
    args = Arguments(train_file=[str(text)], tokenizer="char", block_size=8)
    assert planned_config(args).vocab_size == len("abc") + 1


def test_a_gpu_that_is_not_here_takes_the_time_of_its_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    half, full = (told(capsys, "--device", "H100", "--efficiency", share) for share in ("0.5", "1"))
    flops = full["flops_per_token"] * full["tokens_per_step"]
    assert full["step_s"] == pytest.approx(flops / 989e12)
    assert half["step_s"] == pytest.approx(2 * full["step_s"])


def test_time_lies_on_the_line_through_two_numbers_of_layers() -> None:
    few, more = step_time.StepTime(2.0, 0.5), step_time.StepTime(4.0, 0.7)
    twelve = step_time.line((1, few), (3, more), 12)
    assert twelve.micro_batch_s == pytest.approx(2.0 + 11 * 1.0)
    assert twelve.update_s == pytest.approx(0.5 + 11 * 0.1)
    assert twelve.step_s(4) == pytest.approx(4 * 13.0 + 1.6)


def test_a_probe_of_many_layers_runs_a_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    args = Arguments(corpus="python-docs", hidden_size=16, num_attention_heads=2, num_hidden_layers=40, block_size=8)
    built = []
    real = step_time._Stepper.__init__
    monkeypatch.setattr(
        step_time._Stepper, "__init__", lambda self, a, c, n, *rest: built.append(n) or real(self, a, c, n, *rest)
    )
    time = step_time.measured(args, planned_config(args), 1, "no", torch.device("cpu"))
    assert built == [1, step_time.FEW_LAYERS]
    assert time.micro_batch_s > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "-1"], "memory=-1.0 must be a number of GiB above 0"),
        (["--memory", "nan"], "memory=nan must be"),
        (["--memory", "lots"], "invalid float value: 'lots'"),
        (["--devices", "0"], "devices=0 must be at least 1"),
        (["--fsdp"], "give --devices"),
        (["--device", "H1000"], "device=H1000 is neither here nor one of"),
        (["--hiden_size", "8"], "unknown option --hiden_size; did you mean --hidden_size?"),
        (["--memroy", "8"], "unknown option --memroy; did you mean --memory?"),
        (["--hidden_size", "7", "--num_attention_heads", "2"], "hidden_size"),
        (["--memory", "0.001", "--use_cpu"], "even with per_device_train_batch_size=1 this run needs"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in refused(capsys, QUICKSTART, *words)


def test_a_missing_preset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml: No such file" in refused(capsys, "nowhere.yaml")
    assert "give a preset" in refused(capsys)


def test_characters_without_a_text_say_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--train_file" in refused(capsys, str(ROOT / "configs" / "shakespeare_char_cpu.yaml"))


def test_help_imports_no_heavy_library() -> None:
    program = (
        "import sys; from minigpt.cli import main\n"
        "try: main(['plan', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines()[-1] == "[]"
