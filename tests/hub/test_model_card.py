"""Model cards, of real runs that the trainer makes in this process and of hand-written records."""

import ast
import getpass
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import Sampling
from minigpt.hub.model_card import GENERATED_MARKER, model_card, write_card
from minigpt.hub.run_summary import METRIC_LABELS, read_run_summary
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import CARD_FILE
from support.tables import unpadded
from support.tiny import byte_tokenizer, tiny_model

CONFIG = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


@pytest.fixture
def run(tiny_run: list[str], train_here: Callable[[list[str]], int], tmp_path: Path) -> Path:
    """A run of twelve steps."""
    assert train_here(tiny_run) == 0
    return tmp_path / "run"


def test_trainer_writes_a_card_with_the_facts_of_the_run_and_no_local_paths(run: Path, tmp_path: Path) -> None:
    card = ModelCard.load(run / CARD_FILE)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "mit"
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert card.data.language is None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "val/loss" in line)
    results = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    names = {"loss": "val/loss", "perplexity": "val/perplexity", "bits_per_byte": "val/bits_per_byte"}
    assert results == {kind: round(last[name], 4) for kind, name in names.items()}

    manifest = json.loads((run / "data.json").read_text())
    hashes = [shard["sha256"] for split in manifest["splits"].values() for shard in split["shards"]]
    hashes += [manifest["fingerprint"], manifest["tokenizer_hash"], manifest["source"]["train_file"][0]["sha256"]]
    parameters = sum(array.size for array in load_file(run / "model.safetensors").values())
    facts = [
        *hashes,
        f"{parameters:,} parameters",
        "| `learning_rate` | `0.01` |",
        "(loss.png)",
        "12 steps in 0:00:0",
        "on cpu",
    ]
    assert [fact for fact in facts if fact not in unpadded(card.text)] == []
    for private in (str(tmp_path), str(Path.home()) + "/", f"/{getpass.getuser()}/"):
        assert private not in card.content


def test_snippet_of_the_card_runs_next_to_the_folder_of_the_run(run: Path) -> None:
    snippet = (run / CARD_FILE).read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", snippet], cwd=run.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The")


def test_hellaswag_results_measured_after_training_are_on_the_card(run: Path) -> None:
    (run / "evaluations").mkdir()
    evaluate.save(
        str(run / "evaluations" / "hellaswag.json"), **{"hellaswag/acc": 0.2892, "hellaswag/acc_norm": 0.3114}
    )
    write_card(run)
    card = ModelCard.load(run / CARD_FILE)
    assert "| HellaSwag, accuracy normalized by bytes | 0.3114 |" in unpadded(card.text)
    values = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    assert values["HellaSwag, accuracy"] == 0.2892


def test_card_without_its_marker_line_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_card(tmp_path)
    generated = (tmp_path / CARD_FILE).read_text()
    (tmp_path / CARD_FILE).write_text(generated.replace("# ", "# My own ") + "edited")
    write_card(tmp_path)  # with the marker line, the card counts as generated
    assert (tmp_path / CARD_FILE).read_text() == generated
    edited = generated.replace(GENERATED_MARKER, "")
    (tmp_path / CARD_FILE).write_text(edited)
    write_card(tmp_path)
    assert (tmp_path / CARD_FILE).read_text() == edited


def test_card_names_base_model_dataset_and_the_metrics_of_the_best_model(tmp_path: Path) -> None:
    write_records(
        tmp_path,
        options={"load_best_model_at_end": True, "max_steps": 20},
        environment={"base_model": "openai-community/gpt2"},
        source={"dataset_name": "Salesforce/wikitext", "dataset_config_name": "wikitext-2-raw-v1"},
        metrics=[
            {"step": 10, "val/loss": 3.0, "hellaswag/acc": 0.25},
            {"step": 20, "val/loss": float("nan"), "hellaswag/acc": 0.5},
        ],
    )
    card = ModelCard(model_card(read_run_summary(tmp_path), "ann/tuned", license="apache-2.0", revision="dev"))
    assert card.data.base_model == "openai-community/gpt2"
    assert card.data.datasets == ["Salesforce/wikitext"]
    assert card.data.license == "apache-2.0"
    results = {result.dataset_type: result.metric_value for result in card.data.eval_results or []}
    assert results == {"Salesforce/wikitext": 3.0, "Rowan/hellaswag": 0.25}
    assert "fine-tuned from `openai-community/gpt2` on `Salesforce/wikitext`" in card.text
    assert 'model="ann/tuned", revision="dev"' in card.text


def test_card_has_no_section_about_what_was_not_recorded(tmp_path: Path) -> None:
    write_records(tmp_path)
    card = ModelCard(model_card(read_run_summary(tmp_path), "ann/bare"))
    assert re.findall("^## .*", card.text, re.MULTILINE) == ["## How to use it", "## Limits", "## License"]
    assert card.data.to_dict().get("model-index") is None


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_card_of_a_chat_model_shows_a_conversation(tmp_path: Path, where: str) -> None:
    write_records(tmp_path, options={"sample_prompts": ["", "Who are you?"]})
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert "a base model" in model_card(read_run_summary(tmp_path), "ann/base")
    chat_template = "{{ messages }}"
    is_json = where.endswith(".json")
    (tmp_path / where).write_text(json.dumps({"chat_template": chat_template}) if is_json else chat_template)
    byte_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    card = ModelCard(model_card(read_run_summary(tmp_path), "ann/chat"))
    assert "conversational" in card.data.to_dict()["tags"]
    assert '{"role": "user", "content": "Who are you?"}' in card.text
    assert "minigpt chat --model ann/chat\n" in card.text
    assert "base model" not in card.text
    (tmp_path / "arguments.yaml").unlink()
    assert '"content": "What can you do?"' in model_card(read_run_summary(tmp_path), "ann/chat")


def test_snippet_of_a_chat_card_prints_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    set_chat_template(tokenizer, read_chat_template("chatml"))
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128)
    model.generation_config.do_sample = False
    model.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    write_card(tmp_path / "mine")
    snippet = (tmp_path / "mine" / CARD_FILE).read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(snippet, {})
    answer = Conversation(model, tokenizer).ask("What can you do?", Sampling(64, temperature=0), seed=0)
    assert capsys.readouterr().out.strip() == answer.continuation.strip()


@pytest.mark.parametrize(
    ("base", "base_on_hub", "named"),
    [
        ("openai-community/gpt2", "openai-community/gpt2", "`openai-community/gpt2`"),
        ("/home/ann/runs/gpt", None, "`gpt`"),
        (None, None, "another model"),
    ],
)
def test_card_of_an_adapter_names_its_base_and_no_path(
    tmp_path: Path, base: str | None, base_on_hub: str | None, named: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    save_file({"a": np.zeros((3, 4)), "b": np.zeros((4, 2))}, tmp_path / "adapter_model.safetensors")
    card = ModelCard(model_card(read_run_summary(tmp_path), "ann/adapter"))
    assert card.data.library_name == "peft"
    assert card.data.base_model == base_on_hub
    assert f"A LoRA adapter with 20 parameters for {named}," in card.text
    assert "minigpt merge ann/adapter merged" in card.text
    assert "/home" not in card.content


HOSTILE = [
    "{{ 7 * 7 }}{% for x in y %}",
    "a | b |\n---\n| c",
    "---\nlicense: gpl\n---\n# x",
    "```\n\n# heading ` ``",
    "quote \" ' \\ <script>alert(1)</script>",
    "key: [value, #",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_values_from_users_cannot_change_front_matter_code_or_tables(tmp_path: Path, text: str) -> None:
    def card_with(value: str) -> ModelCard:
        write_records(
            tmp_path,
            options={"optimizer": value, "sample_prompts": [value]},
            environment={"base_folder": value, "device": value, "processes": 1, "mixed_precision": "no"},
            source={"train_file": [{"path": value, "bytes": 1, "sha256": "0" * 64}], "corpus": value},
            metrics=[{"step": 10, "elapsed_s": 1.0, "train/loss": 3.0, "val/loss": 3.0}],
        )
        return ModelCard(model_card(read_run_summary(tmp_path), value, license=value, revision=value))

    card, harmless = card_with(text), card_with("harmless")
    assert card.content.count(GENERATED_MARKER) == 1
    assert list(card.data.to_dict()) == list(harmless.data.to_dict())
    assert card.data.license == text
    assert (card.data.eval_results or [])[0].dataset_name == text
    assert re.findall("^## .*", card.text, re.MULTILINE) == re.findall("^## .*", harmless.text, re.MULTILINE)
    assert len(card.text.splitlines()) == len(harmless.text.splitlines())
    for line, harmless_line in zip(card.text.splitlines(), harmless.text.splitlines(), strict=True):
        cells, harmless_cells = re.findall(r"(?<!\\)\|", line), re.findall(r"(?<!\\)\|", harmless_line)
        assert not harmless_line.startswith("|") or cells == harmless_cells
    snippet = card.text.split("```python\n")[1].split("\n```\n")[0]
    strings = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
    assert strings.count(text) == 2  # model and revision
    without_code = re.sub("(`+).+?\\1", "", card.text.replace(snippet, ""))
    assert not re.search(r"(?<!\\)<script", without_code)
    if "{{" in text:
        assert f"`{text}`" in card.text


def test_metrics_of_front_matter_and_table_agree(tmp_path: Path) -> None:
    values = {name: 0.1 + 0.01 * number for number, name in enumerate(METRIC_LABELS)}
    write_records(tmp_path, metrics=[{"step": 3, **values}])
    card = ModelCard(model_card(read_run_summary(tmp_path), "ann/all"))
    for result in card.data.eval_results or []:
        assert f"| {result.metric_name} | {result.metric_value:.4f} |" in unpadded(card.text)
    assert sorted(result.metric_value for result in card.data.eval_results or []) == pytest.approx(
        sorted(values.values())
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("arguments.yaml", "a: [1"),
        ("arguments.yaml", "- a"),
        ("data.json", "{"),
        ("environment.json", "[]"),
        ("adapter_config.json", '{"base_model_name_or_path": 1}'),
        ("config.json", '{"n_layer": 2}'),
        ("metrics.jsonl", "{}\nx\n"),
    ],
)
def test_damaged_record_is_a_user_error_that_names_the_file(tmp_path: Path, name: str, content: str) -> None:
    write_records(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        model_card(read_run_summary(tmp_path), "ann/damaged")


def write_records(
    folder: Path,
    options: dict | None = None,
    environment: dict | None = None,
    source: dict | None = None,
    metrics: list[dict] | None = None,
) -> None:
    """Write the records of a run without a model; None: no such file."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if options is not None:
        (folder / "arguments.yaml").write_text(yaml.safe_dump(options))
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    if source is not None:
        (folder / "data.json").write_text(json.dumps({"source": source}))
    if metrics is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def test_no_name_breaks_the_card(tmp_path: Path) -> None:
    run = tmp_path / "x: [y\n```"
    run.mkdir()
    write_records(
        run,
        environment={
            "base_model": "a: {b",
            "device": "x|*y*",
            "processes": 1,
            "mixed_precision": "`no",
            "versions": {},
        },
        source={"dataset_name": "- a: [b"},
        metrics=[{"step": 1, "train/loss": 1.0, "elapsed_s": 1.0, "val/loss": 1.0}],
    )
    card = ModelCard(model_card(read_run_summary(run), run.name, license="a: |b", revision="r: ]\n```"))
    assert card.data.license == "a: |b"
    assert card.data.base_model == "a: {b"
    assert card.data.datasets == ["- a: [b"]
    assert card.data.model_name == "x: [y\n```"
    assert r"# x: \[y \`\`\`" in card.text.splitlines()
