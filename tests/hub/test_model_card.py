"""Cards of a real run, made by the trainer in this process."""

import getpass
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import evaluate
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from minigpt.hub.model_card import MARK, model_card, write_card
from minigpt.hub.run_summary import read_run_summary
from minigpt.utils.run_files import CARD_FILE


@pytest.fixture
def run(tiny_run: list[str], train_here: Callable[[list[str]], int], tmp_path: Path) -> Path:
    """A run of twelve steps."""
    assert train_here(tiny_run) == 0
    return tmp_path / "run"


def test_the_trainer_leaves_a_card_that_the_hub_can_read(run: Path, tmp_path: Path) -> None:
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
        "`learning_rate` | 0.01",
        "(loss.png)",
        "12 steps in 0:00:0",
        "on cpu",
    ]
    assert [fact for fact in facts if fact not in card.text] == []
    for private in (str(tmp_path), str(Path.home()) + "/", f"/{getpass.getuser()}/"):
        assert private not in card.content


def test_the_snippet_of_the_card_in_the_folder_works_as_printed_beside_it(run: Path) -> None:
    snippet = (run / CARD_FILE).read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", snippet], cwd=run.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The")


def test_a_card_that_somebody_has_made_their_own_is_not_written_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    write_card(tmp_path)
    written = (tmp_path / CARD_FILE).read_text()
    (tmp_path / CARD_FILE).write_text(written.replace("# ", "# My own ") + "edited")
    write_card(tmp_path)  # the mark is still there: nothing says that the words are a person's
    assert (tmp_path / CARD_FILE).read_text() == written
    mine = written.replace(MARK, "")
    (tmp_path / CARD_FILE).write_text(mine)
    write_card(tmp_path)
    assert (tmp_path / CARD_FILE).read_text() == mine


SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


def test_the_card_tells_base_model_data_set_and_hellaswag_where_they_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump({"load_best_model_at_end": True, "max_steps": 20}))
    (tmp_path / "environment.json").write_text(json.dumps({"base_model": "openai-community/gpt2"}))
    source = {"dataset_name": "Salesforce/wikitext", "dataset_config_name": "wikitext-2-raw-v1"}
    (tmp_path / "data.json").write_text(json.dumps({"source": source}))
    lines = [
        {"step": 10, "val/loss": 3.0, "hellaswag/acc": 0.25},
        {"step": 20, "val/loss": float("nan"), "hellaswag/acc": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = ModelCard(model_card(read_run_summary(tmp_path), "ann/tuned", license="apache-2.0", revision="dev"))
    assert card.data.base_model == "openai-community/gpt2"
    assert card.data.datasets == ["Salesforce/wikitext"]
    assert card.data.license == "apache-2.0"
    results = {result.dataset_type: result.metric_value for result in card.data.eval_results or []}
    assert results == {"Salesforce/wikitext": 3.0, "Rowan/hellaswag": 0.25}  # of the best model, not of the last
    assert "fine-tuned from `openai-community/gpt2` on Salesforce/wikitext" in card.text
    assert 'model="ann/tuned", revision="dev"' in card.text


def test_a_folder_that_knows_nothing_but_its_shape_still_has_a_true_card(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    card = ModelCard(model_card(read_run_summary(tmp_path), "ann/bare"))
    assert "## Evaluation" not in card.text
    assert "## Training" not in card.text
    assert "## Data" not in card.text
    assert card.data.to_dict().get("model-index") is None


def test_hellaswag_measured_after_the_training_is_on_the_card(run: Path) -> None:
    (run / "evaluations").mkdir()
    evaluate.save(
        str(run / "evaluations" / "hellaswag.json"), **{"hellaswag/acc": 0.2892, "hellaswag/acc_norm": 0.3114}
    )
    write_card(run)
    card = ModelCard.load(run / CARD_FILE)
    assert "| HellaSwag, accuracy normalised by bytes | 0.3114 |" in card.text
    values = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    assert values["HellaSwag, accuracy"] == 0.2892
