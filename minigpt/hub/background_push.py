"""Push checkpoints to the Hub while the training goes on."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Thread

from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from minigpt.config.arguments import Arguments
from minigpt.hub.upload import (
    Destination,
    Item,
    collect,
    commit,
    create_repository,
    plain_errors,
)


class BackgroundPush:
    """`push_to_hub` of the trainer: each save goes up beside the training, which never waits for it before its end.

    Only the main process pushes. A save is skipped while the one before it is still on its way; a push that fails is
    told and the next save tries again. Raises UserError at the start when the Hub would not take the model.
    """

    def __init__(self, args: Arguments, is_main_process: bool) -> None:
        self.run_dir = args.run_dir
        self.destination: Destination | None = None
        self._thread: Thread | None = None
        if not args.push_to_hub or not is_main_process:
            return
        for left in self.run_dir.glob(".pushing-*"):
            shutil.rmtree(left)
        disable_progress_bars()  # they would run through the progress lines
        name, api = args.hub_model_id or self.run_dir.resolve().name, HfApi()
        with plain_errors(name):
            if "/" not in name:
                name = f"{api.whoami()['name']}/{name}"
            self.destination = Destination(name, private=args.hub_private_repo)
            create_repository(api, self.destination)

    def start(self, step: int) -> None:
        """Push `checkpoint-<step>` and the records so far, in the background."""
        if self.destination is None or (self._thread is not None and self._thread.is_alive()):
            return
        held = self.run_dir / f".pushing-{step}"
        destination = replace(self.destination, commit_message=f"Step {step}")
        try:
            _link_files(self.run_dir / f"checkpoint-{step}", held)
            items = collect(destination, self.run_dir, held)
        except (ValueError, OSError) as error:
            _say_failed(step, error, held)
            return
        # a daemon: a run that is told to stop must not wait for the network
        self._thread = Thread(target=_push, args=(destination, items, step, held), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is on its way."""
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """Publish the final model. Raises UserError when that fails; the run's folder is whole by then."""
        if self.destination is None:
            return
        self.wait()
        destination = replace(self.destination, commit_message="End of training")
        items = collect(destination, self.run_dir)
        with plain_errors(destination.repo_id):
            print(commit(HfApi(), destination, items), flush=True)


def _push(destination: Destination, items: list[Item], step: int, held: Path) -> None:
    try:
        with plain_errors(destination.repo_id):
            print(f"  step {step}: {commit(HfApi(), destination, items)}", flush=True)
    except Exception as error:  # whatever it is, it must not pass in silence, nor end the training
        _say_failed(step, error, held)
    shutil.rmtree(held, ignore_errors=True)


def _say_failed(step: int, error: Exception, held: Path) -> None:
    shutil.rmtree(held, ignore_errors=True)
    print(f"  step {step}: not pushed to the Hub, training goes on: {error}", flush=True)


def _link_files(folder: Path, held: Path) -> None:
    """Hold on to the files of a checkpoint, which may be deleted while they are on their way."""
    held.mkdir()
    for path in folder.iterdir():
        try:
            os.link(path, held / path.name)
        except OSError:  # a file system without hard links
            shutil.copy2(path, held / path.name)
