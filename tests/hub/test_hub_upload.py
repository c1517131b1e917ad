"""Uploading, against a Hub on loopback that speaks the real protocol to the unmodified client."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt.config.arguments import Arguments
from minigpt.hub.background_push import BackgroundPush
from minigpt.hub.upload import Destination
from support.hub_client import TOKEN, USERS, WANDB_KEY, call, environment, upload
from support.hub_server import Blob, Hub, Repository, running_hub
from support.runs import ROOT, command


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub(USERS) as hub:
        yield hub


@pytest.fixture(scope="module")
def trained(hub: Hub, text_file: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was pushed to ann/pushed while it trained. Tests leave the folder as it is."""
    folder = tmp_path_factory.mktemp("hub")
    options = (
        f"--train_file {text_file} --tokenizer char --cache_dir {cache_dir} --output_dir {folder / 'run'} "
        "--hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --block_size 16 "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 32 --max_steps 12 --learning_rate 1e-2 "
        "--logging_steps 1 --eval_steps 6 --save_steps 5 --save_total_limit 1 --sample_max_new_tokens 5 --use_cpu "
        "--push_to_hub --hub_model_id ann/pushed"
    ).split()
    output = call(command(*options), environment(hub, folder))
    assert "step 5: uploaded" in output
    return folder / "run"


def test_training_pushes_its_saves_and_its_end_without_what_stays_here(hub: Hub, trained: Path) -> None:
    repo = hub.repos["ann/pushed"]
    assert repo.messages[:2] == ["initial commit", "Step 5"]  # of a checkpoint that was deleted meanwhile
    assert repo.messages[-1] == "End of training"
    files = repo.files()
    assert files["model.safetensors"] == (trained / "model.safetensors").read_bytes()
    assert files["metrics.jsonl"] == (trained / "metrics.jsonl").read_bytes()
    (tracked,) = [name for name in files if name.startswith("tensorboard/")]
    assert b"train/loss" in files[tracked]
    assert sorted(set(files) - {tracked}) == [
        "README.md", "config.json", "configuration_minigpt.py", "data.json", "environment.json",
        "generation_config.json", "loss.pdf", "loss.png", "metrics.jsonl", "model.safetensors", "modeling_minigpt.py",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert not list(trained.glob(".pushing*"))


def test_a_second_upload_sends_nothing_and_a_change_sends_only_itself(hub: Hub, trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    (run / ".env").write_text(f"HF_TOKEN={TOKEN}\n")  # no file of a model: stays here, and is in nobody's way
    (run / "notes.txt").write_text(WANDB_KEY)
    assert "uploaded" in upload(run, "ann/again", hub=hub, home=tmp_path)
    sent, commits = len(hub.sent("PUT", "/large/")), len(hub.repos["ann/again"].messages)
    assert "nothing to upload: ann/again has these 14 files already" in upload(
        run, "ann/again", hub=hub, home=tmp_path
    )
    assert len(hub.repos["ann/again"].messages) == commits
    assert len(hub.sent("PUT", "/large/")) == sent
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.5, "elapsed_s": 1.0}\n')
    assert "uploaded" in upload(run, "ann/again", hub=hub, home=tmp_path)
    (commit,) = hub.sent("POST", "/api/models/ann/again/commit/main")[1:]
    changed = [json.loads(line)["value"].get("path") for line in commit.splitlines()]
    assert changed == [None, "metrics.jsonl", "README.md"]  # None: the header


def test_the_published_snippet_works_as_printed_and_the_upload_writes_what_the_folder_writes(
    hub: Hub, trained: Path, tmp_path: Path
) -> None:
    snippet = hub.repos["ann/pushed"].files()["README.md"].decode().split("```python\n")[1].split("```")[0]
    assert '"ann/pushed"' in snippet
    program = snippet + (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('ann/pushed', trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained('ann/pushed', trust_remote_code=True)\n"
        "ids = model.generate(**tokenizer('The cat ', return_tensors='pt'), max_new_tokens=8, do_sample=False)\n"
        "print('TEXT', repr(tokenizer.decode(ids[0])))\n"
    )
    printed = call([sys.executable, "-c", program], environment(hub, tmp_path, HF_TOKEN=""))
    assert "\nThe" in f"\n{printed}"  # the snippet's own text begins with its prompt

    from transformers import AutoTokenizer

    from modeling_minigpt import MiniGPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(trained)
    prompt = tokenizer("The cat ", return_tensors="pt")
    ids = MiniGPTForCausalLM.from_pretrained(trained).generate(**prompt, max_new_tokens=8, do_sample=False)
    assert f"TEXT {tokenizer.decode(ids[0])!r}" in printed.splitlines()


def test_a_connection_cut_half_way_is_taken_up_again(hub: Hub, trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path, weights=b"cut")
    hub.cut_next = 1
    assert "uploaded" in upload(run, "ann/cut", hub=hub, home=tmp_path)
    assert hub.cut_next == 0
    assert hub.repos["ann/cut"].files()["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_a_killed_upload_leaves_no_commit_and_the_same_command_finishes_it(
    hub: Hub, trained: Path, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path, weights=b"killed")
    half, killed = threading.Event(), threading.Event()

    def wait_for_the_kill() -> None:
        half.set()
        killed.wait(60)

    hub.on_half = wait_for_the_kill
    words = [sys.executable, str(ROOT / "hub_upload.py"), str(run), "ann/killed"]
    process = subprocess.Popen(words, env=environment(hub, tmp_path), stderr=subprocess.DEVNULL)
    assert half.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    hub.on_half = lambda: None
    killed.set()
    assert hub.repos["ann/killed"].messages == ["initial commit"]
    assert "uploaded 14 files" in upload(run, "ann/killed", hub=hub, home=tmp_path)
    assert hub.repos["ann/killed"].files()["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_a_card_that_was_edited_on_the_hub_stays_and_one_that_was_edited_here_goes(
    hub: Hub, trained: Path, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path)
    hub.repos["ann/edited"] = Repository(private=False)
    hub.repos["ann/edited"].add_commit("main", "initial commit", {"README.md": Blob(b"# By hand, there", large=False)})
    upload(run, "ann/edited", hub=hub, home=tmp_path)
    assert hub.repos["ann/edited"].files()["README.md"] == b"# By hand, there"
    assert "model.safetensors" in hub.repos["ann/edited"].files()
    (run / "README.md").write_text("---\nlicense: mit\n---\n# By hand, here")
    upload(run, "ann/edited", hub=hub, home=tmp_path)
    assert hub.repos["ann/edited"].files()["README.md"].endswith(b"# By hand, here")


def test_a_push_that_fails_is_told_and_training_goes_on(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(trained, tmp_path)
    pushes = BackgroundPush(Arguments(train_file=["x"], output_dir=str(run)), is_main_process=True)
    pushes.start(12)
    assert not capsys.readouterr().out  # nobody asked for a push
    pushes.destination = Destination("ann/offline")
    for step in (12, 13):  # there is no Hub in this process, and no checkpoint of step 13
        pushes.start(step)
        pushes.wait()
        assert f"step {step}: not pushed to the Hub, training goes on: " in capsys.readouterr().out
    assert not list(run.glob(".pushing*"))


def test_large_files_go_in_parts_where_the_hub_wants_parts(hub: Hub, trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path, weights=b"parts")
    hub.part_bytes = 10_000
    options = ["--private", "--revision", "dev", "--tag", "v1", "--commit_message", "In parts"]
    assert "uploaded" in upload(run, "ann/parts", *options, hub=hub, home=tmp_path)
    hub.part_bytes = None
    repo, weights = hub.repos["ann/parts"], (run / "model.safetensors").read_bytes()
    assert len(weights) > 30_000
    assert repo.files("dev")["model.safetensors"] == weights
    assert repo.files("main") == {}
    assert repo.private
    assert repo.messages[-1] == "In parts"
    assert repo.tags["v1"] == repo.branches["dev"]
    assert 'revision="dev"' in repo.files("dev")["README.md"].decode()


def test_another_owners_repository_takes_a_pull_request_and_nothing_else(
    hub: Hub, trained: Path, tmp_path: Path
) -> None:
    bob = {"hub": hub, "home": tmp_path, "HF_TOKEN": "hf_bobs"}
    before = dict(hub.repos["ann/pushed"].branches)
    error = upload(trained, "ann/pushed", code=2, **bob)
    assert "ann/pushed: this token may not write there" in error
    assert len(error.splitlines()) == 1
    assert "may not write there" in upload(trained, "ann/new", code=2, **bob)
    assert hub.repos["ann/pushed"].branches == before
    run = copy_of(trained, tmp_path, weights=b"bob's")
    assert "/ann/pushed/discussions/1" in upload(run, "ann/pushed", "--create_pr", code=0, **bob)
    assert hub.repos["ann/pushed"].branches["main"] == before["main"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"HF_TOKEN": "hf_wrong"}, "does not accept the token; make one that may write at"),
        ({"HF_TOKEN": ""}, "there is no token for the Hub: set HF_TOKEN, or run `hf auth login`"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ],
    ids=["wrong token", "no token", "no network"],
)
def test_what_the_hub_refuses_is_one_clear_line(
    hub: Hub, trained: Path, tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    output = upload(trained, "ann/none", hub=hub, home=tmp_path, code=2, **variables)
    assert said in output
    assert len(output.splitlines()) == 1
    assert "ann/none" not in hub.repos


def test_a_dry_run_needs_no_hub_and_tells_what_would_go_and_what_stays(trained: Path, tmp_path: Path) -> None:
    output = upload(trained, "ann/dry", "--dry_run", hub=None, home=tmp_path, HF_TOKEN="")
    assert "kB  model.safetensors" in output
    assert "in 14 files would go to ann/dry" in output
    assert "stays here: arguments.yaml, checkpoint-12/" in output


def test_secrets_are_refused_by_file_and_line_and_never_shown(hub: Hub, trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    with (run / "tokenizer_config.json").open("a") as file:
        file.write(f"\n\n{WANDB_KEY}\n")
    (run / "README.md").write_text(f"# mine\n{TOKEN}\n")
    error = upload(run, "ann/leak", hub=hub, home=tmp_path, code=2)
    assert "README.md line 2: a Hugging Face token" in error
    assert "the value of WANDB_API_KEY" in error
    assert len(error.splitlines()) == 1
    assert "ann/leak" not in hub.repos


def test_a_token_on_the_command_line_is_refused_before_anything_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import hub_upload
    import train_accelerate

    with pytest.raises(ValueError, match="word 3 of the command line gives a token"):
        hub_upload.main([str(tmp_path), "ann/leak", "--token", "short"])
    monkeypatch.setattr(sys, "argv", ["train", "--output_dir", str(tmp_path / "run"), "--run_name", TOKEN])
    with pytest.raises(SystemExit) as ended:
        train_accelerate.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert "word 4 of the command line gives a Hugging Face token" in printed.err
    assert TOKEN not in printed.out + printed.err
    assert not (tmp_path / "run").exists()


def test_no_secret_ever_reached_the_hub_nor_the_run(hub: Hub, trained: Path) -> None:
    """Looks at whatever the tests before it have sent: contents, not the header that carries the token."""
    written = [path.read_bytes() for path in trained.rglob("*") if path.is_file()]
    for content in [*written, *hub.large_files.values(), *(body for _, _, body in hub.requests)]:
        assert TOKEN.encode() not in content
        assert WANDB_KEY.encode() not in content
    for repo in hub.repos.values():
        for files in repo.commits.values():
            assert not any(TOKEN.encode() in blob.content for blob in files.values())


def test_nothing_published_names_a_folder_or_the_name_of_this_machine(hub: Hub, trained: Path) -> None:
    for name, content in hub.repos["ann/pushed"].files().items():
        assert str(trained.parent).encode() not in content, name
        assert socket.gethostname() not in name.split(".")


def copy_of(run: Path, folder: Path, weights: bytes = b"") -> Path:
    """A run like `run`; `weights` makes its model another, whose content the Hub has not seen."""
    copy = folder / "copy"
    shutil.copytree(run, copy)
    if weights:
        from safetensors.numpy import load_file, save_file

        save_file(
            load_file(copy / "model.safetensors"), copy / "model.safetensors", {"format": "pt", "is": str(weights)}
        )
    return copy
