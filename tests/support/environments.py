"""Environments of their own for tools that are no dependencies of the project; made on first use, for slow tests."""

import subprocess
import sys
import sysconfig

import pytest
from filelock import FileLock


def environment(tmp_path_factory: pytest.TempPathFactory, name: str, packages: list[str]) -> str:
    """The Python of a new environment that sees the project's libraries and, before them, `packages`."""
    shared = tmp_path_factory.getbasetemp().parent  # one for all test processes
    folder = shared / f"environment-{name}"
    with FileLock(f"{folder}.lock"):
        python = folder / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            site = next((folder / "lib").glob("python*")) / "site-packages"
            (site / "zz_project_libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        installed = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
            capture_output=True,
            text=True,
        )
    if installed.returncode != 0:
        pytest.skip(f"cannot install {' '.join(packages)}: {installed.stderr.strip().splitlines()[-1:]}")
    return str(python)
