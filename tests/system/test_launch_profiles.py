"""Every launch profile is one that accelerate reads; the CPU ones are run in test_train_accelerate."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from support.runs import ROOT

PROFILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_a_profile_is_read_by_accelerate_and_says_what_its_name_does(profile: Path) -> None:
    config = load_config_from_file(str(profile))
    assert (config.num_processes > 1) == (profile.stem not in ("cpu", "single_gpu"))
    assert (config.num_machines > 1) == (profile.stem == "multi_node")
    assert config.use_cpu == profile.stem.startswith("cpu")
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")
    assert (config.distributed_type.value == "FSDP") == (profile.stem == "fsdp2")


def test_the_profiles_are_those_that_the_readme_names() -> None:
    assert {path.stem for path in PROFILES} == {"cpu", "cpu_ddp", "fsdp2", "multi_gpu", "multi_node", "single_gpu"}
