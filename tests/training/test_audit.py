"""Laws of `minigpt audit`: an honest run is sound, whoever trains it again; a run that was changed is not."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from minigpt.cli import main
from minigpt.training.audit import Audit
from minigpt.training.checkpoint_files import write_checksums
from minigpt.utils.run_files import checkpoint_step, find_checkpoints
from support.runs import command, finish

STEPS, SAVED, LOGGED = 240, 40, 2  # to train LOGGED steps after each of the six starts is 5 % of the run
Forgery = Callable[[Path, Path, random.Random], None]  # changes a run; has another run, and a source of choices


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path) -> tuple[Path, Path]:
    """Two runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("runs")
    words = (
        f"--train_file {text_file} --tokenizer char --cache_dir {cache_dir} --hidden_size 16 --num_hidden_layers 2 "
        f"--num_attention_heads 2 --block_size 16 --dropout 0 --per_device_train_batch_size 2 --optimizer muon "
        f"--gradient_accumulation_steps 2 --max_steps {STEPS} --save_steps {SAVED} --logging_steps {LOGGED} "
        "--save_total_limit 10 "
        "--eval_steps 0 --warmup_steps 2 --sample_max_new_tokens 1 --report_to none --use_cpu"
    ).split()
    for seed in ("1", "2"):
        trained = finish(command(*words, "--seed", seed, "--output_dir", folder / seed))
        assert trained.returncode == 0, trained.stderr
    return folder / "1", folder / "2"


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains again in a process that is forked from one with the imports done."""
    monkeypatch.setattr("minigpt.training.audit._run", finish)


def problems(run_dir: Path, **options: object) -> list[str]:
    audit = Audit(run_dir, **options)
    found = [check.problem for check in audit.checks() if check.problem]
    assert audit.cost <= 0.05
    return found


def seal(run_dir: Path) -> None:
    """Write the hashes of all checkpoints anew, as someone does who knows of them."""
    for checkpoint in find_checkpoints(run_dir):
        (checkpoint / "checkpoint.json").unlink()
        write_checksums(checkpoint)


def edit_loss(run: Path, other: Path, choice: random.Random) -> None:
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    line = choice.choice([line for line in lines if "train/loss" in line and line["step"] < STEPS])
    line["train/loss"] *= choice.choice([0.9, 0.99, 0.999])
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def swap_checkpoint(run: Path, other: Path, choice: random.Random) -> None:
    """The weights of a checkpoint become those of another run, or of another step; the last one is also the model."""
    step = choice.randrange(SAVED, STEPS + 1, SAVED)
    donor = other / f"checkpoint-{step}" if choice.random() < 0.5 else run / f"checkpoint-{step % STEPS + SAVED}"
    shutil.copy(donor / "model.safetensors", run / f"checkpoint-{step}")
    if step == STEPS:
        shutil.copy(donor / "model.safetensors", run)
    seal(run)


def change_data(run: Path, other: Path, choice: random.Random) -> None:
    """The run says that it was trained on a text of which some words are others; every record agrees with that."""
    text = Path(yaml.safe_load((run / "arguments.yaml").read_text(encoding="utf-8"))["train_file"][0])
    words = text.read_text(encoding="utf-8").split(" ")
    for number in choice.sample(range(len(words)), len(words) // 4):
        words[number] = choice.choice(["cat", "dog", "tree"])
    changed = run / "text.txt"
    changed.write_text(" ".join(words), encoding="utf-8")
    change_options(run, train_file=[str(changed)])
    fingerprint = prepared_fingerprint(run)
    for record in (run / "data.json", *run.glob("checkpoint-*/training_state.json")):
        values = json.loads(record.read_text(encoding="utf-8"))
        values["fingerprint" if record.name == "data.json" else "data_fingerprint"] = fingerprint
        record.write_text(json.dumps(values), encoding="utf-8")
    seal(run)


def prepared_fingerprint(run: Path) -> str:
    from minigpt.config.parser import parse_arguments
    from minigpt.data.datamodule import load_data

    return load_data(parse_arguments([str(run / "arguments.yaml")], program="test"))[0].fingerprint


def claim_other_options(run: Path, other: Path, choice: random.Random) -> None:
    """The run says that it was trained with another value of an option; every record agrees with that."""
    options = {
        "learning_rate": 2e-4, "muon_learning_rate": 0.03, "weight_decay": 0.0, "dropout": 0.1, "seed": 3,
        "lr_scheduler_type": "linear", "muon_momentum": 0.9, "max_grad_norm": 0.1, "adam_beta2": 0.9,
    }  # fmt: skip
    name = choice.choice(list(options))
    change_options(run, **{name: options[name]})
    if name == "dropout":
        for config in (run / "config.json", *run.glob("checkpoint-*/config.json")):
            values = json.loads(config.read_text(encoding="utf-8"))
            config.write_text(json.dumps(values | dict.fromkeys(("embd_pdrop", "resid_pdrop"), 0.1)), encoding="utf-8")
    seal(run)


def change_options(run: Path, **options: object) -> None:
    for file in (run / "arguments.yaml", *run.glob("checkpoint-*/arguments.yaml")):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        file.write_text(yaml.safe_dump(values | options), encoding="utf-8")


FORGERIES = (edit_loss, swap_checkpoint, change_data, claim_other_options)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_honest_run_is_sound(runs: tuple[Path, Path], processes: int) -> None:
    assert problems(runs[0], seed=processes, processes=processes) == []


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 5))])
@pytest.mark.parametrize("forge", FORGERIES)
def test_a_changed_run_is_found_out_at_a_twentieth_of_its_cost(
    runs: tuple[Path, Path], forge: Forgery, number: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    forge(run, runs[1], random.Random(f"{forge.__name__}{number}"))
    assert problems(run, seed=number) != []


def test_a_longer_audit_compares_the_weights_at_the_end_of_a_stretch(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing follows the last checkpoint, so only the way to it, or its validation loss, can tell."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    for folder in (run, run / f"checkpoint-{STEPS}"):
        file = folder / "model.safetensors"
        larger = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
        save_file(larger, file, {"format": "pt"})
    seal(run)
    audit = Audit(run, share=1.0)
    assert [stretch.end for stretch in audit.stretches()] == [checkpoint_step(path) for path in find_checkpoints(run)]
    found = " ".join(check.problem for check in audit.checks())
    assert f"checkpoint-{STEPS} is " in found
    assert audit.cost == 1.0


def test_stretches_are_random_start_everywhere_and_stay_in_the_budget(runs: tuple[Path, Path]) -> None:
    chosen = [Audit(runs[0], share=0.1, seed=seed).stretches() for seed in range(20)]
    for stretches in chosen:
        assert [stretch.start for stretch in stretches] == list(range(0, STEPS, SAVED))
        assert sum(stretch.steps for stretch in stretches) == 0.1 * STEPS
        assert all(stretch.end % LOGGED == 0 for stretch in stretches if stretch.start)
    assert len({tuple(stretch.end for stretch in stretches) for stretches in chosen}) > 10


def test_the_command_says_what_is_wrong_and_exits_with_1(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    edit_loss(run, runs[1], random.Random(0))
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(run)])
    assert stop.value.code == 1
    output = capsys.readouterr().out
    assert "FAILED  metrics.jsonl\n        it does not begin as it did when checkpoint-" in output
    assert output.splitlines()[-1].startswith(f"NOT sound: 0 of {STEPS} steps trained again")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "is not a run of MiniGPT: it has no arguments.yaml"),
        (["--share", "0"], "share=0.0 must be above 0 and at most 1"),
        (["--num_processes", "0"], "num_processes=0 must be at least 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(tmp_path), *words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("name", ["arguments.yaml", "metrics.jsonl", "data.json", "environment.json"])
@pytest.mark.parametrize("content", ["{\n", "[1]\n", None])
def test_a_damaged_file_of_the_run_is_named_in_one_line(
    runs: tuple[Path, Path], name: str, content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(run)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
