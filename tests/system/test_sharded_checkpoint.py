"""Laws of the checkpoints of sharded models: any number of ranks loads them, and they appear whole or not at all."""

import json
import signal
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from minigpt.training.checkpoint_files import find_damage
from minigpt.utils.run_files import find_checkpoints
from support import fork_server
from support.runs import ROOT
from support.sharding_on_cpu import FSDP2, hsdp
from support.tensors import different_tensors

TRAINER, SAVED_AGAIN = (str(ROOT / "tests" / "support" / name) for name in ("sharded_trainer.py", "saved_again.py"))
LAUNCHES: dict[str, tuple[int, dict[str, str]]] = {
    "one process": (1, {}),
    "2 DDP": (2, {}),
    "2 FSDP2": (2, FSDP2),
    "4 FSDP2": (4, FSDP2),
    "2 x 2 HSDP": (4, hsdp(2, 2)),
}
DIFFERENT = ("one process", "2 DDP", "4 FSDP2", "2 x 2 HSDP")


@pytest.fixture
def words(tiny_run: list[str]) -> list[str]:
    """A run of three steps with four micro-batches on one process."""
    index = tiny_run.index("--output_dir")
    options = ["--dropout", "0", "--max_steps", "3", "--save_steps", "1", "--eval_steps", "3"]
    return [*tiny_run[:index], *tiny_run[index + 2 :], *options]


def launch(program: str, words: list[str], launch: str, run_dir: Path) -> list[fork_server.Process]:
    processes, profile = LAUNCHES[launch]
    options = ["--gradient_accumulation_steps", str(4 // processes), "--output_dir", str(run_dir)]
    return fork_server.start_ranks([sys.executable, program, *words, *options], processes, profile)


def finish(ranks: list[fork_server.Process]) -> None:
    assert fork_server.finish_ranks(ranks, timeout=120) == 0, "".join(rank.stderr() for rank in ranks)


@pytest.mark.parametrize(
    "saved_by", ["2 x 2 HSDP", *(pytest.param(name, marks=pytest.mark.slow) for name in DIFFERENT[:3])]
)
def test_every_launch_loads_what_any_other_has_saved_bit_for_bit(
    words: list[str], tmp_path: Path, saved_by: str
) -> None:
    words = [*words, "--optimizer", "muon"]  # with AdamW for embeddings and vectors
    finish(launch(TRAINER, words, saved_by, tmp_path / "run"))
    saved = tmp_path / "run" / "checkpoint-3"
    assert find_damage(saved) is None
    resumed = [*words, "--resume_from_checkpoint", str(saved)]
    for number, loaded_by in enumerate(DIFFERENT):
        finish(launch(SAVED_AGAIN, resumed, loaded_by, tmp_path / str(number)))
        again = tmp_path / str(number) / "checkpoint-3"
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert different_tensors(saved, again, file) == [], f"{file} loaded by {loaded_by}"


def test_a_sharded_checkpoint_is_a_folder_of_transformers_with_a_fair_share_of_bytes_for_each_rank(
    words: list[str], tmp_path: Path
) -> None:
    for name, launched in (("alone", "one process"), ("sharded", "4 FSDP2")):
        finish(launch(TRAINER, words, launched, tmp_path / name))
    for folder in (tmp_path / "sharded", tmp_path / "sharded" / "checkpoint-3"):
        assert not (folder / "model.safetensors").exists()
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone", trust_remote_code=True)
        for (key, weight), (other, expected) in zip(
            model.state_dict().items(), alone.state_dict().items(), strict=True
        ):
            assert key == other
            assert (weight - expected).abs().max() < 1e-5, key
    for kind in ("model", "optimizer"):
        files = sorted((tmp_path / "sharded" / "checkpoint-3").glob(f"{kind}-*.safetensors"))
        assert [path.name for path in files] == [f"{kind}-{rank:05d}-of-00004.safetensors" for rank in (1, 2, 3, 4)]
        sizes, largest = [], 0
        for path in files:
            with safe_open(path, "pt") as file:
                tensors = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
            sizes.append(sum(tensors))
            largest = max(largest, *tensors)
        assert max(sizes) <= sum(sizes) / 4 + largest
    index = json.loads((tmp_path / "sharded" / "checkpoint-3" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        parameter.numel() * parameter.element_size() for parameter in alone.parameters()
    )


def test_a_sharded_checkpoint_that_is_written_in_the_background_is_the_same(words: list[str], tmp_path: Path) -> None:
    for name, options in (("at_once", []), ("background", ["--async_save"])):
        finish(launch(TRAINER, [*words, *options], "4 FSDP2", tmp_path / name))
    for step in (1, 2, 3):
        for file in ("model.safetensors", "optimizer.safetensors"):
            first, second = (tmp_path / name / f"checkpoint-{step}" for name in ("at_once", "background"))
            assert different_tensors(first, second, file) == []


BY_ALL = ("before the folder", "before the model's share", "before the optimizer's share")
BY_RANK_0 = ("before the seal", "before it appears")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for a run without kills, which the first test that needs it trains."""
    return tmp_path_factory.mktemp("uninterrupted") / "run"


@pytest.mark.parametrize(
    ("rank", "phase"),
    [
        (1, "before the optimizer's share"),
        (0, "before the seal"),
        *(pytest.param(1, phase, marks=pytest.mark.slow) for phase in BY_ALL[:2]),
        *(pytest.param(0, phase, marks=pytest.mark.slow) for phase in (*BY_ALL, BY_RANK_0[1])),
    ],
)
def test_a_rank_that_is_killed_while_it_saves_leaves_the_former_checkpoint_the_newest(
    words: list[str],
    tmp_path: Path,
    rank: int,
    phase: str,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not uninterrupted.exists():
        finish(launch(TRAINER, words, "2 FSDP2", uninterrupted))
    monkeypatch.setenv("KILLED_AT", json.dumps({"rank": rank, "phase": phase, "step": 2}))
    ranks = launch(TRAINER, words, "2 FSDP2", tmp_path / "run")
    fork_server.finish_ranks(ranks, timeout=60)
    monkeypatch.delenv("KILLED_AT")
    assert ranks[rank].returncode == -signal.SIGKILL
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert find_damage(tmp_path / "run" / "checkpoint-1") is None

    finish(launch(TRAINER, [*words, "--resume_from_checkpoint", "latest"], "2 FSDP2", tmp_path / "run"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        first, second = (folder / "checkpoint-3" for folder in (tmp_path / "run", uninterrupted))
        assert different_tensors(first, second, file) == []
    assert not list((tmp_path / "run").glob(".writing-*"))


@pytest.mark.slow
def test_the_memory_that_saving_takes_on_rank_0_falls_with_the_number_of_ranks(
    text_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """43 million parameters, 487 MiB of weights and moments."""
    options = (
        f"--train_file {text_file} --tokenizer char --cache_dir {cache_dir} --hidden_size 768 --num_hidden_layers 6 "
        "--num_attention_heads 12 --block_size 64 --max_steps 5 --use_cpu --report_to none --sample_max_new_tokens 1"
    )
    program = [sys.executable, str(ROOT / "tests" / "support" / "save_memory.py"), *options.split()]
    grown = []
    for ranks in (1, 2, 4, 8):
        output_dir = str(tmp_path / str(ranks))
        processes = fork_server.start_ranks([*program, "--output_dir", output_dir], ranks, FSDP2 if ranks > 1 else {})
        finish(processes)
        grown.append(int(processes[0].stdout().split("grown by ")[1].split()[0]))
    print(f"MiB on 1, 2, 4 and 8 ranks: {grown}")
    one, two, four, eight = grown
    assert one < 487 / 10  # one process writes what it holds
    assert 487 / 3 < two < 0.7 * 487  # its share; a part of it may have been free memory of the process
    assert four < 0.7 * two
    assert eight < 0.7 * four
