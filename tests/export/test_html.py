"""The web page that runs a model: its bytes are the weights, and its engine does what tokenizers and PyTorch do."""

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from minigpt.cli import main
from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.data.tokenizer import train_bpe, train_characters
from minigpt.export.html import SCRIPTS, WEB, write_page, write_static_page
from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import Sampling, complete, prompt_ids
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM
from support.browser import chromium
from support.conversations import PIECES, random_conversations, random_text
from support.tiny import byte_tokenizer, letter_tokenizer, tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "untied": {"tie_word_embeddings": False},
    "other": {"qkv_bias": False, "intermediate_size": 50, "hidden_size": 22, "layer_norm_epsilon": 1e-3},
}
HOSTILE = [
    "",
    "It's we'll they'VE I'd 'tis ''s",
    "a  b   c \n\n d\t\te \r\n",
    " \u0085x\u0085\u0085 y\ufeff\ufeffz\ufeff \u00a0\u2003 \u200b\u2028\u180e",
    "x²3½Ⅷ٣ ৪四 _a_ __init__ $1,000.00!?",
    "naïve e\u0301 ﬁ Ǆ \U0001d400 שלום 中文 \U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea",
    "<|endoftext|><|im_start|>user\nhi<|im_end|> <|endoftext|",
    "\0\x01\x7f\x80\xad",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 20,
]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE like the quickstart's, with ChatML's tokens and one added token that is not special."""
    source = random.Random(0)
    tokenizer = train_bpe((random_text(source) + " the then a list of words " for _ in range(300)), 400)
    set_chat_template(tokenizer, read_chat_template("chatml"))
    tokenizer.add_tokens(["<|im_start|>x", "ü added"])
    return tokenizer


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, **config: Any) -> MiniGPTForCausalLM:
    """A tiny model whose biases and norms are not 0 and 1, since equal values would hide an exchange."""
    model = tiny_model(**{"vocab_size": len(tokenizer) + 3} | config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def element(page: str, name: str) -> str:
    match = re.search(rf'id="{name}">([^<]*)<', page)
    assert match is not None
    return match[1]


def read_weights(header: dict[str, Any], data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights in a page under MiniGPT's names, and the step of each: 0 where it is exact."""
    arrays = {
        name: torch.from_numpy(
            np.frombuffer(
                bytearray(data),
                {"f32": "<f4", "int8": "<i1"}[array["dtype"]],
                int(np.prod(array["shape"])),
                array["offset"],
            ).reshape(array["shape"])
        ).double()
        for name, array in header["arrays"].items()
    }
    steps = {name: arrays.pop(f"{name[:-6]}scale")[:, None] for name in list(arrays) if f"{name[:-6]}scale" in arrays}
    names = {
        "embedding": "transformer.embed_tokens", "positions": "transformer.embed_positions.weight", "head": "lm_head",
        "norm": "transformer.norm", "layers": "transformer.layers", "norm1": "input_layernorm", "qkv": "self_attn.qkv",
        "norm2": "post_attention_layernorm", "attention_out": "self_attn.o_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }  # fmt: skip
    weights, found_steps = {}, {}
    for name, array in arrays.items():
        step = steps.get(name, torch.zeros(1))
        long = ".".join(names.get(word, word) for word in name.split("."))
        parts = [long.replace("qkv", f"{letter}_proj") for letter in "qkv"] if "qkv" in long else [long]
        for part, values, part_step in zip(
            parts, (array * steps.get(name, 1)).chunk(len(parts)), step.expand(len(array), -1).chunk(len(parts)),
            strict=True,
        ):  # fmt: skip
            weights[part], found_steps[part] = values, part_step
    return weights, found_steps


@pytest.mark.parametrize("dtype", ["int8", "f32"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_arrays_of_a_page_are_the_weights(tmp_path: Path, options: dict[str, Any], dtype: str) -> None:
    model = save(tmp_path / "run", byte_tokenizer(), **options)
    write_page(tmp_path / "run", tmp_path / "page.html", dtype)
    page = (tmp_path / "page.html").read_text()
    header, data = json.loads(element(page, "header")), base64.b64decode(element(page, "weights"))
    assert len(data) == header["bytes"]
    weights, steps = read_weights(header, data)
    expected = dict(model.named_parameters())  # a tied head is there once
    assert weights.keys() == expected.keys()
    assert len(weights["transformer.embed_tokens.weight"]) == 257 < model.config.vocab_size
    rounded = {name for name, step in steps.items() if step.any()}
    matrices = {name for name, weight in expected.items() if weight.ndim == 2 and "positions" not in name}
    assert rounded == (matrices if dtype == "int8" else set())
    for name, weight in expected.items():
        weight = weight[: len(weights[name])]  # without the rows that only round the vocabulary up
        error = (weights[name] - weight.detach().double()).abs()
        # half a step, and the float32 rounding of the step itself, 127 times
        assert (error <= steps[name].reshape(-1, *[1] * (weight.ndim - 1)) * 0.50001).all(), name


class Elements(HTMLParser):
    """The inline scripts and styles of a page, its policy, and all attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.attributes: list[tuple[str, str | None]] = []
        self.policy = ""
        self.open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        values = dict(attrs)
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""
        # a script with another type is data
        self.open = (
            tag if tag in self.texts and not values.get("type", "").startswith(("text/plain", "application")) else ""
        )

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open].append(data)


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_the_policy_of_a_page_allows_its_own_script_and_style_and_no_other_host(
    tmp_path: Path, is_folder: bool
) -> None:
    save(tmp_path / "run", byte_tokenizer())
    if is_folder:
        page = write_static_page(tmp_path / "run", tmp_path / "folder")[1].read_text()
    else:
        write_page(tmp_path / "run", tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
    elements = Elements(page)
    policy = {words[0]: words[1:] for part in elements.policy.split(";") if (words := part.split())}

    def hashes(kind: str) -> list[str]:
        digests = [hashlib.sha256(text.encode()).digest() for text in elements.texts[kind]]
        return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]

    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == [*hashes("script"), "'wasm-unsafe-eval'"]
    assert policy["style-src"] == hashes("style")
    assert policy.get("connect-src") == (["'self'"] if is_folder else None)
    assert len(elements.texts["script"]) == len(elements.texts["style"]) == 1
    # nothing that the policy would block, and no address of another host
    assert not [name for name, _ in elements.attributes if name in ("style", "src", "href") or name.startswith("on")]
    assert not re.search("https?:", page)


def test_a_folder_holds_the_same_weights_as_one_file_and_asks_for_them_by_their_hash(tmp_path: Path) -> None:
    save(tmp_path / "run", byte_tokenizer())
    write_page(tmp_path / "run", tmp_path / "page.html")
    weights, index = write_static_page(tmp_path / "run", tmp_path / "folder")
    assert [weights.name, index.name] == ["model.bin", "index.html"]
    assert weights.read_bytes() == base64.b64decode(element((tmp_path / "page.html").read_text(), "weights"))
    header = json.loads(element(index.read_text(), "header"))
    assert header["weights"] == f"model.bin?{hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}"
    assert len(index.read_bytes()) < 100_000


def test_texts_of_a_run_cannot_leave_their_place_in_the_page(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["</script><script>", "<!--"])
    folder = tmp_path / "a <b> & $title"
    save(folder, tokenizer)
    prompts = ["</script>", "<!-- <script>", "$script", '"\u2028']
    (folder / "arguments.yaml").write_text(json.dumps({"sample_prompts": prompts}))
    write_page(folder, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    header = json.loads(element(page, "header"))
    assert header["examples"] == prompts
    assert header["tokenizer"]["tokens"][-2:] == ["</script><script>", "<!--"]
    assert "<title>a &lt;b&gt; &amp; $title</title>" in page
    assert len(Elements(page).texts["script"]) == 1


def test_a_page_of_8_bits_takes_little_more_than_its_weights_in_base64(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = save(tmp_path / "run", tokenizer, hidden_size=192, num_hidden_layers=4, max_position_embeddings=128)
    main(["export", "html", str(tmp_path / "run"), str(tmp_path / "page.html")])
    size = (tmp_path / "page.html").stat().st_size
    assert size < 1.45 * model.num_parameters() + 60_000  # 4 / 3, the exact small arrays, and the engine


def with_activation(folder: Path) -> None:
    save(folder, byte_tokenizer(), hidden_act="relu")


def with_llama(folder: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def with_too_many_tokens(folder: Path) -> None:
    save(folder, byte_tokenizer(), vocab_size=200)


def with_tokenizer(change: Callable[[Tokenizer], None]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tokenizer = byte_tokenizer()
        change(tokenizer.backend_tokenizer)
        save(folder, tokenizer)

    return make


def with_words(folder: Path) -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "word": 1}))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    save(folder, PreTrainedTokenizerFast(tokenizer_object=core))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "activation": (with_activation, "hidden_act=relu"),
    "architecture": (with_llama, "LlamaForCausalLM; only a MiniGPT"),
    "vocabulary": (with_too_many_tokens, "ids up to 256"),
    "normalizer": (with_tokenizer(lambda core: setattr(core, "normalizer", normalizers.NFC())), "normalizer.*NFC"),
    "pattern": (
        with_tokenizer(lambda core: setattr(core, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False))),
        "pre-tokenizer.*ByteLevel",
    ),
    "decoder": (with_tokenizer(lambda core: setattr(core, "decoder", decoders.Fuse())), "decoder.*Fuse"),
    "added token": (
        with_tokenizer(lambda core: core.add_tokens([AddedToken("<x>", lstrip=True)]) and None),
        "added token.*<x> with lstrip",
    ),
    "words": (with_words, "pre-tokenizer.*Whitespace"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_engine_lacks_is_refused_by_name(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        write_page(tmp_path / "run", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    save(tmp_path / "run", byte_tokenizer())
    (tmp_path / "page.html").write_text("a diary")
    with pytest.raises(UserError, match="exists"):
        write_page(tmp_path / "run", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "a diary"
    with pytest.raises(UserError, match="is not empty"):
        write_static_page(tmp_path / "run", tmp_path)


# ---- the engine, in Node ----


def in_node(page: Path, tasks: list[dict[str, Any]], kernel: str = "wasm") -> list[Any]:
    """The results of the engine of a page, without a browser; see run_engine.js."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    sources = [WEB / name for name in SCRIPTS if name != "page.js"] + [Path(__file__).with_name("run_engine.js")]
    script, task_file = page.with_suffix(".js"), page.with_suffix(".json")
    script.write_text("\n".join(path.read_text(encoding="utf-8") for path in sources), encoding="utf-8")
    task_file.write_text(json.dumps(tasks), encoding="utf-8")
    words = [node, str(script), str(page), str(task_file), kernel]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.split("\n")[:-1]]  # not at U+0085


def hostile_texts() -> list[str]:
    source = random.Random(7)
    white_and_letters = [*PIECES, "\u0085", "\ufeff", "'", "é", "1", "ü added", "<|im_start|>x"]
    return [*HOSTILE, *("".join(source.choices(white_and_letters, k=source.randint(1, 12))) for _ in range(400))]


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_ids_and_texts_of_bpe_equal_those_of_the_tokenizers_library(
    tmp_path: Path, bpe: PreTrainedTokenizerFast, add_prefix_space: bool
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.backend_tokenizer.to_str()))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    save(tmp_path / "run", tokenizer)
    write_page(tmp_path / "run", tmp_path / "page.html")
    texts = hostile_texts()
    results = in_node(tmp_path / "page.html", [{"action": "encode", "text": text} for text in texts])
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert results == expected
    source = random.Random(1)  # random ids give bytes that are not UTF-8
    sequences = [*expected, *(source.choices(range(len(tokenizer)), k=20) for _ in range(100))]
    for skip in (False, True):
        tasks = [{"action": "decode", "ids": ids, "skipSpecial": skip} for ids in sequences]
        decoded = [tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip) for ids in sequences]
        assert in_node(tmp_path / "page.html", tasks) == decoded


def test_characters_are_encoded_one_by_one_and_an_unknown_one_is_an_error(tmp_path: Path) -> None:
    tokenizer = train_characters(["héllo \n\U0001f600中"])
    save(tmp_path / "run", tokenizer)
    write_page(tmp_path / "run", tmp_path / "page.html")
    text = "hello\n".replace("e", "é") + "中\U0001f600<|endoftext|>h"
    encoded, unknown = in_node(
        tmp_path / "page.html", [{"action": "encode", "text": text}, {"action": "encode", "text": "hz"}]
    )
    assert encoded == tokenizer(text)["input_ids"]
    assert unknown == {"error": 'the model does not know the character "z"'}
    assert in_node(tmp_path / "page.html", [{"action": "decode", "ids": encoded}]) == [text]


def test_special_tokens_that_the_tokenizer_puts_around_a_text_are_in_the_prompt(
    tmp_path: Path, bpe: PreTrainedTokenizerFast
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.backend_tokenizer.to_str()))
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    save(tmp_path / "run", tokenizer)
    write_page(tmp_path / "run", tmp_path / "page.html")
    (ids,) = in_node(tmp_path / "page.html", [{"action": "encode", "text": "a list"}])
    assert ids == tokenizer("a list")["input_ids"]
    assert ids[0] == ids[-1] == end


@pytest.mark.parametrize("kernel", ["wasm", "plain"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_greedy_tokens_equal_those_of_pytorch_also_when_the_context_is_full(
    tmp_path: Path, options: dict[str, Any], kernel: str
) -> None:
    tokenizer = byte_tokenizer()
    model = save(tmp_path / "run", tokenizer, **options)
    write_page(tmp_path / "run", tmp_path / "page.html", "f32")
    texts = ["a", "The list", "0123456789" * 3, ""]
    prompts = [prompt_ids(model, tokenizer, text) for text in texts]
    tasks = [{"action": "generate", "prompt": prompt, "maxNewTokens": 70} for prompt in prompts]
    logits = [{"action": "logits", "ids": prompt} for prompt in prompts]
    results = in_node(tmp_path / "page.html", tasks + logits, kernel)
    for prompt, ids, found in zip(prompts, results, results[len(tasks) :], strict=False):
        (expected,) = complete(model, tokenizer, prompt, Sampling(70, temperature=0), seed=0)
        assert expected.refills > 0
        assert ids == expected.token_ids
        with torch.no_grad():
            wanted = model(torch.tensor([prompt])).logits[0, -1, : len(tokenizer)]
        # tolerance: the same arithmetic, with float32 operations in another order
        torch.testing.assert_close(torch.tensor(found), wanted, atol=2e-5, rtol=0)


def test_both_kernels_compute_the_same_with_8_bits(tmp_path: Path) -> None:
    # wider than the block after which the kernel turns integer sums into floats
    save(tmp_path / "run", byte_tokenizer(), hidden_size=36, intermediate_size=2100)
    write_page(tmp_path / "run", tmp_path / "page.html")
    tasks = [{"action": "logits", "ids": list(range(20, 20 + length))} for length in (1, 8, 31)]
    for wasm, plain in zip(
        *(in_node(tmp_path / "page.html", tasks, kernel) for kernel in ("wasm", "plain")), strict=True
    ):
        # tolerance: the kernel rounds activations to 16 bits
        torch.testing.assert_close(torch.tensor(wasm), torch.tensor(plain), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "sampling",
    [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.5, 12, 0.9), (2.0, 3, 0.999), (1.0, 500, 0.01)],
    ids=lambda sampling: f"t{sampling[0]} k{sampling[1]} p{sampling[2]}",
)
def test_sampling_gives_each_token_the_probability_that_transformers_gives_it(
    tmp_path: Path, sampling: tuple[float, int, float]
) -> None:
    temperature, top_k, top_p = sampling
    torch.manual_seed(0)
    logits = 3 * torch.randn(60)
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    expected = TopPLogitsWarper(top_p)(None, scores).softmax(-1)[0]
    save(tmp_path / "run", byte_tokenizer())
    write_page(tmp_path / "run", tmp_path / "page.html")
    options = {"temperature": temperature, "topK": top_k, "topP": top_p}
    shares, likely = in_node(
        tmp_path / "page.html",
        [
            {"action": "shares", "logits": logits.tolist(), "sampling": options, "points": 20_000},
            {"action": "mostLikely", "logits": logits.tolist(), "count": 10},
        ],
    )
    # evenly spaced numbers meet an interval of length p between p * points - 1 and p * points + 1 times
    torch.testing.assert_close(torch.tensor(shares), expected, atol=1.01 / 20_000, rtol=0)
    top = logits.softmax(-1).topk(10)
    assert [id_ for id_, _ in likely] == top.indices.tolist()
    torch.testing.assert_close(torch.tensor([share for _, share in likely]), top.values)


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_the_prompt_of_a_conversation_equals_that_of_the_chat_command(
    tmp_path: Path, bpe: PreTrainedTokenizerFast, template: str
) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.backend_tokenizer.to_str()), eos_token="<|endoftext|>"
    )
    set_chat_template(tokenizer, read_chat_template(template))
    model = save(tmp_path / "run", tokenizer, max_position_embeddings=200)
    write_page(tmp_path / "run", tmp_path / "page.html")
    tasks, expected = [], []
    for messages in random_conversations(60):
        conversation = Conversation(model, tokenizer)
        conversation.messages = messages[:-1]
        try:
            expected.append(list(conversation.prompt(30)))
        except UserError:
            expected.append(None)
        has_system = messages[0]["role"] == "system"
        system = messages[0]["content"] if has_system else ""
        turns = messages[has_system:-1]
        tasks.append({"action": "conversation", "system": system, "messages": turns, "maxNewTokens": 30})
    results = in_node(tmp_path / "page.html", tasks)
    assert [None if isinstance(result, dict) else result for result in results] == expected
    assert {True, False} <= {answer is not None and answer[1] > 0 for answer in expected}


def test_a_chat_template_of_another_kind_gives_a_page_for_texts(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    save(tmp_path / "run", tokenizer)
    write_page(tmp_path / "run", tmp_path / "page.html")
    assert json.loads(element((tmp_path / "page.html").read_text(), "header"))["chat"] is None


# ---- in Chromium ----

WAIT_S = 60


@pytest.fixture
def browser() -> Iterator[Any]:
    """A browser that reaches no other machine."""
    with chromium("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1280,900") as chrome:
        yield chrome


def wait_until_ready(browser: Any) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    ready = "return !document.getElementById('app').hidden && !document.getElementById('run').disabled"
    WebDriverWait(browser, WAIT_S).until(lambda chrome: chrome.execute_script(ready))


def set_value(browser: Any, name: str, value: str) -> None:
    browser.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)


def run(browser: Any) -> None:
    browser.execute_script("document.getElementById('run').click()")
    wait_until_ready(browser)


def value(browser: Any, name: str) -> str:
    return browser.execute_script("return document.getElementById(arguments[0]).value", name)


def assert_clean(browser: Any) -> None:
    """The page broke no rule of its policy, and no part of it needs to be scrolled sideways."""
    # Chromium asks a server for an icon of its own accord
    messages = [entry["message"] for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    assert messages == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_a_page_opened_from_disk_without_network_writes_the_text_of_pytorch(
    tmp_path: Path, bpe: PreTrainedTokenizerFast, browser: Any
) -> None:
    model = save(tmp_path / "run", bpe)
    write_page(tmp_path / "run", tmp_path / "page.html", "f32")
    browser.get((tmp_path / "page.html").as_uri())
    wait_until_ready(browser)
    browser.execute_script("document.getElementById('text-mode').click()")
    set_value(browser, "temperature", "0")
    set_value(browser, "max-new-tokens", "60")
    for prompt in ("the list", "  a\n\nword ü", "中文"):
        set_value(browser, "text", prompt)
        run(browser)
        ids = prompt_ids(model, bpe, prompt)
        (expected,) = complete(model, bpe, ids, Sampling(60, temperature=0), seed=0)
        assert value(browser, "text") == prompt + expected.continuation
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    for width in (1280, 500):  # Chromium's narrowest window
        browser.set_window_size(width, 900)
        assert_clean(browser)


@pytest.mark.slow
def test_a_folder_behind_a_web_server_loads_its_weights_and_appends_a_likely_token(
    tmp_path: Path, browser: Any
) -> None:
    save(tmp_path / "run", letter_tokenizer("abcdefghij \n"))
    write_static_page(tmp_path / "run", tmp_path / "folder")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "folder"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.get(f"http://127.0.0.1:{server.server_address[1]}/")
        wait_until_ready(browser)
    finally:
        server.shutdown()
        server.server_close()
    set_value(browser, "text", "abc")
    run(browser)
    assert len(value(browser, "text")) == 103
    browser.execute_script("document.querySelector('#next button').click()")
    assert len(value(browser, "text")) == 104
    browser.execute_script("document.getElementById('undo').click()")
    assert len(value(browser, "text")) == 103
    browser.execute_script("document.getElementById('undo').click()")
    assert value(browser, "text") == "abc"
    assert_clean(browser)


@pytest.mark.slow
def test_a_conversation_on_the_page_equals_that_of_the_chat_command(
    tmp_path: Path, bpe: PreTrainedTokenizerFast, browser: Any
) -> None:
    model = save(tmp_path / "run", bpe, max_position_embeddings=128)
    write_page(tmp_path / "run", tmp_path / "page.html", "f32")
    conversation = Conversation(model, bpe, "Be short.")
    browser.get((tmp_path / "page.html").as_uri())
    wait_until_ready(browser)
    for name, text in {"temperature": "0", "max-new-tokens": "20", "system": "Be short."}.items():
        set_value(browser, name, text)
    for question in ("What is a list?", "And a word?", "Why?"):
        set_value(browser, "question", question)
        run(browser)
        conversation.ask(question, Sampling(20, temperature=0), seed=0)
    read = "return [...document.querySelectorAll('.message')].map((part) => part.lastChild.textContent)"
    assert browser.execute_script(read) == [message["content"] for message in conversation.messages[1:]]
    assert_clean(browser)
