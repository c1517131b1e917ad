"""Export a MiniGPT as a GGUF file, which llama.cpp and the programs that are built on it run.

Metadata and tensors have the names of llama.cpp's architecture `gpt2`.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's src/llama-arch.cpp.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from configuration_minigpt import MiniGPTConfig
from minigpt.data.chat_template import end_of_turn_id, read_chat_template
from minigpt.data.tokenizer import vocabulary_size
from minigpt.export.source import Source, load_source, portable_chat_template
from minigpt.modeling.gpt2 import gpt2_state_dict
from minigpt.utils.errors import UserError
from minigpt.utils.files import PARTIAL, fsync, lack_of_room, new_parents, write_atomically

if TYPE_CHECKING:
    from gguf import GGUFWriter

OUTTYPES = ("f32", "f16", "bf16", "q8_0")
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # names of the function that llama.cpp's GPT-2 computes
MAX_FLOAT16 = float(np.finfo(np.float16).max)

# GPT-2's names and llama.cpp's; in a layer both have a prefix
MODEL_TENSORS = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f": "output_norm",
    "lm_head.weight": "output.weight",
}
LAYER_TENSORS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}

# chatml.jinja and plain.jinja in the language of Ollama, Go's text/template
GO_CHATML = """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
GO_PLAIN = """{{ range .Messages }}
{{- if eq .Role "system" }}System
{{- else if eq .Role "user" }}User
{{- else }}Assistant
{{- end }}:
{{ .Content }}
{{- if eq .Role "assistant" }}EOS{{ end }}
{{ end }}Assistant:
"""


@dataclass(frozen=True)
class GgufFiles:
    """The files of an export, and notes for the user."""

    model: Path
    modelfile: Path
    notes: list[str]


def export_gguf(source: str | Path, destination: str | Path, outtype: str = "f16") -> GgufFiles:
    """Write the MiniGPT in `source` (a folder or Hub name) as a GGUF file, with a Modelfile for Ollama beside it.

    - destination: a file that ends in .gguf, or a folder, in which the file is called NAME-OUTTYPE.gguf, with the
      type in capitals.
    - outtype: the numbers of the matrices, one of OUTTYPES; norms, biases and the position table are always float32.
      float16 is the default because every build of llama.cpp has fast kernels for it, also those for browsers and
      GPUs.

    Raises UserError if the `gguf` package is missing, the output exists, or the format cannot carry the model.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError('this needs the gguf package: pip install "minigpt-lm[gguf]"') from error
    loaded = load_source(source, "GGUF")
    tokens = token_table(loaded.tokenizer)
    _check_model(loaded.model.config, loaded.tokenizer)
    path = Path(destination).expanduser()
    if path.suffix != ".gguf":
        path = path / f"{loaded.name}-{outtype.upper()}.gguf"  # as programs recognize it
    files = GgufFiles(path, path.with_suffix(".Modelfile"), loaded.notes)
    for output in (files.model, files.modelfile):
        if os.path.lexists(output):
            raise UserError(f"{output} exists; give another name")
    tensors = _tensors(loaded, outtype)
    with new_parents(path):
        path.parent.mkdir(exist_ok=True)
        if error_text := lack_of_room(path.parent, sum(data.nbytes for data, _ in tensors.values()) + (1 << 22)):
            raise UserError(error_text)
        _write(path, loaded, tokens, tensors, outtype)
        write_atomically(files.modelfile, modelfile(path.name, loaded))
    return files


def _check_model(config: MiniGPTConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises UserError if llama.cpp's GPT-2 cannot compute what the model does."""
    if config.hidden_act not in TANH_GELU:
        raise UserError(
            f"hidden_act={config.hidden_act} cannot be exported: llama.cpp's GPT-2 always computes "
            f"{' = '.join(TANH_GELU)}"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos_token: llama.cpp would end a text at id 11, its default; set eos_token and save "
            "the tokenizer again"
        )


@dataclass(frozen=True)
class TokenTable:
    """A vocabulary as llama.cpp reads it: text and type of each id, and the merges in their order."""

    texts: list[str]
    types: list[int]
    merges: list[str]


def token_table(tokenizer: PreTrainedTokenizerFast) -> TokenTable:
    """The vocabulary of a byte-level BPE like GPT-2's, or one of characters (`train_characters`).

    Raises UserError that names what llama.cpp does not have.
    """
    from gguf import TokenType

    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if state["normalizer"] is not None:
        raise UserError(f"the tokenizer's normalizer {state['normalizer']['type']} cannot be exported to GGUF")
    if tokenizer.backend_tokenizer.num_special_tokens_to_add(is_pair=False):
        raise UserError("the tokenizer adds special tokens to each text, which cannot be exported to GGUF")
    if _is_characters(state):
        vocabulary, merges = _characters_as_bytes(model["vocab"])
    else:
        _check_bpe(state)
        vocabulary, merges = (
            model["vocab"],
            [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        )
    texts = [f"[UNUSED{number}]" for number in range(vocabulary_size(tokenizer))]
    types = [int(TokenType.UNUSED)] * len(texts)
    for text, number in vocabulary.items():
        texts[number], types[number] = text, int(TokenType.NORMAL)
    for token in state["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise UserError(
                f"the added token {token['content']!r} has lstrip, rstrip or single_word, which GGUF has no place for"
            )
        texts[token["id"]] = token["content"]
        types[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    nothing = byte_text(b"\0")
    return TokenTable(texts, types, merges or [f"{nothing} {nothing}"])  # llama.cpp refuses a file without merges


def _is_characters(state: dict[str, Any]) -> bool:
    """Whether a tokenizer takes a text apart into its characters."""
    splits = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return state["model"]["type"] == "WordLevel" and state["pre_tokenizer"] == splits


def _characters_as_bytes(characters: dict[str, int]) -> tuple[dict[str, int], list[str]]:
    """The vocabulary in byte-level text, and merges that build each character from its UTF-8 bytes.

    In UTF-8 no character begins in the middle of another, so these merges never join bytes of two characters.
    """
    vocabulary: dict[str, int] = {}
    merges: dict[str, None] = {}  # without a second one of the same
    for character, number in characters.items():
        text = byte_text(character.encode())
        vocabulary[text] = number
        merges |= {f"{text[:end]} {text[end]}": None for end in range(1, len(text))}
    return vocabulary, sorted(merges, key=len)  # shorter beginnings first


def byte_text(data: bytes) -> str:
    """Bytes as GPT-2's vocabulary writes them, one character per byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    return "".join(letters[byte] for byte in data)


def _check_bpe(state: dict[str, Any]) -> None:
    """Raises UserError if a tokenizer is not a byte-level BPE that splits words as GPT-2 does."""
    model, split = state["model"], state["pre_tokenizer"] or {"type": "nothing"}
    if model["type"] != "BPE":
        raise UserError(f"the tokenizer is a {model['type']}; GGUF for GPT-2 carries byte-level BPE and characters")
    if split["type"] != "ByteLevel" or split["add_prefix_space"] or not split.get("use_regex", True):
        raise UserError(
            f"the tokenizer splits words with {json.dumps(split)}; llama.cpp's GPT-2 does it as ByteLevel with "
            "use_regex and without add_prefix_space"
        )
    options = ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"]
    if used := [name for name in options if model.get(name)]:
        raise UserError(f"the tokenizer's BPE has {', '.join(used)}, which llama.cpp's GPT-2 does not have")
    missing = sum(byte_text(bytes([byte])) not in model["vocab"] for byte in range(256))
    if missing:
        raise UserError(f"the tokenizer's vocabulary lacks {missing} of the 256 bytes; llama.cpp would drop them")


def _tensors(source: Source, outtype: str) -> dict[str, tuple[np.ndarray, Any]]:
    """Each tensor by llama.cpp's name with its GGML type; a quantized one is an array of bytes."""
    import gguf

    weights = gpt2_state_dict(source.model)
    if source.model.config.tie_word_embeddings:
        del weights["lm_head.weight"]  # llama.cpp takes token_embd for it
    tensors = {}
    wide_type = gguf.GGMLQuantizationType[outtype.upper()]
    for name, weight in weights.items():
        if name.startswith("transformer.h.") and weight.dim() == 2:
            weight = weight.T  # from Conv1D's [in, out]
        values = np.ascontiguousarray(weight.numpy())
        kind = gguf.GGMLQuantizationType.F32
        if weight.dim() == 2 and name != "transformer.wpe.weight":
            kind = wide_type
            if outtype == "q8_0" and values.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = gguf.GGMLQuantizationType.F16
                source.notes.append(
                    f"{name} is float16: its rows of {values.shape[1]} are no multiple of 32, as Q8_0 needs"
                )
            if kind == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > MAX_FLOAT16:
                raise UserError(f"{name} has values above {MAX_FLOAT16}, too large for float16; try --outtype bf16")
        tensors[tensor_name(name)] = gguf.quantize(values, kind), kind
    return tensors


def tensor_name(name: str) -> str:
    """llama.cpp's name of a tensor of GPT-2."""
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    stem, _, ending = name.rpartition(".")
    if stem in MODEL_TENSORS:
        return f"{MODEL_TENSORS[stem]}.{ending}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{LAYER_TENSORS[part]}.{ending}"


def _write(
    path: Path, source: Source, tokens: TokenTable, tensors: dict[str, tuple[np.ndarray, Any]], outtype: str
) -> None:
    """Write the GGUF file, which appears whole or not at all."""
    from gguf import GGUFWriter

    partial = path.with_name(path.name + PARTIAL)
    writer = GGUFWriter(partial, "gpt2")
    try:
        _add_metadata(writer, source, tokens, outtype)
        for name, (values, kind) in tensors.items():
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        fsync(partial)
        partial.rename(path)
    except BaseException:
        writer.close()
        with suppress(OSError):
            partial.unlink()
        raise
    fsync(path.parent)


def _add_metadata(writer: "GGUFWriter", source: Source, tokens: TokenTable, outtype: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    config, tokenizer = source.model.config, source.tokenizer
    file_type = "ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"
    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.types)
    writer.add_token_merges(tokens.merges)
    end = tokenizer.eos_token_id
    writer.add_bos_token_id(end if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    if template := portable_chat_template(tokenizer):
        writer.add_chat_template(template)
        end_of_turn = end_of_turn_id(tokenizer)
        if end_of_turn is not None:
            writer.add_eot_token_id(end_of_turn)


def modelfile(gguf_name: str, source: Source) -> str:
    """Ollama's Modelfile for a GGUF file beside it. A note says if its TEMPLATE has to be written by hand."""
    tokenizer = source.tokenizer
    end_of_turn = end_of_turn_id(tokenizer)
    stop = tokenizer.eos_token_id if end_of_turn is None else end_of_turn
    lines = [f"FROM ./{gguf_name}"]
    template = go_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        source.notes.append(
            "the Modelfile has no TEMPLATE: Ollama's language cannot express this chat template in general"
        )
    lines.append(f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(stop), ensure_ascii=False)}")
    lines.append(f"PARAMETER num_ctx {source.model.config.max_position_embeddings}")
    return "\n".join(lines) + "\n"


def go_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The chat template in the language of Ollama (Go's text/template); None for a template that is not ours.

    A model without a chat template continues the prompt as it is.
    """
    if not tokenizer.chat_template:
        return "{{ .Prompt }}"
    template = tokenizer.get_chat_template()
    if template == read_chat_template("chatml"):
        return GO_CHATML
    if template == read_chat_template("plain"):
        return GO_PLAIN.replace("EOS", tokenizer.eos_token)
    return None
