"""Laws of README.md: pasted into a shell from top to bottom, in a fresh checkout, its commands do what it says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from minigpt.utils.run_files import METRICS_FILE, read_metrics
from support.conversations import random_conversations
from support.hub_client import environment
from support.hub_server import Blob, Hub, Repository, running_hub
from support.runs import ROOT
from support.tiny import byte_tokenizer

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PROMPT = "Once upon"
SHORTER = {
    "--train_minutes 10": "--train_minutes 1",
    "train finetune_gpt2": "train finetune_gpt2 --max_steps 20",
}
NEEDS_GPUS = ("--profile multi_gpu", "fsdp2.yaml")


def publish_tiny_gpt2(hub: Hub, folder: Path) -> None:
    """Put a GPT-2 with random weights on the Hub in the place of the smallest real one."""
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    end = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, bos_token_id=end, eos_token_id=end)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {path.name: Blob(path.read_bytes(), path.suffix == ".safetensors") for path in folder.iterdir()}
    hub.repos["openai-community/gpt2"] = Repository(private=False)
    hub.repos["openai-community/gpt2"].add_commit("main", "weights", files)


def copy_checkout(folder: Path) -> None:
    """Copy what git knows of or would add."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


class Reader:
    """Someone who pastes the lines of the page into bash, one after the other."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder = folder
        paths = [str(folder / ".venv" / "bin"), str(Path(sys.executable).parent), variables["PATH"]]
        self.variables = variables | {"PATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}

    def paste(self, line: str, works: bool = True) -> str:
        """Run a line, and check that it works, or does not. Returns what it printed."""
        questions = "Hello?\nWhat is 2 + 2?\n"
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self.variables, input=questions, capture_output=True, text=True
        )
        assert (done.returncode == 0) == works, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + ("" if works else done.stderr)

    def serve(self, line: str) -> None:
        """Run a line that serves a page until Ctrl-C; first what its comment says to run."""
        self.paste(line.partition("first: ")[2])
        words = ["bash", "-c", f"exec {line}"]
        with subprocess.Popen(words, cwd=self.folder, env=self.variables, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert any("http://127.0.0.1:" in printed for printed in server.stdout)
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) in (0, 130)


@pytest.mark.slow
def test_the_commands_do_what_the_page_says(tmp_path: Path) -> None:
    checkout = tmp_path / "minigpt"
    copy_checkout(checkout)
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))
    (checkout / "my_text.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"messages": messages}) for messages in random_conversations(60)]
    (checkout / "conversations.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "home").mkdir()
    outputs = {}
    with running_hub({}) as hub:
        publish_tiny_gpt2(hub, tmp_path / "gpt2")
        variables = environment(hub, tmp_path / "home")
        not_theirs = ("HF_TOKEN", "WANDB_API_KEY", "OMP_NUM_THREADS")
        reader = Reader(checkout, {name: value for name, value in variables.items() if name not in not_theirs})
        for line in COMMANDS:
            if line.startswith("make test"):
                continue  # this is one of its tests
            for long, short in SHORTER.items():
                line = line.replace(long, short)
            if "playground" in line:
                reader.serve(line)
            elif any(option in line for option in NEEDS_GPUS):
                assert "the launch profile is for GPUs" in reader.paste(line, works=False)
            else:
                outputs[line] = reader.paste(line)
        outputs["pipeline"] = reader.paste(f"python - <<'END'\n{PYTHON[0]}\nEND")
    check(checkout, outputs)


def check(checkout: Path, outputs: dict[str, str]) -> None:
    """What the page promises is there."""
    quickstart = [line for line in read_metrics(checkout / "runs" / "quickstart" / METRICS_FILE) if "val/loss" in line]
    (said,) = re.findall(r"([0-9.]+) bits per byte", PAGE)
    assert quickstart[-1]["val/bits_per_byte"] == pytest.approx(float(said), abs=0.05)  # of another Python's text
    (written,) = (output for line, output in outputs.items() if "generate" in line)
    assert PROMPT in written
    (planned,) = (output for line, output in outputs.items() if "--dry_run" in line)
    assert "model.safetensors" in planned
    assert GPT2LMHeadModel.from_pretrained(checkout / "my_gpt2").config.model_type == "gpt2"
    assert (checkout / "page.html").read_text(encoding="utf-8").startswith("<!")
    assert outputs["pipeline"].startswith("The answer is")
