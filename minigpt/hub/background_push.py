"""Push checkpoints to the Hub during training."""

import os
import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from threading import Thread

from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from minigpt.config.arguments import Arguments
from minigpt.hub.upload import (
    UploadFile,
    UploadTarget,
    commit_files,
    create_repository,
    files_to_upload,
    hub_errors_are_user_errors,
)
from minigpt.utils.errors import RunFailure, UserError
from minigpt.utils.progress import print_line


class BackgroundPush:
    """The trainer's `push_to_hub`: uploads each saved checkpoint in a thread. Training waits for it only at the end.

    Only the main process pushes. A checkpoint is skipped while the previous one is still being uploaded. A push that
    fails is reported, and the next checkpoint is pushed as usual. Without `push_to_hub` nothing is done.
    Raises UserError when training starts if the Hub does not accept uploads to the repository.
    """

    def __init__(self, args: Arguments, is_main_process: bool) -> None:
        self.run_dir = args.run_dir
        self.target: UploadTarget | None = None
        self._thread: Thread | None = None
        if not args.push_to_hub or not is_main_process:
            return
        for snapshot in self.run_dir.glob(".pushing-*"):  # of a run that was killed
            shutil.rmtree(snapshot)
        disable_progress_bars()  # they would break up the progress lines of training
        repo_id, api = args.hub_model_id or self.run_dir.resolve().name, HfApi()
        with hub_errors_are_user_errors(repo_id):
            if "/" not in repo_id:
                repo_id = f"{api.whoami()['name']}/{repo_id}"
            self.target = UploadTarget(repo_id, private=args.hub_private_repo)
            create_repository(api, self.target)

    def start(self, step: int) -> None:
        """Push `checkpoint-<step>` and the records up to now, in the background."""
        if self.target is None or (self._thread is not None and self._thread.is_alive()):
            return
        snapshot = self.run_dir / f".pushing-{step}"
        target = replace(self.target, commit_message=f"Step {step}")
        try:
            _link_files(self.run_dir / f"checkpoint-{step}", snapshot)
            files = files_to_upload(target, self.run_dir, snapshot)
        except Exception as error:
            _report_failure(step, error)
            shutil.rmtree(snapshot, ignore_errors=True)
            return
        # a daemon thread: a run that receives a signal must not wait for the network
        self._thread = Thread(target=_push, args=(target, files, step, snapshot), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the current upload has ended."""
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """Publish the final model. Raises RunFailure if that fails; the run's folder is complete by then."""
        if self.target is None:
            return
        self.wait()
        target = replace(self.target, commit_message="End of training")
        try:
            files = files_to_upload(target, self.run_dir)
            with hub_errors_are_user_errors(target.repo_id):
                print_line(commit_files(HfApi(), target, files))
        except UserError as error:
            raise RunFailure(f"the model is in {self.run_dir}, but it was not uploaded: {error}") from error


def _push(target: UploadTarget, files: list[UploadFile], step: int, snapshot: Path) -> None:
    try:
        with hub_errors_are_user_errors(target.repo_id):
            print_line(f"  step {step}: {commit_files(HfApi(), target, files)}")
    except Exception as error:
        _report_failure(step, error)
    finally:
        shutil.rmtree(snapshot, ignore_errors=True)


def _report_failure(step: int, error: Exception) -> None:
    """Print why a push failed. No error in publishing may end the training; a bug is shown with its traceback."""
    print_line(f"  step {step}: not pushed to the Hub, training continues: {error}")
    if not isinstance(error, UserError | OSError):
        traceback.print_exception(error)


def _link_files(folder: Path, snapshot: Path) -> None:
    """Hard-link the files of a checkpoint into `snapshot`: training may delete the checkpoint during the upload."""
    snapshot.mkdir()
    for path in folder.iterdir():
        try:
            os.link(path, snapshot / path.name)
        except OSError:  # a file system without hard links
            shutil.copy2(path, snapshot / path.name)
