"""Laws of the ecosystem: other tools use a saved MiniGPT through its remote code. Slow: `make test-all`.

Each tool runs in a process that cannot import this project. The tools are no dependencies of the project: they are
installed on first use into separate environments on top of the project's libraries. MINIGPT_TOOLS_PYTHON names the
Python of an environment that already has them.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configuration_minigpt import MiniGPTConfig
from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.data.tokenizer import load_tokenizer
from minigpt.export.gpt2 import export_gpt2
from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import Sampling
from minigpt.modeling.loading import load_model
from modeling_minigpt import MiniGPTForCausalLM
from support.environments import environment
from support.runs import ROOT

pytestmark = pytest.mark.slow

TOOLS = ["peft", "trl", "lm_eval", "optimum-quanto", "fastapi", "uvicorn", "openai"]
OLDEST = ["transformers==5.4.0"]


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> str:
    return os.environ.get("MINIGPT_TOOLS_PYTHON") or environment(tmp_path_factory, "tools", TOOLS)


@pytest.fixture(scope="session")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return environment(tmp_path_factory, "oldest", OLDEST)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in which tokens depend on the ones before them, and its tokenizer: one token per letter."""
    folder = tmp_path_factory.mktemp("saved")
    letters = {"<|endoftext|>": 0} | {chr(32 + number): number + 1 for number in range(95)}
    core = Tokenizer(models.WordLevel(letters, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    model = MiniGPTForCausalLM(MiniGPTConfig(vocab_size=len(letters), eos_token_id=0, bos_token_id=0, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def run(python: str, script: str, *arguments: object, cwd: Path, launcher: tuple[str, ...] = ()) -> str:
    """Standard output of `script` in a process that cannot import the project (-P, no PYTHONPATH, an empty folder)."""
    path = cwd / "script.py"
    path.write_text(script, encoding="utf-8")
    result = subprocess.run(
        [python, "-P", *launcher, str(path), *map(str, arguments)],
        cwd=cwd,
        env=clean_environment(cwd),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def clean_environment(home: Path) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return inherited | {"HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


PEFT = """
import sys, peft, torch
from transformers import AutoModelForCausalLM
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
lora = peft.get_peft_model(load(sys.argv[1]), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"],
                                                              task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(3):
    loss = lora(input_ids=ids, labels=ids).loss
    losses.append(loss.item()); optimizer.zero_grad(); loss.backward(); optimizer.step()
assert losses[-1] < losses[0], losses
trained = lora.eval()(input_ids=ids).logits
lora.save_pretrained("adapter")
reloaded = peft.PeftModel.from_pretrained(load(sys.argv[1]), "adapter").eval()
torch.testing.assert_close(reloaded(input_ids=ids).logits, trained, atol=1e-5, rtol=0)
lora.merge_and_unload().save_pretrained("merged")
torch.testing.assert_close(load("merged").eval()(ids).logits, trained, atol=1e-5, rtol=0)
"""


def test_peft_trains_saves_and_merges_lora(tools: str, saved: Path, tmp_path: Path) -> None:
    run(tools, PEFT, saved, cwd=tmp_path)


TRL = """
import sys, datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.pad_token = tokenizer.eos_token
options = SFTConfig("sft", max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
                    logging_steps=1, use_cpu=True, bf16=False, max_length=32, packing=sys.argv[2] == "packed")
trainer = SFTTrainer(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True), args=options,
                     train_dataset=datasets.Dataset.from_dict({"text": ["the quick brown fox"] * 32}),
                     processing_class=tokenizer)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < losses[0], losses
trainer.save_model("sft/final")
AutoModelForCausalLM.from_pretrained("sft/final", trust_remote_code=True)
"""


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_trl_lowers_the_loss_and_saves_a_loadable_model(tools: str, saved: Path, tmp_path: Path, packing: str) -> None:
    run(tools, TRL, saved, packing, cwd=tmp_path)


LM_EVAL = """
import sys, torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
lm = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu", batch_size=2, dtype="float32")
context, continuation = lm.tokenizer("one two")["input_ids"], lm.tokenizer(" three")["input_ids"]
requests = [Instance("loglikelihood", {}, ("one two", " three"), number) for number in range(3)]
with torch.no_grad():
    log_p = lm.model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
expected = sum(log_p[len(context) - 1 + number, token].item() for number, token in enumerate(continuation))
for log_likelihood, _ in lm.loglikelihood(requests):
    assert abs(log_likelihood - expected) < 1e-3, (log_likelihood, expected)
(rolling,) = lm.loglikelihood_rolling([Instance("rolling", {}, ("a text longer than the context " * 9,), 0)])
assert rolling < 0
(text,) = lm.generate_until([Instance("generate", {}, ("one", {"until": ["~"], "max_gen_toks": 5}), 0)])
assert text
"""


def test_lm_evaluation_harness_computes_the_log_likelihood_of_the_model(
    tools: str, saved: Path, tmp_path: Path
) -> None:
    run(tools, LM_EVAL, saved, cwd=tmp_path)


TASKS = """
import json, sys
folder, tasks, root = sys.argv[1:]
sys.path.insert(0, root)
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from minigpt.cli import main
main(["eval", "--model", folder, "--tasks", "capitals,stories", "--task_path", tasks, "--items", "items.jsonl",
      "--output", "tasks.json", "--num_fewshot", "1", "--batch_size", "2", "--use_cpu"])
by_hand = simple_evaluate("hf", f"pretrained={folder},trust_remote_code=True,dtype=float32", ["capitals", "stories"],
                          num_fewshot=1, batch_size=2, device="cpu", task_manager=TaskManager(include_path=tasks))
items = [json.loads(line) for line in open("items.jsonl")]
assert len(items) == 4 + 3
for task in ("capitals", "stories"):
    ours = {item["doc_id"]: item for item in items if item["task"] == task}
    for item in by_hand["samples"][task]:
        same = ours[item["doc_id"]]
        assert same["doc"] == item["doc"]
        for first, second in zip(same["filtered_resps"], item["filtered_resps"], strict=True):
            first, second = ((one[0] if isinstance(one, (list, tuple)) else one) for one in (first, second))
            assert abs(first - second) < 1e-3, (first, second)
results = {(row["task"], row["metric"]): row["value"] for row in json.load(open("tasks.json"))["tasks"]}
assert results["capitals", "acc"] == by_hand["results"]["capitals"]["acc,none"]
assert abs(results["stories", "bits_per_byte"] - by_hand["results"]["stories"]["bits_per_byte,none"]) < 1e-4
"""

CAPITALS = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {validation: DIR/capitals.jsonl}}
validation_split: validation
fewshot_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""

STORIES = """
task: stories
dataset_path: json
dataset_kwargs: {data_files: {validation: DIR/stories.jsonl}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks `capitals` and `stories`, and their data."""
    countries = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
    choices = [f" {city}" for city in countries.values()]
    rows = [
        {"question": f"The capital of {country} is", "choices": choices, "label": number}
        for number, country in enumerate(countries)
    ]
    texts = [{"text": f"A story of {number} mice that is longer than the context. " * 5} for number in range(3)]
    folder = tmp_path_factory.mktemp("tasks")
    for name, yaml, lines in (("capitals", CAPITALS, rows), ("stories", STORIES, texts)):
        (folder / f"{name}.yaml").write_text(yaml.replace("DIR", str(folder)))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_tasks_of_lm_evaluation_harness_give_its_own_answers_item_by_item(
    tools: str, saved: Path, tasks: Path, tmp_path: Path
) -> None:
    run(tools, TASKS, saved, tasks, ROOT, cwd=tmp_path)


EVAL = """
import sys
folder, tasks, root = sys.argv[1:]
sys.path.insert(0, root)
from minigpt.cli import main
main(["eval", "--model", folder, "--tasks", "capitals,stories", "--task_path", tasks, "--output", "tasks.json",
      "--use_cpu"])
"""


def test_the_example_of_lm_evaluation_harness_prints_the_results_of_minigpt_eval(
    tools: str, saved: Path, tasks: Path, tmp_path: Path
) -> None:
    run(tools, EVAL, saved, tasks, ROOT, cwd=tmp_path)
    example = (ROOT / "examples" / "lm_evaluation_harness.py").read_text(encoding="utf-8")
    output = run(tools, example, saved, "--tasks", "capitals", "stories", "--include_path", tasks, cwd=tmp_path)
    cells = [[cell.strip() for cell in line.split("|")] for line in output.splitlines()]
    results = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))["tasks"]
    assert {(row["task"], row["metric"]) for row in results} == {("capitals", "acc"), ("stories", "bits_per_byte")}
    for row in results:
        (line,) = (line for line in cells if row["metric"] in line)
        assert float(line[line.index(row["metric"]) + 2]) == pytest.approx(row["value"], abs=1e-4)


GENERATION = """
import sys, torch
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
common = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
prompts = [[1, 2, 3, 4], [50, 60, 70], [80] * 10]
expected = [model.generate(torch.tensor([ids]), **common)[0, len(ids):].tolist() for ids in prompts]
batch = model.generate_batch(prompts, generation_config=GenerationConfig(**(common | {"eos_token_id": -1})))
assert sorted(output.generated_tokens for output in batch.values()) == sorted(expected)
compile_config = CompileConfig(fullgraph=True, mode="default")
compile_config._compile_all_devices = True  # otherwise transformers compiles on accelerators only
decoding_options = {
    "static cache, compiled": {"cache_implementation": "static", "compile_config": compile_config},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
for name, options in decoding_options.items():
    tokens = model.generate(torch.tensor(prompts[:1]), **common, **options)[0, 4:].tolist()
    assert tokens == expected[0], (name, tokens, expected[0])
# a quantized cache rounds keys and values; only the first token is computed before that
quantized = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}
output = model.generate(torch.tensor(prompts[:1]), **common, cache_implementation="quantized", cache_config=quantized)
assert output.shape == (1, 16) and output[0, 4] == expected[0][0]
"""


def test_continuous_batching_and_every_cache_generate_the_same_tokens(tools: str, saved: Path, tmp_path: Path) -> None:
    run(tools, GENERATION, saved, cwd=tmp_path)


TENSOR_PARALLEL = """
import sys, torch
from transformers import AutoModelForCausalLM
load = lambda **options: AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **options).eval()
torch.distributed.init_process_group("gloo")
split, whole = load(tp_plan="auto"), load()
ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.testing.assert_close(split(ids).logits, whole(ids).logits, atol=1e-5, rtol=0)
assert split.transformer.layers[0].self_attn.q_proj.weight.to_local().shape == (32, 64)
for model in (split, whole):
    model(ids, labels=ids).loss.backward()
for (name, parameter), expected in zip(split.named_parameters(), whole.parameters(), strict=True):
    gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    torch.testing.assert_close(gradient, expected.grad, atol=1e-6, rtol=1e-5, msg=lambda text: f"{name}: {text}")
torch.distributed.destroy_process_group()
"""


def test_two_tensor_parallel_processes_compute_the_logits_and_gradients_of_one(saved: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    run(sys.executable, TENSOR_PARALLEL, saved, cwd=tmp_path, launcher=launcher)


EXPORT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", max=128)}, "use_cache": None}
program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=shapes)
for inputs in (ids, ids[:1, :7].repeat(3, 1)):
    exported = program.module()(input_ids=inputs, use_cache=False).logits
    torch.testing.assert_close(exported, model(inputs).logits, atol=1e-5, rtol=0)
compiled = torch.compile(model, fullgraph=True)
torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
"""


def test_exported_and_compiled_models_compute_the_logits_of_the_model(saved: Path, tmp_path: Path) -> None:
    run(sys.executable, EXPORT, saved, cwd=tmp_path)


OLD_AND_NEW = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM
folder, copy = sys.argv[1:]
for head in ("", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
    getattr(transformers, "AutoModel" + head).from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
model.save_pretrained(copy)
tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
print(transformers.__version__, model(ids, labels=ids).loss.item(), tokens, sep="|")
"""


def test_oldest_and_newest_transformers_agree_and_load_each_others_files(
    oldest: str, saved: Path, tmp_path: Path
) -> None:
    pythons = {"oldest": oldest, "newest": sys.executable}
    losses, tokens = {}, {}
    for name, python in pythons.items():
        (tmp_path / name).mkdir()
        output = run(python, OLD_AND_NEW, saved, "copy", cwd=tmp_path / name)
        version, loss, tokens[name] = output.strip().split("|")
        losses[name] = float(loss)
        assert version.startswith("5.4.") == (name == "oldest"), version
    assert losses["oldest"] == pytest.approx(losses["newest"], abs=1e-5)
    assert tokens["oldest"] == tokens["newest"]
    for writer, reader in (("oldest", "newest"), ("newest", "oldest")):
        output = run(pythons[reader], OLD_AND_NEW, tmp_path / writer / "copy", "copy of copy", cwd=tmp_path / reader)
        assert float(output.split("|")[1]) == pytest.approx(losses["newest"], abs=1e-5)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_transformers_serve_completes_texts_and_answers_messages_with_an_exported_model(
    tools: str, saved: Path, tmp_path: Path
) -> None:
    # `serve` only knows the architectures of transformers, even with --trust-remote-code, so it gets the export
    export_gpt2(saved, tmp_path / "stock")
    tokenizer = load_tokenizer(saved)
    set_chat_template(tokenizer, read_chat_template("plain"))
    tokenizer.save_pretrained(tmp_path / "stock")
    port = free_port()
    start = "from transformers.cli.transformers import main; main()"
    options = ["serve", str(tmp_path / "stock"), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    question = {"role": "user", "content": "one two"}

    def post(path: str, **body: object) -> dict:
        body |= {"model": str(tmp_path / "stock"), "max_tokens": 8, "temperature": 0}
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict = json.load(response)
        return answer

    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [tools, "-P", "-c", start, *options], cwd=tmp_path, env=clean_environment(tmp_path), stdout=log, stderr=log
        )
    try:
        for _ in range(120):
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            with (
                suppress(ConnectionRefusedError, urllib.error.URLError),
                socket.create_connection(("127.0.0.1", port)),
            ):
                break
            time.sleep(1)
        completion = post("/v1/completions", prompt="one two")
        assert completion["object"] == "text_completion"
        assert completion["usage"]["completion_tokens"] == 8
        chat = post("/v1/chat/completions", messages=[question], stream=False)
        conversation = Conversation(load_model(saved), tokenizer)
        conversation.ask("one two", Sampling(max_new_tokens=8, temperature=0), seed=0)
        assert chat["choices"][0]["message"]["content"].strip() == conversation.messages[-1]["content"]
    finally:
        server.terminate()
        server.wait(timeout=30)
