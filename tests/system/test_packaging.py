"""Laws of the package: a wheel holds every module, preset and launch profile, and works without a checkout."""

import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import minigpt
from support.runs import ROOT, finish

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_pyproject_lists_every_folder_of_the_package() -> None:
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "minigpt").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == folders | PROJECT["tool"]["setuptools"]["package-dir"].keys()


def test_requirements_pin_every_dependency_of_pyproject() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    for requirement in PROJECT["project"]["dependencies"]:
        assert requirement.split(">")[0].strip().lower() in pinned


@pytest.mark.slow
def test_the_wheel_trains_generates_plans_and_uploads_in_an_empty_folder(tmp_path: Path) -> None:
    built = finish(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("minigpt_lm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "minigpt"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert set(tracked.stdout.split()) <= names
    assert {f"minigpt/presets/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names
    assert {f"minigpt/launch_profiles/{path.name}" for path in (ROOT / "accelerate_configs").glob("*.yaml")} <= names

    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    finish([str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)])
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    libraries = [path for path in Path(sysconfig.get_path("purelib")).iterdir() if "minigpt" not in path.name]
    for path in libraries:  # the libraries of this environment, without its editable MiniGPT
        if not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    empty_folder = tmp_path / "empty"
    empty_folder.mkdir()

    def run(*words: str) -> str:
        process = finish([str(python), "-m", *words], cwd=empty_folder)
        assert process.returncode == 0, process.stderr
        return process.stdout

    assert run("minigpt", "--version") == f"minigpt {minigpt.__version__}\n"
    assert "quickstart" in run("minigpt", "train", "--list")
    cache = ["--cache_dir", str(tmp_path / "cache")]
    assert "done: 20 steps" in run("minigpt", "train", "quickstart", "--max_steps", "20", "--use_cpu", *cache)
    assert run("minigpt", "generate", "--model", "runs/quickstart", "--prompt", "Return", "--max_new_tokens", "5")
    assert "peak memory per device" in run("minigpt", "plan", "pretrain_gpt2", "--no_probe")
    assert "model.safetensors" in run("hub_upload", "runs/quickstart", "user/name", "--dry_run")
