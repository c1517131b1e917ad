"""Run hub_upload.py as a user would, against the Hub of `support.hub_server`."""

import os
import subprocess
import sys
from pathlib import Path

from support.hub_server import Hub
from support.runs import ROOT

TOKEN = "hf_" + "CanaryOfAnnNeverToBeShown"
WANDB_KEY = "canary0of0wandb0never0to0be0shown0000000"
USERS = {TOKEN: "ann", "hf_bobs": "bob"}


def environment(hub: Hub | None, home: Path, **overrides: str) -> dict[str, str]:
    """The environment variables of a user whose only Hub is `hub`. Caches and login are in `home`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    endpoint = hub.endpoint if hub else "http://127.0.0.1:9"  # no server listens at this port
    hub_variables = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    return {**inherited, "OMP_NUM_THREADS": "1", "WANDB_API_KEY": WANDB_KEY, **hub_variables, **overrides}


def call(words: list[str | Path], variables: dict[str, str], code: int = 0) -> str:
    """Run a command, check its exit code, and return its output. The output must not hold a secret or a traceback."""
    result = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, env=variables, timeout=120, cwd=variables["HF_HOME"]
    )
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    assert "Traceback" not in output
    assert TOKEN not in output
    assert WANDB_KEY not in output
    return output


def upload(
    run_dir: Path, repo_id: str, *options: str, hub: Hub | None, home: Path, code: int = 0, **overrides: str
) -> str:
    """Run `hub_upload.py RUN_DIR REPO_ID` and return its output. `overrides` are environment variables."""
    words = [sys.executable, ROOT / "hub_upload.py", run_dir, repo_id, *options]
    return call(words, environment(hub, home, **overrides), code)
