"""How does one talk with a model? `minigpt generate`: prompts from options, a file, a pipe or a conversation."""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from minigpt.sampling import (
    DEFAULT_MAX_NEW_TOKENS,
    Completion,
    Sampling,
    complete,
    context_length,
    first_stop,
    prompt_ids,
)

COMMANDS = "/again for another answer, /undo to forget the last turn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minigpt generate`."""
    add = parser.add_argument
    add("--model", required=True, help="run folder, checkpoint, or any model folder or Hub name")
    add("--prompt", action="append", metavar="TEXT", help='text to continue (repeatable); "" begins a text')
    add("--prompt_file", metavar="FILE", help="file that holds one prompt; its last newline is not part of it")
    add("--max_new_tokens", type=int, default=DEFAULT_MAX_NEW_TOKENS, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=1.0, metavar="X", help="0: always the likeliest token (default: 1)")
    add("--top_k", type=int, metavar="K", help="choose among the K likeliest tokens")
    add("--top_p", type=float, metavar="P", help="choose among the fewest tokens that hold P of the probability")
    add("--num_return_sequences", type=int, default=1, metavar="N", help="continuations a prompt and seed")
    add("--seed", type=int, nargs="+", default=[0], metavar="S", help="one or several seeds (default: 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    add("--interactive", action="store_true", help="prompt after prompt; Ctrl-C stops an answer, Ctrl-D leaves")
    add("--json", action="store_true", help="one JSON object a line")
    add("--device", metavar="D", help="cpu, cuda, mps ... (default: the best there is)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="default: as saved")
    add("--trust_remote_code", action="store_true", help="run the code of a foreign model; MiniGPTs need it not")


def main(args: argparse.Namespace) -> None:
    """`minigpt generate`. Raises ValueError with one clear line on bad input."""
    sampling = Sampling(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.num_return_sequences, tuple(args.stop)
    )
    if args.interactive and (args.prompt or args.prompt_file or args.json):
        raise ValueError("--interactive asks for prompts itself: leave out --prompt, --prompt_file and --json")
    if args.interactive and (sampling.num_return_sequences > 1 or len(args.seed) > 1):
        raise ValueError("--interactive gives one answer at a time: one seed, num_return_sequences=1")
    prompts = [] if args.interactive else read_prompts(args)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code)
    from minigpt.packed_linear import pack_linears  # here, since it needs torch

    pack_linears(model)
    if args.interactive:
        _converse(model, tokenizer, sampling, args.seed[0])
        return
    prompts_ids = [prompt_ids(model, tokenizer, prompt) for prompt in prompts]  # every prompt is good, or none is run
    several = len(prompts) * len(args.seed) * sampling.num_return_sequences > 1
    for prompt, ids in zip(prompts, prompts_ids, strict=True):
        for seed in args.seed:
            for number, completion in enumerate(complete(model, tokenizer, ids, sampling, seed)):
                if args.json:
                    print(json.dumps(_record(prompt, seed, number, completion), ensure_ascii=False), flush=True)
                    continue
                if several:
                    print(f"--- seed {seed}, sequence {number + 1}")
                print(prompt + completion.continuation, flush=True)
                _note_refills(completion, model)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts from the options, a file, or what is piped in. Raises ValueError when the source is missing or empty."""
    prompts = list(args.prompt or [])
    if args.prompt_file:
        path = Path(args.prompt_file)
        if not path.is_file():
            raise ValueError(f"prompt_file={args.prompt_file} is not a file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error
        if not text:
            raise ValueError(f"{path} is empty; for a text from nothing use --prompt ''")
        prompts.append(text.removesuffix("\n"))
    if not prompts and not sys.stdin.isatty():
        text = sys.stdin.read()
        if not text:
            raise ValueError("no prompt: give --prompt TEXT, --prompt_file FILE, --interactive, or pipe a text in")
        prompts.append(text.removesuffix("\n"))
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, --prompt_file FILE, --interactive, or pipe a text in")
    return prompts


def _record(prompt: str, seed: int, number: int, completion: Completion) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "continuation": completion.continuation,
        "seed": seed,
        "sequence": number,
        "new_tokens": completion.new_tokens,
        "finish_reason": completion.finish_reason,
        "context_refills": completion.refills,
    }


def _note_refills(completion: Completion, model: Any) -> None:
    if completion.refills:
        limit = context_length(model)
        print(
            f"(note: the context of {limit} tokens was full {completion.refills} times; "
            f"each time the text went on from its last {(limit or 0) // 2} tokens)",
            file=sys.stderr,
        )


def load_model(name: str, device: str | None, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and tokenizer from a folder or Hub name; MiniGPT and GPT-2 become a MiniGPT, others stay what they are.

    Raises ValueError when there is no such model, it has no tokenizer, or the device is not there.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
    from transformers.utils import logging

    from modeling_minigpt import MiniGPTForCausalLM

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(name).expanduser()
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model={name}: no such folder")
    where = str(model_folder(folder)) if folder.exists() else name
    try:
        model_type = PreTrainedConfig.get_config_dict(where)[0].get("model_type")
        ours = model_type in ("minigpt", "gpt2")
        loader: Any = MiniGPTForCausalLM if ours else AutoModelForCausalLM
        trust = {} if ours else {"trust_remote_code": trust_remote_code}
        model = loader.from_pretrained(where, dtype=dtype, **trust)
        tokenizer = AutoTokenizer.from_pretrained(where, **trust)
    except OSError as error:
        raise ValueError(f"model={name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device} cannot be used: {str(error).splitlines()[0]}") from error


def model_folder(folder: Path) -> Path:
    """`folder` if it holds a model, else its latest checkpoint. Raises ValueError when there is neither."""
    if (folder / "config.json").is_file():
        return folder
    checkpoints = [path for path in folder.glob("checkpoint-*") if (path / "config.json").is_file()]
    if not checkpoints:
        raise ValueError(f"model={folder} holds neither config.json nor a checkpoint-<step> folder with one")
    latest = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]) if path.name[-1].isdigit() else -1)
    print(f"(note: {folder} holds no finished model; using {latest})", file=sys.stderr)
    return latest


def _converse(model: Any, tokenizer: Any, sampling: Sampling, seed: int) -> None:
    """Prompt, answer, prompt ...; the whole conversation stays in the context while it fits."""
    turns: list[tuple[list[int], str]] = []  # what the context held before each prompt, and the prompt
    history: list[int] = []
    limit = context_length(model)
    print(f"Type a text to continue. {COMMANDS}; Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    while (prompt := _ask()) is not None:
        if prompt in ("/undo", "/again"):
            if not turns:
                print("(there is nothing before this)", file=sys.stderr)
                continue
            history, last = turns.pop()
            if prompt == "/undo":
                continue
            seed += 1
            prompt = last
        try:
            new_ids = prompt_ids(model, tokenizer, prompt) if prompt or not history else []
        except ValueError as error:
            print(f"({error})", file=sys.stderr)
            continue
        turns.append((history, prompt))
        ids = history + new_ids
        if limit is not None and len(ids) >= limit:
            ids = ids[-max(len(new_ids), limit // 2) :]
            print(f"(note: the context of {limit} tokens is full: its oldest part is forgotten)", file=sys.stderr)
        streamer = _Printer(tokenizer, sampling.stop)
        try:
            complete(model, tokenizer, ids, sampling, seed + len(turns) - 1, streamer)
        except KeyboardInterrupt:
            print(" ...", end="")
        streamer.finish()
        history = ids + streamer.new_ids


def _ask() -> str | None:
    """A line from the keyboard, edited and remembered as in a shell where Python has readline; None at its end."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - `input` uses it once it is imported
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


class _Printer:
    """A streamer for `generate` that prints text as soon as its characters are whole, and remembers the ids."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.new_ids: list[int] = []
        self.printed = 0
        self.is_prompt = True

    def put(self, value: Any) -> None:
        if self.is_prompt:  # `generate` hands over the prompt first
            self.is_prompt = False
            return
        self.new_ids += value.flatten().tolist()
        text = self.text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)

    def text(self) -> str:
        text: str = self.tokenizer.decode(self.new_ids, skip_special_tokens=True)
        return text[: first_stop(text, self.stop)]

    def finish(self) -> None:
        print(self.text()[self.printed :], flush=True)

    def end(self) -> None:
        self.is_prompt = True  # the context was refilled: the next call begins with a prompt again
