"""Laws of docs/inside.md: what it quotes is the code, its Python runs, and its pictures come from its script."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.runs import ROOT, finish

PAGE = (ROOT / "docs" / "inside.md").read_text(encoding="utf-8")
QUOTATIONS = re.findall(r"`([\w./]+)`:\n\n```python\n((?:.*\n)*?)```", PAGE)
SCRIPT = [sys.executable, str(ROOT / "examples" / "inside.py")]


def stripped(text: str) -> str:
    """The text without the indentation of its lines."""
    return "\n".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize(("file", "quotation"), QUOTATIONS, ids=[code.split("\n")[0] for _, code in QUOTATIONS])
def test_a_quotation_occurs_in_the_file_it_names(file: str, quotation: str) -> None:
    assert stripped(quotation) in stripped((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_script_runs_the_page_and_draws_its_pictures(
    text_file: Path, tmp_path: Path, train_here: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a run of one step in the place of the quickstart's."""
    monkeypatch.chdir(tmp_path)
    options = (
        f"quickstart --train_file {text_file} --tokenizer_vocab_size 300 --cache_dir cache --hidden_size 24 "
        "--num_hidden_layers 2 --num_attention_heads 3 --per_device_train_batch_size 2 --max_steps 1 --warmup_steps 0 "
        "--save_steps 1 --sample_max_new_tokens 1 --report_to none --use_cpu"
    )
    assert train_here(options.split()) == 0
    run = finish([*SCRIPT, "--output_dir", "pictures"])
    assert run.returncode == 0, run.stderr
    linked = set(re.findall(r"\((inside_\w+\.png)\)", PAGE))
    assert {path.name for path in Path("pictures").iterdir()} == linked
    assert {path.name for path in (ROOT / "docs").glob("inside_*.png")} == linked
    assert run.stdout.count(">>> ") + len(QUOTATIONS) == PAGE.count("```python")


def test_without_the_quickstart_the_script_says_how_to_train_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = finish(SCRIPT)
    assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (2, "", 1)
    assert "minigpt train quickstart" in run.stderr
