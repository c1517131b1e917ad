"""A module imports only from a lower layer, so each can be read knowing only what lies beneath it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = [
    ["configuration_minigpt", "modeling_minigpt"],
    [
        "arguments",
        "benchmark_report",
        "borrowed",
        "command_line",
        "errors",
        "event_files",
        "evaluate_metrics",
        "examples",
        "host_memory",
        "metrics",
        "muon",
        "packed_linear",
        "schedule",
        "state",
        "stopping",
        "fast_encoders",
        "python_docs",
        "recompute",
        "secret_scan",
        "shards",
        "sources",
        "space_app",
    ],
    [
        "bad_steps",
        "agreement",
        "checkpoint",
        "checkpoint_files",
        "data",
        "evaluation",
        "forecast",
        "gpt2_export",
        "insight",
        "lean_loss",
        "mixing",
        "optim",
        "packing",
        "plot",
        "sampling",
        "provenance",
        "run_facts",
        "tokenization",
        "tracking",
        "corpora",
        "encoding",
        "hellaswag_items",
        "hub_datasets",
        "shard_writer",
    ],
    [
        "accelerator",
        "budget",
        "build",
        "card",
        "feed",
        "generate",
        "hellaswag",
        "perplexity",
        "plan",
        "planned",
        "playground",
        "prepare",
        "probe",
        "publish",
        "replay",
        "sample_texts",
        "space",
        "verify_resume",
        "views",
        "benchmark_generate",
        "benchmark_load",
        "benchmark_loss",
        "benchmark_train",
        "benchmark_turn",
        "benchmark_tokenize",
        "data_inspect",
    ],
    ["train_accelerate", "hub_upload", "cli", "__main__"],
]
LAYER_OF = {module: number for number, modules in enumerate(LAYERS) for module in modules}
# within a layer: (the module, what it may import beside the layers beneath it)
NEIGHBOURS = {
    ("command_line", "arguments"),
    ("command_line", "errors"),
    ("modeling_minigpt", "configuration_minigpt"),
    ("bad_steps", "checkpoint"),
    ("checkpoint", "checkpoint_files"),
    ("replay", "build"),
    ("replay", "feed"),
    ("examples", "shards"),
    ("sources", "examples"),
    ("corpora", "hub_datasets"),
    ("shard_writer", "encoding"),
    ("evaluation", "data"),
    ("forecast", "lean_loss"),
    ("lean_loss", "data"),
    ("packing", "data"),
    ("mixing", "data"),
    ("plot", "tracking"),
    ("insight", "sampling"),
    ("playground", "generate"),
    ("playground", "views"),
    ("publish", "card"),
    ("space", "card"),
    ("space", "publish"),
    ("run_facts", "provenance"),
    ("budget", "build"),
    ("budget", "planned"),
    ("budget", "probe"),
    ("build", "feed"),
    ("build", "hellaswag"),
    ("build", "prepare"),
    ("plan", "feed"),
    ("benchmark_tokenize", "prepare"),
    ("benchmark_train", "benchmark_turn"),
    ("__main__", "cli"),
}
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "minigpt").glob("*.py")])


def imported_modules(path: Path) -> set[str]:
    """The names of this project's modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "minigpt":
            names |= {f"minigpt.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.removeprefix("minigpt.") for name in names} & LAYER_OF.keys()


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stem != "__init__"], ids=lambda path: path.stem)
def test_a_module_imports_only_from_lower_layers(path: Path) -> None:
    assert path.stem in LAYER_OF, f"{path.stem} has no place in the table of layers"
    for name in imported_modules(path):
        lower = LAYER_OF[name] < LAYER_OF[path.stem]
        assert lower or (path.stem, name) in NEIGHBOURS, f"{path.stem} must not import {name}"
