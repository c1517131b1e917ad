"""Uploading a run, against a Hub on loopback that speaks the real protocol to the unmodified client."""

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

import hub_upload
from minigpt.config.arguments import Arguments
from minigpt.hub.background_push import BackgroundPush
from minigpt.hub.upload import UploadTarget, hub_errors_are_user_errors, public_name
from minigpt.utils.errors import UserError
from support.hub_client import TOKEN, USERS, WANDB_KEY, call, environment, upload
from support.hub_server import Blob, Hub, Repository, running_hub
from support.runs import ROOT, command


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub(USERS) as hub:
        yield hub


@pytest.fixture(scope="module")
def trained(hub: Hub, text_file: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was pushed to ann/pushed while it trained. Tests do not change the folder."""
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


def test_training_pushes_checkpoints_and_the_final_model_and_no_other_files(hub: Hub, trained: Path) -> None:
    repo = hub.repos["ann/pushed"]
    assert repo.messages[:2] == ["initial commit", "Step 5"]  # training has deleted this checkpoint since
    assert repo.messages[-1] == "End of training"
    files = repo.files()
    assert files["model.safetensors"] == (trained / "model.safetensors").read_bytes()
    assert files["metrics.jsonl"] == (trained / "metrics.jsonl").read_bytes()
    event_files = {name for name in files if name.startswith("tensorboard/")}
    assert sorted(set(files) - event_files) == [
        "README.md", "config.json", "configuration_minigpt.py", "data.json", "environment.json",
        "generation_config.json", "loss.pdf", "loss.png", "metrics.jsonl", "model.safetensors", "modeling_minigpt.py",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert not list(trained.glob(".pushing*"))


def test_published_event_file_is_identical_and_has_no_host_name_and_no_options(
    hub: Hub, trained: Path, text_file: Path
) -> None:
    (local,) = trained.glob("tensorboard/**/*.tfevents.*")
    files = hub.repos["ann/pushed"].files()
    ((name, content),) = [item for item in files.items() if item[0].startswith("tensorboard/")]
    assert content == local.read_bytes()
    assert b"train/loss" in content
    assert socket.gethostname() in local.name
    assert socket.gethostname() not in name
    for private in (str(trained.parent), str(text_file), "hub_model_id", "output_dir"):
        assert private.encode() not in content


def test_event_files_of_one_run_keep_different_names_without_host_names() -> None:
    names = [f"tensorboard/minigpt/events.out.tfevents.1700000000.my.host-7.{end}" for end in ("12.0", "12.1", "13.0")]
    public_names = [public_name(name) for name in names]
    assert public_names[0] == "tensorboard/minigpt/events.out.tfevents.1700000000.12.0"
    assert len(set(public_names)) == len(names)
    assert [public_name(name) for name in public_names] == public_names


def test_second_upload_sends_nothing_and_a_change_sends_only_itself(hub: Hub, trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    (run / ".env").write_text(f"HF_TOKEN={TOKEN}\n")  # not among the published files, so no reason to refuse
    (run / "notes.txt").write_text(WANDB_KEY)
    assert "uploaded" in upload(run, "ann/again", hub=hub, home=tmp_path)
    large_files, commits = len(hub.sent("PUT", "/large/")), len(hub.repos["ann/again"].messages)
    second = upload(run, "ann/again", hub=hub, home=tmp_path)
    assert "nothing to upload: ann/again already has these 14 files" in second
    assert len(hub.repos["ann/again"].messages) == commits
    assert len(hub.sent("PUT", "/large/")) == large_files
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.5, "elapsed_s": 1.0}\n')
    assert "uploaded" in upload(run, "ann/again", hub=hub, home=tmp_path)
    (commit,) = hub.sent("POST", "/api/models/ann/again/commit/main")[1:]
    changed = [json.loads(line)["value"].get("path") for line in commit.splitlines()]
    assert changed == [None, "metrics.jsonl", "README.md"]  # None: the header


def test_published_snippet_runs_and_published_model_generates_what_the_local_one_does(
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
    assert "\nThe" in f"\n{printed}"  # the text of the snippet starts with its prompt

    from transformers import AutoTokenizer

    from modeling_minigpt import MiniGPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(trained)
    prompt = tokenizer("The cat ", return_tensors="pt")
    ids = MiniGPTForCausalLM.from_pretrained(trained).generate(**prompt, max_new_tokens=8, do_sample=False)
    assert f"TEXT {tokenizer.decode(ids[0])!r}" in printed.splitlines()


def test_upload_survives_a_connection_that_breaks_half_way(hub: Hub, trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path, weights=b"cut")
    hub.cut_next = 1
    assert "uploaded" in upload(run, "ann/cut", hub=hub, home=tmp_path)
    assert hub.cut_next == 0
    assert hub.repos["ann/cut"].files()["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_killed_upload_leaves_no_commit_and_the_same_command_finishes_it(
    hub: Hub, trained: Path, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path, weights=b"killed")
    half_sent, killed = threading.Event(), threading.Event()

    def wait_for_the_kill() -> None:
        half_sent.set()
        killed.wait(60)

    hub.on_half = wait_for_the_kill
    words = [sys.executable, str(ROOT / "hub_upload.py"), str(run), "ann/killed"]
    process = subprocess.Popen(words, env=environment(hub, tmp_path), stderr=subprocess.DEVNULL)
    assert half_sent.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    hub.on_half = lambda: None
    killed.set()
    assert hub.repos["ann/killed"].messages == ["initial commit"]
    assert "uploaded 14 files" in upload(run, "ann/killed", hub=hub, home=tmp_path)
    assert hub.repos["ann/killed"].files()["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_card_edited_on_the_hub_is_kept_and_a_locally_edited_card_replaces_it(
    hub: Hub, trained: Path, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path)
    hub.repos["ann/edited"] = Repository(private=False)
    hub.repos["ann/edited"].add_commit("main", "initial commit", {"README.md": Blob(b"# Edited there", large=False)})
    upload(run, "ann/edited", hub=hub, home=tmp_path)
    assert hub.repos["ann/edited"].files()["README.md"] == b"# Edited there"
    assert "model.safetensors" in hub.repos["ann/edited"].files()
    (run / "README.md").write_text("---\nlicense: mit\n---\n# Edited here")
    upload(run, "ann/edited", hub=hub, home=tmp_path)
    assert hub.repos["ann/edited"].files()["README.md"].endswith(b"# Edited here")


def test_failed_push_is_reported_and_training_continues(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(trained, tmp_path)
    push = BackgroundPush(Arguments(train_file=["x"], output_dir=str(run)), is_main_process=True)
    push.start(12)
    assert not capsys.readouterr().out  # push_to_hub is off
    push.target = UploadTarget("ann/offline")
    for step in (12, 13):  # no Hub is reachable from this process, and there is no checkpoint of step 13
        push.start(step)
        push.wait()
        printed = capsys.readouterr()
        assert f"step {step}: not pushed to the Hub, training continues: " in printed.out
        assert "Traceback" not in printed.err
    assert not list(run.glob(".pushing*"))


def test_a_bug_while_pushing_keeps_its_traceback_and_training_continues(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import minigpt.hub.background_push as background_push

    def broken(*arguments: object) -> None:
        raise KeyError("a bug")

    run = copy_of(trained, tmp_path)
    monkeypatch.setattr(background_push, "commit_files", broken)
    push = BackgroundPush(Arguments(train_file=["x"], output_dir=str(run)), is_main_process=True)
    push.target = UploadTarget("ann/offline")
    push.start(12)
    push.wait()
    printed = capsys.readouterr()
    assert "step 12: not pushed to the Hub" in printed.out
    assert "Traceback" in printed.err
    assert "KeyError: 'a bug'" in printed.err


def test_a_bug_in_publishing_is_no_user_error() -> None:
    for bug in (KeyError("x"), ValueError("x"), TypeError("x")):
        with pytest.raises(type(bug)) as raised, hub_errors_are_user_errors("ann/x"):
            raise bug
        assert raised.value is bug


def test_large_files_are_sent_in_parts_if_the_hub_asks_for_parts(hub: Hub, trained: Path, tmp_path: Path) -> None:
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


def test_repository_of_another_owner_accepts_only_a_pull_request(hub: Hub, trained: Path, tmp_path: Path) -> None:
    bob = {"hub": hub, "home": tmp_path, "HF_TOKEN": "hf_bobs"}
    branches = dict(hub.repos["ann/pushed"].branches)
    error = upload(trained, "ann/pushed", code=2, **bob)
    assert "ann/pushed: this token has no write access" in error
    assert len(error.splitlines()) == 1
    assert "no write access" in upload(trained, "ann/new", code=2, **bob)
    assert hub.repos["ann/pushed"].branches == branches
    run = copy_of(trained, tmp_path, weights=b"bob's")
    assert "/ann/pushed/discussions/1" in upload(run, "ann/pushed", "--create_pr", code=0, **bob)
    assert hub.repos["ann/pushed"].branches["main"] == branches["main"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HF_TOKEN": "hf_wrong"}, "does not accept the token; create one with write access at"),
        ({"HF_TOKEN": ""}, "there is no token for the Hub; set HF_TOKEN, or run `hf auth login`"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ],
    ids=["wrong token", "no token", "no network"],
)
def test_refusal_of_the_hub_is_one_line(
    hub: Hub, trained: Path, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    output = upload(trained, "ann/none", hub=hub, home=tmp_path, code=2, **variables)
    assert message in output
    assert len(output.splitlines()) == 1
    assert "ann/none" not in hub.repos


def test_card_that_the_hub_rejects_is_one_line(hub: Hub, trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    (run / "README.md").write_text("---\nlicense: [mit\n---\n# Edited here")
    output = upload(run, "ann/rejected", hub=hub, home=tmp_path, code=2)
    assert "ann/rejected: Invalid metadata in README.md. - the front matter is not valid" in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("repo_id", ["a/b/c", "ann/b--c", "ann/a b", "ann", "ann/.x", "ann/" + "x" * 97])
def test_wrong_repository_name_is_one_line(tmp_path: Path, repo_id: str) -> None:
    for arguments in ([repo_id], ["ann/good", "--space", repo_id]):
        with pytest.raises(UserError) as raised:
            hub_upload.main([str(tmp_path), *arguments])
        assert repo_id in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1


def test_folder_that_is_no_minigpt_is_refused_with_the_way_out(trained: Path, tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(UserError) as raised:
            hub_upload.main([str(folder), "ann/x", "--dry_run"])
        return str(raised.value)

    assert "is not a folder; give the folder of a run" in refusal(tmp_path / "missing")
    run = copy_of(trained, tmp_path)
    config = json.loads((run / "config.json").read_text())
    del config["num_hidden_layers"]  # as in the config.json of a stock GPT-2
    (run / "config.json").write_text(json.dumps(config))
    assert "has no num_hidden_layers; give the folder of a MiniGPT" in refusal(run)
    (run / "model.safetensors").unlink()
    assert f"try one of its checkpoints: {run / 'checkpoint-12'}" in refusal(run)


def test_dry_run_needs_no_hub_and_lists_what_is_uploaded_and_what_is_not(trained: Path, tmp_path: Path) -> None:
    output = upload(trained, "ann/dry", "--dry_run", hub=None, home=tmp_path, HF_TOKEN="")
    assert "kB  model.safetensors" in output
    assert "in 14 files would be uploaded to ann/dry" in output
    assert "not uploaded: arguments.yaml, checkpoint-12/" in output


def test_secrets_are_refused_with_file_and_line_and_never_shown(hub: Hub, trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    with (run / "tokenizer_config.json").open("a") as file:
        file.write(f"\n\n{WANDB_KEY}\n")
    (run / "README.md").write_text(f"# mine\n{TOKEN}\n")
    error = upload(run, "ann/leak", hub=hub, home=tmp_path, code=2)
    assert "README.md line 2: a Hugging Face token" in error
    assert "the value of WANDB_API_KEY" in error
    assert len(error.splitlines()) == 1
    assert "ann/leak" not in hub.repos


def test_token_on_the_command_line_is_refused_before_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_accelerate

    with pytest.raises(ValueError, match="word 3 of the command line contains a token"):
        hub_upload.main([str(tmp_path), "ann/leak", "--token", "short"])
    monkeypatch.setattr(sys, "argv", ["train", "--output_dir", str(tmp_path / "run"), "--run_name", TOKEN])
    with pytest.raises(SystemExit) as ended:
        train_accelerate.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert "word 4 of the command line contains a Hugging Face token" in printed.err
    assert TOKEN not in printed.out + printed.err
    assert not (tmp_path / "run").exists()


def test_no_secret_was_sent_to_the_hub_or_written_into_the_run(hub: Hub, trained: Path) -> None:
    """Checks everything that the tests above have sent: the bodies, not the header that carries the token."""
    written = [path.read_bytes() for path in trained.rglob("*") if path.is_file()]
    for content in [*written, *hub.large_files.values(), *(body for _, _, body in hub.requests)]:
        assert TOKEN.encode() not in content
        assert WANDB_KEY.encode() not in content
    for repo in hub.repos.values():
        for files in repo.commits.values():
            assert not any(TOKEN.encode() in blob.content for blob in files.values())


def test_no_published_file_names_a_local_folder_or_the_host(hub: Hub, trained: Path) -> None:
    for name, content in hub.repos["ann/pushed"].files().items():
        assert str(trained.parent).encode() not in content, name
        assert socket.gethostname() not in name.split(".")


def copy_of(run: Path, folder: Path, weights: bytes = b"") -> Path:
    """A copy of `run`. With `weights`, its weight file is one that the Hub has not received yet."""
    copy = folder / "copy"
    shutil.copytree(run, copy)
    if weights:
        from safetensors.numpy import load_file, save_file

        path = copy / "model.safetensors"
        save_file(load_file(path), path, {"format": "pt", "is": str(weights)})
    return copy


def test_a_link_out_of_the_run_is_refused_and_files_off_the_list_stay(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (tmp_path / "private.txt").write_text("private", encoding="utf-8")
    (run / "photo.png").symlink_to(tmp_path / "private.txt")
    (run / ".env").write_text("PASSWORD=correct horse", encoding="utf-8")
    output = upload(run, "ann/links", "--dry_run", hub=None, home=tmp_path)
    assert "photo.png" in output.split("not uploaded:")[1]
    assert ".env" in output.split("not uploaded:")[1]
    for name in ("loss.png", "tokenizer.json", "tensorboard/events.out.tfevents.1.host.2.3"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / "private.txt")
        output = upload(run, "ann/links", "--dry_run", hub=None, home=tmp_path, code=2)
        assert f"{name} is a link to {tmp_path / 'private.txt'}, outside" in output
        (run / name).unlink()
