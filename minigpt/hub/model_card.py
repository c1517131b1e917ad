"""Write the model card of a run: values from the run, filled into templates/model_card.md."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path, PurePosixPath

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from minigpt.config.arguments import BatchArguments, OptimizerArguments
from minigpt.hub.run_summary import METRIC_LABELS, RunSummary, read_run_summary
from minigpt.training.provenance import without_paths
from minigpt.utils.errors import UserError
from minigpt.utils.files import read_bytes, write_atomically
from minigpt.utils.formatting import markdown_table
from minigpt.utils.run_files import CARD_FILE

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"

GENERATED_MARKER = (
    "<!-- This card was written from the run. To edit it, remove this line: "
    "a card without this line is never overwritten. -->"
)

SHAPE = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings")

LISTED_OPTIONS = (
    *(field.name for group in (BatchArguments, OptimizerArguments) for field in fields(group)),
    *("dropout", "attn_implementation", "gradient_checkpointing", "load_best_model_at_end"),
)

TRANSFORMERS_JS_DTYPES = {"model_quantized": "q8", "model_q4": "q4", "model_fp16": "fp16", "model": "fp32"}

MAX_LISTED_FILES = 3  # in a sentence

MAX_LISTED_SHARDS = 8  # above that, only the hash over all shards is listed


def model_card(
    summary: RunSummary,
    repo_id: str,
    license: str = "mit",
    revision: str | None = None,
    engine_files: Sequence[str] = (),
) -> str:
    """The card of a model that is loaded as `repo_id`: YAML front matter for the Hub, then Markdown.

    engine_files: the names of GGUF and ONNX files in the repository.

    Values that come from users (names, paths, options) are shown as they are: they cannot break the front matter, the
    code or the tables. Raises UserError if config.json is not that of a MiniGPT; an adapter has none.
    """
    missing = [name for name in SHAPE if name not in summary.config]
    if missing and not summary.is_adapter:
        path = summary.model_dir / "config.json"
        raise UserError(f"{path} has no {missing[0]}; give the folder of a MiniGPT, such as a run or a checkpoint")
    layers, heads, width, vocabulary, context = (summary.config.get(name, 0) for name in SHAPE)
    gguf_types = [name.removesuffix(".gguf").rpartition("-")[2] for name in engine_files if name.endswith(".gguf")]
    graphs = {PurePosixPath(name).stem for name in engine_files if name.endswith(".onnx")}
    onnx_dtypes = [dtype for graph, dtype in TRANSFORMERS_JS_DTYPES.items() if graph in graphs]
    base_model = _code(summary.base_model) if summary.base_model else ""
    model_argument = _python_string(repo_id) + (f", revision={_python_string(revision)}" if revision else "")
    card = ModelCard.from_template(
        _front_matter(summary, repo_id, license, engine_files),
        template_path=str(TEMPLATE),
        generated_marker=GENERATED_MARKER,
        title=_plain_text(_model_name(repo_id)),
        parameters=f"{summary.parameters:,}",
        is_adapter=summary.is_adapter,
        is_chat_model=summary.is_chat_model,
        base_model=base_model or "another model",
        origin=f"fine-tuned from {base_model}" if base_model else "trained from scratch",
        training_text=_training_text(summary),
        layers=layers,
        heads=heads,
        width=width,
        vocabulary=f"{vocabulary:,}",
        context=f"{context:,}" if context else "",
        model_argument=model_argument,
        model_word=_shell_word(repo_id),
        command=_command(summary, repo_id),
        prompt=_python_string(summary.example_prompt),
        new_tokens=min(200 if summary.is_chat_model else 40, context // 2),
        gguf_word=_shell_word(f"{repo_id}:{gguf_types[0]}") if gguf_types else "",
        gguf_types=", ".join(gguf_types),
        onnx_dtype=onnx_dtypes[0] if onnx_dtypes else "",
        onnx_dtypes=", ".join(f"`{dtype}`" for dtype in onnx_dtypes),
        repo_string=_python_string(repo_id),
        revision_string=_python_string(revision) if revision else "",
        data_sources=_data_sources(summary),
        split_table=_split_table(summary),
        hash_table=_hash_table(summary),
        training_result=_training_result(summary),
        has_loss_plot=summary.has_loss_plot,
        option_table=_option_table(summary),
        versions=_versions(summary),
        evaluated_step=f"{summary.evaluation['step']:,}",
        metric_table=_metric_table(summary),
        license_code=_code(license),
    )
    return f"{card}\n"


def write_card(run_dir: Path, repo_id: str | None = None) -> None:
    """Write README.md into the folder of a run, except where a person has edited it."""
    path = run_dir / CARD_FILE
    if not is_edited_card(path):
        write_atomically(path, model_card(read_run_summary(run_dir), repo_id or _local_name(run_dir)))


def is_edited_card(path: Path) -> bool:
    """Whether there is a card at `path` that a person has edited. It must not be overwritten."""
    return path.is_file() and GENERATED_MARKER.encode() not in read_bytes(path)


def _local_name(run_dir: Path) -> str:
    """What loads the model from the folder where the run was started; of an absolute path only the last part."""
    return run_dir.resolve().name if run_dir.is_absolute() or ".." in run_dir.parts else run_dir.as_posix()


def _front_matter(summary: RunSummary, repo_id: str, license: str, engine_files: Sequence[str]) -> ModelCardData:
    """What the Hub reads. The language is not set, because the run does not know it."""
    return ModelCardData(
        model_name=_model_name(repo_id),
        library_name="peft" if summary.is_adapter else "transformers",
        pipeline_tag="text-generation",
        license=license,
        tags=_tags(summary, engine_files),
        base_model=summary.base_on_hub,
        datasets=[summary.dataset] if summary.dataset else None,
        eval_results=_eval_results(summary) or None,
    )


def _tags(summary: RunSummary, engine_files: Sequence[str]) -> list[str]:
    tags = ["minigpt", "gpt", "causal-lm", "lora" if summary.is_adapter else "custom_code"]
    if any(name.endswith(".gguf") for name in engine_files):
        tags.append("gguf")
    if any(name.endswith(".onnx") for name in engine_files):
        tags += ["onnx", "transformers.js"]
    return [*tags, "conversational"] if summary.is_chat_model else tags


def _command(summary: RunSummary, repo_id: str) -> str:
    """The shell command that tries the model."""
    if summary.is_chat_model:
        return f"minigpt chat --model {_shell_word(repo_id)}"
    return f"minigpt generate --model {_shell_word(repo_id)} --prompt {_shell_word(summary.example_prompt)}"


def _eval_results(summary: RunSummary) -> list[EvalResult]:
    results = []
    for name, value in summary.evaluation.items():
        if name not in METRIC_LABELS:
            continue
        is_hellaswag = name.startswith("hellaswag/")
        data_name = _with_ellipsis(summary.data_names) or "token shards"
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type="Rowan/hellaswag" if is_hellaswag else summary.dataset or "text",
                dataset_name="HellaSwag" if is_hellaswag else data_name,
                dataset_split="validation",
                metric_type=METRIC_LABELS[name].type,
                metric_name=METRIC_LABELS[name].title,
                metric_value=round(value, 4),
            )
        )
    for result in summary.tasks:
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type=result["task"],
                dataset_name=result["task"],
                metric_type=result["metric"],
                metric_name=f"{result['metric']}, {result['shots']}-shot",
                metric_value=round(result["value"], 4),
            )
        )
    return results


def _model_name(repo_id: str) -> str:
    return repo_id.split("/")[-1]


def _training_text(summary: RunSummary) -> str:
    return _with_ellipsis([_code(name) for name in summary.data_names]) or "token shards"


def _with_ellipsis(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED_FILES]) + (", …" if len(names) > MAX_LISTED_FILES else "")


def _data_sources(summary: RunSummary) -> str:
    """A list of the text files with their hashes, and the other facts that the manifest has about the source."""
    source = dict(summary.data.get("source", {}))
    files = [*source.pop("train_file", []), *source.pop("validation_file", [])]
    lines = [f"- {_code(file['path'])}: {file['bytes']:,} bytes, sha256 {_code(file['sha256'])}" for file in files]
    lines += [
        f"- {_plain_text(key.replace('_', ' '))}: {_code(value)}" for key, value in source.items() if value is not None
    ]
    return "\n".join(lines)


def _split_table(summary: RunSummary) -> str:
    columns = {"documents": "documents", "tokens": "tokens", "text_bytes": "bytes of text"}
    rows = [
        [_plain_text(name), *("?" if split.get(column) is None else f"{split[column]:,}" for column in columns)]
        for name, split in summary.data.get("splits", {}).items()
    ]
    return _table(["split", *columns.values()], rows)


def _hash_table(summary: RunSummary) -> str:
    hashes = [("all shards", summary.data.get("fingerprint")), ("tokenizer", summary.data.get("tokenizer_hash"))]
    splits = summary.data.get("splits", {}).values()
    shards = [(shard["file"], shard.get("sha256")) for split in splits for shard in split.get("shards", [])]
    if len(shards) <= MAX_LISTED_SHARDS:
        hashes += shards
    return _table(["hash of", "sha256"], [[_plain_text(name), _code(digest)] for name, digest in hashes if digest])


def _training_result(summary: RunSummary) -> str:
    last, environment = summary.training, summary.environment
    if not last:
        return ""
    text = f"{last['step']:,} steps"
    if math.isfinite(last.get("elapsed_s", math.nan)):
        text += f" in {timedelta(seconds=round(last['elapsed_s']))} (h:mm:ss, without evaluation)"
    if environment.get("device"):
        processes = environment.get("processes") or 1
        text += f" on {_plain_text(environment['device'])}, {processes} process{'es' if processes > 1 else ''}"
        text += f", mixed precision: {_plain_text(environment.get('mixed_precision'))}"
    return f"{text}. The last logged training loss is {last['train/loss']:.4f}."


def _option_table(summary: RunSummary) -> str:
    values = {name: summary.options.get(name) for name in LISTED_OPTIONS}
    unused = {"muon_learning_rate"} if values["optimizer"] != "muon" else set()
    if values["max_steps"] is not None:
        unused.add("num_train_epochs")
    rows = [
        [f"`{name}`", _code(without_paths(value))]
        for name, value in values.items()
        if value is not None and name not in unused
    ]
    return _table(["option", "value"], rows)


def _versions(summary: RunSummary) -> str:
    return ", ".join(
        _plain_text(f"{name} {version}")
        for name, version in summary.environment.get("versions", {}).items()
        if version
    )


def _metric_table(summary: RunSummary) -> str:
    metrics = summary.evaluation
    rows = [[label.title, f"{metrics[name]:.4f}"] for name, label in METRIC_LABELS.items() if name in metrics]
    rows += [
        [f"{_plain_text(result['task'])}, {_plain_text(result['metric'])}, {_plain_text(result['shots'])}-shot",
         f"{result['value']:.4f}"]
        for result in summary.tasks
    ]  # fmt: skip
    return _table(["metric", "value"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return markdown_table(head, rows) if rows else ""


def _python_string(text: str) -> str:
    """`text` as a Python string literal in double quotes, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _shell_word(text: str) -> str:
    """`text` as one word of a shell command, on one line."""
    return " ".join(shlex.quote(text).split())


def _code(value: object) -> str:
    """Any value as Markdown code on one line (CommonMark, section "Code spans")."""
    text = " ".join(str(value).split()) or '""'  # a code span cannot be empty
    longest_run = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, padding = "`" * (longest_run + 1), " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def _plain_text(value: object) -> str:
    """A value as Markdown text on one line, in which no character has a special meaning."""
    return re.sub(r"([\\`*\[\]<>#|&~$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(value).split()))
