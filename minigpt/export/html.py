"""Export a MiniGPT as a web page that runs it: one HTML file that holds the weights, or a folder for a web server.

The engine is in `web/`: GPT-2's forward pass and the tokenizer in JavaScript, and the inner products in a WebAssembly
kernel of a few kilobytes. The page needs no other software, and one file needs no server and no network.
"""

import base64
import hashlib
import html
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from minigpt.config.parser import read_config
from minigpt.data.chat_template import NAMES, read_chat_template
from minigpt.export.source import empty_folder, load_source
from minigpt.generation.sampling import end_of_text_ids
from minigpt.utils.errors import UserError
from minigpt.utils.files import write_atomically
from minigpt.utils.formatting import format_bytes
from minigpt.utils.run_files import ARGUMENTS_FILE, PAGE_FILE, PAGE_WEIGHTS_FILE
from modeling_minigpt import MiniGPTForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WEB = Path(__file__).parent / "web"
SCRIPTS = ("tokenizer.js", "model.js", "page.js")
DTYPES = ("int8", "f32")
ALIGNMENT = 16  # bytes; of each array in the binary data
LONGEST_TEXT = 500_000_000  # characters that a browser can hold in one text; Chromium's limit is 2^29 - 24
MOST_BYTES = 3_500_000_000  # of all weights: WebAssembly addresses 4 GiB, with the keys and values
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class WebModel:
    """A model as the page reads it: `header` has all but the arrays, which are in `data`."""

    header: dict[str, Any]
    data: bytes


def write_page(source: str | Path, destination: str | Path, dtype: str = "int8") -> None:
    """Write the MiniGPT in `source` (a folder or Hub name) as one HTML file that works without a server or network.

    dtype: "int8" rounds each row of a matrix to 8 bits with a scale of its own; "f32" keeps all weights exactly.
    Raises UserError if the file exists, the model is too large for one file, or `web_model` does.
    """
    path = Path(destination)
    if os.path.lexists(path):
        raise UserError(f"{path} exists; give the name of a new file")
    model = web_model(source, dtype)
    if (size := 4 * len(model.data) // 3) > LONGEST_TEXT:
        raise UserError(
            f"{source} would be a page of {format_bytes(size)}, which browsers cannot read; "
            f"{'try --dtype int8, or ' if dtype == 'f32' else ''}export to a folder, which has the weights in a file"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _page(model.header, base64.b64encode(model.data).decode()))


def write_static_page(source: str | Path, folder: str | Path, dtype: str = "int8") -> list[Path]:
    """Write the MiniGPT in `source` as a folder for any web server: model.bin and index.html, which fetches it.

    Returns both files. Raises UserError if the folder is not empty, or `web_model` does. See `write_page`.
    """
    folder = empty_folder(folder)
    files = static_page(source, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def static_page(source: str | Path, dtype: str = "int8") -> dict[str, bytes]:
    """The files of `write_static_page` by their names. Raises UserError as `web_model`."""
    model = web_model(source, dtype)
    # the address changes with the content, so no browser combines a new page with weights that it has stored
    version = hashlib.sha256(model.data).hexdigest()[:16]
    page = _page(model.header | {"weights": f"{PAGE_WEIGHTS_FILE}?{version}"}, weights="")
    return {PAGE_WEIGHTS_FILE: model.data, PAGE_FILE: page.encode()}


def web_model(source: str | Path, dtype: str = "int8") -> WebModel:
    """The model, tokenizer and sample prompts of `source` as the page reads them.

    Raises UserError if `source` is not a MiniGPT, has options or a tokenizer that the page's engine does not have, or
    cannot be loaded.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is none of {', '.join(DTYPES)}")
    loaded = load_source(source, "a web page")
    config = loaded.model.config
    if config.hidden_act not in TANH_GELU:
        raise UserError(f"hidden_act={config.hidden_act} is not in the page's engine, which has {TANH_GELU[0]}")
    spec = tokenizer_spec(loaded.tokenizer)
    parameters = loaded.model.num_parameters()
    if (size := parameters * (1 if dtype == "int8" else 4)) > MOST_BYTES:
        raise UserError(f"{source} has {format_bytes(size)} of weights; a page can hold {format_bytes(MOST_BYTES)}")
    arrays, data = _pack(_page_arrays(loaded.model), dtype)
    header = {
        "title": loaded.name,
        "dtype": dtype,
        "parameters": parameters,
        "config": {
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "hidden": config.hidden_size,
            "intermediate": config.intermediate_size,
            "context": config.max_position_embeddings,
            "vocabulary": config.vocab_size,
            "epsilon": config.layer_norm_epsilon,
        },
        "arrays": arrays,
        "bytes": len(data),
        "tokenizer": spec,
        "endIds": end_of_text_ids(loaded.model, loaded.tokenizer),
        "examples": _sample_prompts(Path(source).expanduser()),
        "chat": next((name for name in NAMES if loaded.tokenizer.chat_template == read_chat_template(name)), None),
        "eosToken": loaded.tokenizer.eos_token or "",
    }
    return WebModel(header, data)


def _page_arrays(model: MiniGPTForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of the engine; q, k and v are one matrix. All matrices are [out, in]."""
    weights = model.state_dict()

    def module(name: str, *sources: str) -> Iterator[tuple[str, Tensor]]:
        for part in ("weight", "bias"):
            if f"{sources[0]}.{part}" in weights:
                yield f"{name}.{part}", torch.cat([weights[f"{source}.{part}"] for source in sources])

    yield from module("embedding", "transformer.embed_tokens")
    if not model.config.tie_word_embeddings:
        yield from module("head", "lm_head")
    yield "positions", weights["transformer.embed_positions.weight"]
    yield from module("norm", "transformer.norm")
    for number in range(model.config.num_hidden_layers):
        name, source = f"layers.{number}", f"transformer.layers.{number}"
        yield from module(f"{name}.norm1", f"{source}.input_layernorm")
        yield from module(f"{name}.qkv", *(f"{source}.self_attn.{letter}_proj" for letter in "qkv"))
        yield from module(f"{name}.attention_out", f"{source}.self_attn.o_proj")
        yield from module(f"{name}.norm2", f"{source}.post_attention_layernorm")
        yield from module(f"{name}.up", f"{source}.mlp.up_proj")
        yield from module(f"{name}.down", f"{source}.mlp.down_proj")


@torch.no_grad()
def _pack(arrays: Iterator[tuple[str, Tensor]], dtype: str) -> tuple[dict[str, Any], bytes]:
    """Little-endian arrays one after another, and the form and offset of each.

    With dtype int8, a matrix `x.weight` becomes int8 rows and `x.scale`, the step of each row: its largest magnitude
    divided by 127. The table of positions, biases and norms stay float32.
    """
    index: dict[str, Any] = {}
    data = bytearray()

    def append(name: str, array: Tensor, kind: str) -> None:
        data.extend(bytes(-len(data) % ALIGNMENT))
        index[name] = {"dtype": kind, "shape": list(array.shape), "offset": len(data)}
        data.extend(array.contiguous().numpy().astype({"int8": "<i1", "f32": "<f4"}[kind]).tobytes())

    for name, array in arrays:
        if dtype == "int8" and array.ndim == 2 and name.endswith(".weight"):
            scale = array.abs().amax(1) / 127
            rounded = (array / torch.where(scale == 0, 1, scale)[:, None]).round()
            append(name, rounded, "int8")
            append(name.removesuffix("weight") + "scale", scale, "f32")
        else:
            append(name, array, "f32")
    return index, bytes(data)


def tokenizer_spec(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """The tokenizer as tokenizer.js reads it: a byte-level BPE with GPT-2's pattern, or a vocabulary of characters.

    Raises UserError that names what the page's tokenizer does not have.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pre_tokenizer = state["model"], state["pre_tokenizer"] or {}
    if state["normalizer"] is not None:
        raise _unknown_part("normalizer", state["normalizer"]["type"], "none")
    is_characters = model["type"] == "WordLevel"
    if is_characters:
        if (pre_tokenizer.get("type"), pre_tokenizer.get("pattern")) != ("Split", {"Regex": r"[\s\S]"}):
            raise _unknown_part("pre-tokenizer", json.dumps(pre_tokenizer), "one that splits a text into characters")
    elif model["type"] == "BPE":
        if pre_tokenizer.get("type") != "ByteLevel" or not pre_tokenizer["use_regex"]:
            raise _unknown_part("pre-tokenizer", pre_tokenizer.get("type", "none"), "ByteLevel with GPT-2's pattern")
        if missing := sorted(set(ByteLevel.alphabet()) - set(model["vocab"])):
            raise _unknown_part("vocabulary", f"one without {missing[0]!r}", "all 256 bytes")
        options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
        if option := next((option for option in options if model.get(option)), None):
            raise _unknown_part("option of BPE", f"{option}={model[option]}", "none")
    else:
        raise _unknown_part("model", model["type"], "BPE and WordLevel")
    decoder = (state["decoder"] or {}).get("type")
    if decoder != (wanted := "Fuse" if is_characters else "ByteLevel"):
        raise _unknown_part("decoder", decoder or "none", wanted)
    for token in state["added_tokens"]:
        if option := next((option for option in ("single_word", "lstrip", "rstrip") if token[option]), None):
            raise _unknown_part("added token", f"{token['content']} with {option}", "tokens without these options")

    vocabulary: dict[str, int] = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        tokens[number] = token
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    before, after = _added_around(tokenizer, min(model["vocab"]))
    return {
        "kind": "characters" if is_characters else "bpe",
        "tokens": tokens,
        "merges": [model["vocab"][part] for pair in merges for part in pair],
        "added": [
            {key: token[key] for key in ("id", "content", "special", "normalized")} for token in state["added_tokens"]
        ],
        "addPrefixSpace": bool(pre_tokenizer.get("add_prefix_space")),
        "unknownId": model["vocab"].get(model.get("unk_token")),
        "before": before,
        "after": after,
        "firstIds": _first_ids(tokenizer),
    }


def _unknown_part(part: str, found: str, known: str) -> UserError:
    return UserError(f"the tokenizer's {part} is not in the page's engine: {found}; it has {known}")


def _added_around(tokenizer: "PreTrainedTokenizerFast", text: str) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[:start], full[start + len(plain) :]


def _first_ids(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """What an empty prompt stands for; as in `minigpt.generation.sampling.prompt_ids`."""
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    return [first] if first is not None else list(tokenizer("\n", add_special_tokens=False)["input_ids"])


def _sample_prompts(folder: Path) -> list[str]:
    """The sample prompts of a run; none for anything else."""
    path = folder / ARGUMENTS_FILE
    return list(read_config(path).get("sample_prompts") or []) if path.is_file() else []


def _page(header: dict[str, Any], weights: str) -> str:
    """The HTML of the page. `weights`: the binary data in base64, or "" if the page fetches them."""
    style = (WEB / "page.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    policy = [
        "default-src 'none'",
        f"script-src '{_csp_hash(script)}' 'wasm-unsafe-eval'",
        f"style-src '{_csp_hash(style)}'",
        *([] if weights else ["connect-src 'self'"]),
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return Template((WEB / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(header["title"]),
        policy="; ".join(policy),
        style=style,
        script=script,
        # "</script" would end the element
        header=json.dumps(header, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        kernel=base64.b64encode((WEB / "kernel.wasm").read_bytes()).decode(),
        weights=weights,
    )


def _csp_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
