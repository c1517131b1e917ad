"""Laws of launch profiles and presets: accelerate reads them, and the README lists exactly those that exist."""

import re

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from minigpt.config.presets import presets, profiles
from support.runs import ROOT


@pytest.mark.parametrize("name", profiles())
def test_a_profile_is_read_by_accelerate_and_does_what_its_name_says(name: str) -> None:
    config = load_config_from_file(str(profiles()[name]))
    assert (config.num_processes > 1) == (name not in ("cpu", "single_gpu"))
    assert (config.num_machines > 1) == (name in ("multi_node", "hsdp"))
    assert config.use_cpu == name.startswith("cpu")
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")
    assert (config.distributed_type.value == "FSDP") == (name in ("fsdp2", "hsdp"))


@pytest.mark.parametrize(("folder", "files"), [("accelerate_configs", profiles()), ("configs", presets())])
def test_the_documentation_lists_exactly_the_files_that_exist(folder: str, files: dict[str, object]) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = page.split(f"| `{folder}/` | |\n")[1].split("\n\n")[0]
    listed = set()
    for row in table.splitlines()[1:]:
        names = re.findall(r"`([\w.-]+)`", row.split("|")[1])
        listed |= {names[0] + name if name.startswith("-") else name for name in names}  # `pretrain_gpt2`, `-medium`
    assert listed == set(files)
