"""Export a run for other engines, as files of its repository: GGUF for llama.cpp and Ollama, ONNX for transformers.js.

The ONNX files come with GPT-2's config and a tokenizer of their own, in the folder onnx/: the config at the top of the
repository is that of a MiniGPT, which other engines do not know.
"""

from collections.abc import Sequence
from pathlib import Path

from minigpt.hub.run_summary import read_run_summary
from minigpt.hub.upload import ONNX_FOLDER, UploadFile, UploadTarget
from minigpt.utils.errors import UserError


def engine_files(
    target: UploadTarget, run_dir: Path, folder: Path, outtypes: Sequence[str], dtypes: Sequence[str]
) -> list[UploadFile]:
    """Export the model in `run_dir` into the empty `folder`, and return the files to upload.

    outtypes: those of `export_gguf`, one file each at the top of the repository. dtypes: those of `export_onnx`.
    Raises UserError for an adapter, if a package is missing, and if a format cannot carry the model.
    """
    if read_run_summary(run_dir).is_adapter:
        raise UserError(
            f"{run_dir} is an adapter, and other engines need a whole model; run `minigpt merge {run_dir} MERGED`"
        )
    files = []
    if outtypes:
        from minigpt.export.gguf import export_gguf  # loads torch

        repo_name = target.repo_id.rpartition("/")[2]
        for outtype in dict.fromkeys(outtypes):
            path = folder / f"{repo_name}-{outtype.upper()}.gguf"
            export_gguf(run_dir, path, outtype)
            files.append(UploadFile(path.name, path))
    if dtypes:
        from minigpt.export.onnx import export_onnx

        export_onnx(run_dir, folder / ONNX_FOLDER, list(dict.fromkeys(dtypes)))
        paths = sorted(path for path in (folder / ONNX_FOLDER).rglob("*") if path.is_file())
        for path in paths:
            content = path if path.suffix == ".onnx" else path.read_bytes()
            files.append(UploadFile(f"{ONNX_FOLDER}/{path.name}", content))
    return files
