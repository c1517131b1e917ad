"""Find the token shards that a run was trained on."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments
from minigpt.data.mixing import join_shards
from minigpt.data.prepare import cache_folder
from minigpt.data.shards import MANIFEST, TokenShards, open_shards
from minigpt.utils.errors import UserError
from minigpt.utils.files import read_json
from minigpt.utils.run_files import ARGUMENTS_FILE, DATA_FILE


def find_run_data(folder: Path) -> tuple[TokenShards, Path]:
    """The shards of a run, or of the run of a checkpoint, and its cache folder. Nothing is prepared or downloaded.

    They are known by the fingerprint that the run has recorded. Raises UserError if they are not on this machine.
    """
    run = next((path for path in (folder, folder.parent) if (path / DATA_FILE).is_file()), folder)
    recorded = read_json(run / DATA_FILE, "the data of a run", ["fingerprint"])
    try:
        options = parse_arguments([str(run / ARGUMENTS_FILE)], program="minigpt")
    except SystemExit as error:  # its line is printed
        raise UserError(f"{run / ARGUMENTS_FILE} is not of this version") from error
    for shards in _candidates(options):
        if shards.fingerprint == recorded["fingerprint"]:
            return shards, cache_folder(options)
    where = " ".join(options.data) if options.data else str(cache_folder(options))
    raise UserError(f"the text that {run.name} was trained on is not in {where}")


def _candidates(options: Arguments) -> Iterator[TokenShards]:
    """All shards that may be those of a run with these options, and are not damaged."""
    folders = (
        [options.data] if options.data else [[path.parent] for path in cache_folder(options).glob(f"*/{MANIFEST}")]
    )
    for parts in folders:
        with suppress(UserError, OSError):
            yield join_shards([open_shards(part) for part in parts], options.data_weights or [])
