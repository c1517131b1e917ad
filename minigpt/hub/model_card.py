"""Write the model card of a run."""

import json
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from minigpt.config.arguments import BatchArguments, OptimizerArguments
from minigpt.hub.run_summary import METRIC_NAMES, Facts, read_run_summary
from minigpt.training.provenance import without_paths
from minigpt.utils.formatting import markdown_table
from minigpt.utils.run_files import CARD_FILE

MARK = "<!-- Written from the run. Without this line, the card is yours: it is not written again. -->"

MORE_HYPERPARAMETERS = ("dropout", "attn_implementation", "gradient_checkpointing", "load_best_model_at_end")

LISTED_SHARDS = 8  # more are told by the fingerprint alone


def model_card(facts: Facts, name: str, license: str = "mit", revision: str | None = None) -> str:
    """The card of the model that others load as `name`: YAML front matter for the Hub, then Markdown for people."""
    sections = [
        f"---\n{front_matter(facts, name, license).to_yaml()}\n---",
        MARK,
        f"# {name.split('/')[-1]}",
        _what_it_is(facts),
        "## How to use it",
        _usage(facts, name, revision),
        *_section("Data", _data(facts)),
        *_section("Training", _training(facts)),
        *_section("Evaluation", _evaluation(facts)),
        "## Limits",
        _limits(facts),
        "## Licence",
        f"Code and weights: `{license}`. The text that the model learned from keeps its own licence.",
    ]
    return "\n\n".join(sections) + "\n"


def write_card(run_dir: Path, name: str | None = None) -> None:
    """Write README.md into the run's folder, unless its owner has made the one there their own."""
    if not is_edited(run_dir / CARD_FILE):
        text = model_card(read_run_summary(run_dir), name or run_dir.resolve().name)
        (run_dir / CARD_FILE).write_text(text, encoding="utf-8")


def is_edited(path: Path) -> bool:
    """Whether the card at `path` is a person's, and must stay as it is."""
    return path.is_file() and MARK not in path.read_text(encoding="utf-8")


def front_matter(facts: Facts, name: str, license: str) -> ModelCardData:
    """What the Hub reads. The language is left out: nobody told the run."""
    return ModelCardData(
        model_name=name.split("/")[-1],
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        tags=["minigpt", "gpt", "causal-lm", "custom_code"],
        base_model=facts.environment.get("base_model"),
        datasets=[facts.dataset] if facts.dataset else None,
        eval_results=_eval_results(facts) or None,
    )


def _eval_results(facts: Facts) -> list[EvalResult]:
    results = []
    for name, value in facts.evaluation.items():
        if name not in METRIC_NAMES:
            continue
        kind, title = METRIC_NAMES[name]
        of_hellaswag = name.startswith("hellaswag/")
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type="Rowan/hellaswag" if of_hellaswag else facts.dataset or "text",
                dataset_name="HellaSwag" if of_hellaswag else facts.data_name,
                dataset_split="validation",
                metric_type=kind,
                metric_name=title,
                metric_value=round(value, 4),
            )
        )
    return results


def _what_it_is(facts: Facts) -> str:
    config = facts.config
    base = facts.environment.get("base_model") or facts.environment.get("base_folder")
    origin = f"fine-tuned from `{base}`" if base else "trained from scratch"
    return (
        f"A GPT of {facts.parameters:,} parameters, {origin} on {facts.data_name}: "
        f"{config['num_hidden_layers']} layers, {config['num_attention_heads']} heads, width {config['hidden_size']}, "
        f"a vocabulary of {config['vocab_size']:,} tokens and a context of {config['max_position_embeddings']:,}. "
        "It computes the function of GPT-2, and continues the text that it is given."
    )


def _usage(facts: Facts, name: str, revision: str | None) -> str:
    length = min(40, facts.config["max_position_embeddings"] // 2)
    prompt = json.dumps(example_prompt(facts), ensure_ascii=False)
    at = f', revision="{revision}"' if revision else ""
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model="{name}"{at}, trust_remote_code=True)\n'
        f'print(generate({prompt}, max_new_tokens={length})[0]["generated_text"])\n```\n\n'
        "`trust_remote_code=True` runs the two Python files beside the weights, which define the model: read them."
    )


def example_prompt(facts: Facts) -> str:
    """A text that the tokenizer can read (one of characters refuses those it does not know)."""
    given = facts.options.get("sample_prompts") or []
    path = facts.model_dir / "tokenizer.json"
    if not path.is_file():
        return "The"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    for prompt in sorted([*given, "The", "\n"], key=lambda text: not text.strip()):
        try:
            if tokenizer.encode(prompt, add_special_tokens=False).ids:
                return prompt
        except Exception:  # the library raises a bare Exception for a character without an id
            continue
    return min(tokenizer.get_vocab(with_added_tokens=False))


def _data(facts: Facts) -> list[str]:
    source, splits = facts.data.get("source", {}), facts.data.get("splits", {})
    lines = []
    for record in [*source.get("train_file", []), *source.get("validation_file", [])]:
        lines.append(f"- `{record['path']}`: {record['bytes']:,} bytes, sha256 `{record['sha256']}`")
    told = {key: value for key, value in source.items() if key not in ("train_file", "validation_file")}
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in told.items() if value is not None]
    parts = ["\n".join(lines)] if lines else []
    rows = [
        [name, *(f"{split[key]:,}" if key in split else "?" for key in ("documents", "tokens", "text_bytes"))]
        for name, split in splits.items()
    ]
    if rows:
        parts.append(markdown_table(["split", "documents", "tokens", "bytes of text"], rows))
    hashes = [("all shards", facts.data.get("fingerprint")), ("tokenizer", facts.data.get("tokenizer_hash"))]
    shards = [(shard["file"], shard.get("sha256")) for split in splits.values() for shard in split["shards"]]
    hashes += shards if len(shards) <= LISTED_SHARDS else []
    rows = [[what, f"`{digest}`"] for what, digest in hashes if digest]
    return [*parts, *([markdown_table(["what", "sha256"], rows)] if rows else [])]


def _training(facts: Facts) -> list[str]:
    parts, environment, last = [], facts.environment, facts.training
    if last:
        duration = timedelta(seconds=round(last["elapsed_s"]))
        text = f"{last['step']:,} steps in {duration} of training (h:mm:ss, evaluation excluded)"
        if environment.get("device"):
            processes = environment["processes"]
            text += f" on {environment['device']}, {processes} process{'es' if processes > 1 else ''}"
            text += f", mixed precision: {environment['mixed_precision']}"
        parts.append(f"{text}. Training loss at the end: {last['train/loss']:.4f}.")
    if facts.has_curve:
        parts.append("![Loss, learning rate and throughput over the steps](loss.png)")
    names = [f.name for group in (BatchArguments, OptimizerArguments) for f in fields(group)]
    values = {name: facts.options.get(name) for name in (*names, *MORE_HYPERPARAMETERS)}
    idle = {"muon_learning_rate"} if values["optimizer"] != "muon" else set()
    idle |= {"num_train_epochs"} if values["max_steps"] is not None else set()
    rows = [
        [f"`{n}`", str(without_paths(value))] for n, value in values.items() if value is not None and n not in idle
    ]
    if rows:
        parts.append(markdown_table(["option", "value"], rows))
    if environment.get("versions"):
        versions = (f"{name} {number}" for name, number in environment["versions"].items() if number)
        parts.append(f"Versions: {', '.join(versions)}.")
    return parts


def _evaluation(facts: Facts) -> list[str]:
    found = facts.evaluation
    rows = [[title, f"{found[name]:.4f}"] for name, (_, title) in METRIC_NAMES.items() if name in found]
    if not rows:
        return []
    return [
        f"After step {found['step']:,}; loss over every token of the validation split.",
        markdown_table(["", ""], rows),
    ]


def _limits(facts: Facts) -> str:
    context = facts.config["max_position_embeddings"]
    return (
        f"A base model: it continues text and does not follow instructions. It sees {context:,} tokens at most, "
        "invents facts, repeats what its text contained, prejudice included, and was tested by no more than what is "
        "written here. Do not let it decide anything about people."
    )


def _section(title: str, parts: list[str]) -> list[str]:
    return [f"## {title}", *parts] if parts else []
