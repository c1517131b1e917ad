"""Tell the name of a local folder from that of a repository on the Hub."""

from pathlib import Path

from minigpt.utils.errors import UserError


def refuse_missing_folder(option: str, name: str) -> None:
    """Raises UserError if `name`, the value of `option`, means a local folder and there is none.

    Otherwise a mistyped folder would be looked up on the Hub, for half a minute without a network. A repository has
    one slash at most, and an owner whose name is neither that of a local folder nor that of the folder of runs.
    """
    path = Path(name).expanduser()
    if path.exists():
        return
    starts_like_a_path = path.is_absolute() or name.startswith((".", "~", "runs/")) or "\\" in name
    if starts_like_a_path or name.count("/") > 1 or ("/" in name and path.parent.is_dir()):
        raise UserError(f"{option}={name}: no such folder")
