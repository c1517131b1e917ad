"""Laws of TRL: SFTTrainer and our data give a conversation the same loss; examples learn answers, preferences. Slow.

TRL runs in processes that cannot import this project, as in tests/system/test_ecosystem.py. It is no dependency:
MINIGPT_TOOLS_PYTHON names the Python of an environment that has it, otherwise one is made on first use.
"""

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from minigpt.cli import main
from minigpt.config.arguments import DataArguments
from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.data.prepare import prepare
from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, open_shards
from minigpt.data.tokenizer import load_tokenizer, train_bpe
from minigpt.export.gpt2 import export_gpt2
from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import Sampling
from minigpt.modeling.loading import load_model
from support.conversations import chat_templates, chat_tokenizers, random_conversations
from support.environments import environment
from support.runs import ROOT
from support.tiny import tiny_model

pytestmark = pytest.mark.slow

CONVERSATIONS = random_conversations(200)
Documents = list[list[int]]


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> str:
    return os.environ.get("MINIGPT_TOOLS_PYTHON") or environment(tmp_path_factory, "trl", ["trl", "peft"])


def run(python: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    variables = inherited | {"HF_HOME": str(cwd / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, "-P", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=900)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SFT = """
import json, sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
rows_file, model, *tokenizers = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
rows = load_dataset("json", data_files=rows_file, split="train")
options = SFTConfig("sft", max_length=None, use_cpu=True, assistant_only_loss="messages" in rows.column_names)
for folder in tokenizers:
    trainer = SFTTrainer(model, options, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(folder))
    with open(f"{folder}/trl.json", "w") as file:
        json.dump([trainer.train_dataset["input_ids"][:], trainer.train_dataset["labels"][:]], file)
"""


def prepared_by_both(
    tools: str, rows: list[dict], tmp_path: Path
) -> list[tuple[PreTrainedTokenizerFast, Documents, Documents, Documents, Documents]]:
    """For each tokenizer with each template: TRL's ids and labels, and our ids and labels, of every row."""
    rows_file = write_rows(tmp_path / "rows.jsonl", rows)
    tokenizers = {}
    for name, tokenizer in chat_tokenizers().items():
        for template_name, template in chat_templates().items():
            folder = tmp_path / f"{name} with {template_name}"
            tokenizer.chat_template = template
            tokenizer.save_pretrained(folder)
            tokenizers[folder] = load_tokenizer(folder)
    tiny_model(800).save_pretrained(tmp_path / "model")
    (tmp_path / "sft.py").write_text(SFT, encoding="utf-8")
    finished = run(tools, "sft.py", rows_file, "model", *tokenizers, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = []
    for folder, tokenizer in tokenizers.items():
        files = {"train_file": [str(rows_file)], "validation_file": [str(rows_file)]}
        tokens = open_shards(prepare(DataArguments(tokenizer=str(folder), **files), folder / "data")).train
        ids, marks = tokens.read(0, len(tokens)), tokens.marks(0, len(tokens))
        labels = np.where(marks & IN_LOSS, ids.astype(np.int64), -100)
        ends = np.flatnonzero(marks & ENDS_DOCUMENT) + 1
        ours = [[part.tolist() for part in np.split(array, ends[:-1])] for array in (ids, labels)]
        theirs = json.loads((folder / "trl.json").read_text(encoding="utf-8"))
        assert len(ours[0]) == len(theirs[0]) == len(rows)
        results.append((tokenizer, *theirs, *ours))
    return results


def test_the_ids_and_labels_of_conversations_are_those_of_trl(tools: str, tmp_path: Path) -> None:
    rows = [{"messages": messages} for messages in CONVERSATIONS]
    for tokenizer, *documents in prepared_by_both(tools, rows, tmp_path):
        for messages, trl_ids, trl_labels, ids, labels in zip(CONVERSATIONS, *documents, strict=True):
            assert ids[: len(trl_ids)] == trl_ids, (tokenizer.name_or_path, messages)
            assert labels[: len(trl_ids)] == trl_labels, (tokenizer.name_or_path, messages)
            # ours ends with the end of the document, which is in the loss if the token before it is
            if trl_ids[-1] == tokenizer.eos_token_id:
                assert len(ids) == len(trl_ids)
            else:
                end = tokenizer.eos_token_id
                assert ids[len(trl_ids) :] == [end]
                assert labels[-1] == (-100 if trl_labels[-1] == -100 else end)


def test_the_ids_and_labels_of_conversations_with_a_prompt_are_those_of_trl_unless_a_token_joins_both(
    tools: str, tmp_path: Path
) -> None:
    rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in CONVERSATIONS]
    equal = 0
    for tokenizer, *documents in prepared_by_both(tools, rows, tmp_path):
        if tokenizer.unk_token == "<unk>":  # writes a space before each part: the completion differs from TRL's
            continue
        for row, trl_ids, trl_labels, ids, labels in zip(rows, *documents, strict=True):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            assert ids[: len(prompt)] == prompt, (
                tokenizer.name_or_path,
                row,
            )  # as at inference, also where TRL's is not
            if trl_ids[: len(prompt)] == prompt:
                assert ids[: len(trl_ids)] == trl_ids, (tokenizer.name_or_path, row)
                assert labels[: len(trl_ids)] == trl_labels, (tokenizer.name_or_path, row)
                equal += 1
    assert equal > 1000


COLORS = ["red", "green", "blue", "white", "black"]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Is number {number} {COLORS[number % 5]}?"}],
        "chosen": [{"role": "assistant", "content": f"Yes, it is {COLORS[number % 5]}."}],
        "rejected": [{"role": "assistant", "content": f"No, it is {COLORS[number % 3]}!"}],
    }
    for number in range(16)
]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, and a tokenizer with ChatML's tokens and template."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = train_bpe([str(PAIRS)], 300)
    set_chat_template(tokenizer, read_chat_template("chatml"))
    tokenizer.save_pretrained(folder)
    no_dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model = tiny_model(len(tokenizer), hidden_size=32, max_position_embeddings=128, **no_dropout)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["full", "lora"])
def test_sft_starts_at_the_loss_of_the_answers_and_ends_with_a_model_that_gives_them(
    tools: str, chat_model: Path, tmp_path: Path, method: str
) -> None:
    rows = [{"messages": pair["prompt"] + pair["chosen"]} for pair in PAIRS]
    file, saved = write_rows(tmp_path / "chats.jsonl", rows), tmp_path / "sft"
    words = ["--model_name_or_path", chat_model, "--train_file", file, "--output_dir", saved, "--logging_steps", 1]
    options = "--max_steps 120 --per_device_train_batch_size 16 --learning_rate"
    options += " 1e-2" if method == "full" else " 3e-2 --use_peft --lora_r 8 --lora_dropout 0"
    finished = run(tools, ROOT / "examples" / "trl_sft.py", *words, *options.split(), cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]

    state = json.loads((saved / "checkpoint-120" / "trainer_state.json").read_text(encoding="utf-8"))
    models = [str(chat_model), str(saved)]
    main(["eval", "--model", *models, "--conversations", str(file), "--use_cpu", "--output", str(tmp_path / "eval")])
    before, after = json.loads((tmp_path / "eval").read_text(encoding="utf-8"))["results"].values()
    assert state["log_history"][0]["loss"] == pytest.approx(before["loss"], rel=1e-3)  # logged with four digits
    assert before["exact_match"] == 0
    assert after["exact_match"] == 1


def dpo(tools: str, model: Path, rows: list[dict], *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run examples/dpo.py into the folder `dpo`."""
    pairs = write_rows(cwd / "pairs.jsonl", rows)
    words = ["--model_name_or_path", model, "--train_file", pairs, "--output_dir", "dpo", "--use_cpu", *options]
    return run(tools, ROOT / "examples" / "dpo.py", *words, cwd=cwd)


def margins(folder: Path) -> torch.Tensor:
    """log p(chosen answer) - log p(rejected answer) of every pair, computed from the logits."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)

    def log_p(row: dict, answer: str) -> float:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(row["prompt"] + row[answer], return_dict=False)
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(log_probabilities[place - 1, ids[place]].item() for place in range(len(prompt), len(ids)))

    return torch.tensor([log_p(row, "chosen") - log_p(row, "rejected") for row in PAIRS])


GENERATE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
question = [{"role": "user", "content": "Is number 1 green?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(json.dumps(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)))
"""


@pytest.mark.parametrize("method", ["full", "lora"])
def test_dpo_prefers_the_chosen_answers_and_saves_a_complete_model(
    tools: str, chat_model: Path, tmp_path: Path, method: str
) -> None:
    options = "--max_steps 40 --per_device_train_batch_size 8 --logging_steps 1 --bf16 False --learning_rate"
    options += " 1e-3" if method == "full" else " 1e-2 --use_peft --lora_r 4 --lora_dropout 0"
    finished = dpo(tools, chat_model, PAIRS, *options.split(), cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    saved = tmp_path / "dpo"
    state = json.loads((saved / "checkpoint-40" / "trainer_state.json").read_text(encoding="utf-8"))
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)  # the model still equals the reference model
    assert steps[-1]["rewards/accuracies"] > 0.9
    before, after = margins(chat_model), margins(saved)
    assert (before > 0).float().mean() < 0.5
    assert (after > 0).float().mean() > 0.9
    assert (after > before).float().mean() > 0.9
    # a reward is beta times the change of log p; the last batches are two, so the mean of both is that of all pairs
    logged = sum(step["rewards/margins"] for step in steps[-2:]) / 2
    assert logged == pytest.approx(0.1 * (after - before).mean().item(), rel=0.05)

    (tmp_path / "generate.py").write_text(GENERATE, encoding="utf-8")
    generated = run(tools, "generate.py", saved, cwd=tmp_path)
    assert generated.returncode == 0, generated.stderr[-3000:]
    conversation = Conversation(load_model(saved), load_tokenizer(saved))
    conversation.ask("Is number 1 green?", Sampling(max_new_tokens=8, temperature=0), seed=0)
    assert conversation.messages[-1]["content"] == json.loads(generated.stdout).strip()
    ids = torch.arange(20)[None]
    logits = load_model(saved)(ids).logits
    export_gpt2(saved, tmp_path / "stock")
    torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path / "stock").eval()(ids).logits, logits)
    if method == "lora":
        (tmp_path / "adapter.py").write_text(ADAPTER, encoding="utf-8")
        loaded = run(tools, "adapter.py", saved, cwd=tmp_path)
        assert loaded.returncode == 0, loaded.stderr[-3000:]


ADAPTER = """
import sys, peft, torch
from transformers import AutoModelForCausalLM
base = peft.PeftConfig.from_pretrained(sys.argv[1] + "/adapter").base_model_name_or_path
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.arange(20)[None]
untrained = load(base)(ids).logits
adapted = peft.PeftModel.from_pretrained(load(base), sys.argv[1] + "/adapter").eval()(ids).logits
assert (adapted - untrained).abs().max() > 0.1
torch.testing.assert_close(load(sys.argv[1])(ids).logits, adapted, atol=1e-4, rtol=0)
"""


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "pairs.jsonl: there is no such file, or it is empty"),
        (
            [*PAIRS[:3], {"prompt": PAIRS[3]["prompt"], "chosen": PAIRS[3]["chosen"]}],
            "pairs.jsonl:4: no field 'rejected'",
        ),
        ([{"prompt": "one", "completion": "two"}], "pairs.jsonl:1: no field 'chosen'"),
    ],
)
def test_a_missing_file_or_field_is_one_line(
    tools: str, chat_model: Path, tmp_path: Path, rows: list[dict], message: str
) -> None:
    finished = dpo(tools, chat_model, rows, cwd=tmp_path)
    assert finished.returncode == 1
    assert message in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr
