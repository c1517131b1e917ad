"""A model in llama.cpp, in ONNX Runtime and in MiniGPT, behind one interface.

Shapes: T tokens of a text, V vocabulary.
"""

import json
import subprocess
import sys
import urllib.request
import weakref
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import GenerationConfig

from minigpt.export.onnx import FILE_NAMES
from minigpt.generation.cpu_decoding import decode
from minigpt.modeling.packed_linear import pack_linears
from modeling_minigpt import MiniGPTForCausalLM

ALL = 1 << 20  # more than any vocabulary

LLAMA_SERVER = """
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()  # until the parent ends
"""


class Engine(Protocol):
    """A model in an engine. `size_bytes` is the size of its file, or of its weights in memory."""

    name: str
    dtype: str
    size_bytes: int

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """The log-probabilities of the next token after each of the ids, float32 [T, V]."""
        ...

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """Exactly `new_tokens` most likely ids after a prompt; ids that end a text are never taken."""
        ...


class MiniGPTEngine:
    """MiniGPT with packed matrices, as `minigpt generate` runs it on a CPU."""

    name = "MiniGPT"

    def __init__(self, model: MiniGPTForCausalLM, end_ids: list[int]) -> None:
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.size_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.end_ids = end_ids
        self.model = pack_linears(model)

    @torch.inference_mode()
    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1).numpy()

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        prompt = torch.tensor([ids])
        options = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, suppress_tokens=self.end_ids or None, pad_token_id=0
        )
        output: torch.Tensor = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=options, custom_generate=decode
        )
        new_ids: list[int] = output[0, len(ids) :].tolist()
        return new_ids


class LlamaCpp:
    """A GGUF file in llama.cpp's own server, as `xllamacpp` brings it, in a process of its own.

    In this process it would slow down PyTorch by a quarter. The server refuses a prompt that fills the whole context.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, context: int, threads: int) -> None:
        self.dtype, self.size_bytes = path.stem.rpartition("-")[2].lower(), path.stat().st_size
        command = [sys.executable, "-c", LLAMA_SERVER, str(path), str(context), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        weakref.finalize(self, self.process.kill)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError(f"llama.cpp does not start with {path}")
        self.space = (self.tokenize(" ") or [0])[0]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer of the server to a request."""
        address, headers = self.address + path, {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers)) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are recognized."""
        ids: list[int] = self.post("/tokenize", {"content": text, "parse_special": True})["tokens"]
        return ids

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        return np.stack([self._next(ids[:end]) for end in range(1, len(ids) + 1)])

    def _next(self, ids: list[int]) -> np.ndarray:
        # A token that ends the text, or a part of a character, would come without probabilities. The bias makes it a
        # space; probabilities are those before the bias.
        body = {"prompt": ids, "n_predict": 1, "n_probs": ALL, "temperature": 0, "logit_bias": [[self.space, 1e4]]}
        entries = self.post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
        row = np.full(len(entries), np.nan, np.float32)
        row[[entry["id"] for entry in entries]] = [entry["logprob"] for entry in entries]
        return row

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        body = {"prompt": ids, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        new_ids: list[int] = self.post("/completion", {**body, "return_tokens": True})["tokens"]
        return new_ids


class OnnxRuntime:
    """A graph of `minigpt export onnx` in ONNX Runtime on the CPU."""

    name = "ONNX Runtime"

    def __init__(self, path: Path, end_ids: list[int], threads: int) -> None:
        import onnxruntime

        self.dtype = next(dtype for dtype, name in FILE_NAMES.items() if name == path.stem)
        self.size_bytes, self.end_ids = path.stat().st_size, end_ids
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.empty_cache = {
            entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
            for entry in self.session.get_inputs()[3:]
        }

    def logits(self, ids: list[int], cache: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Logits [T, V] of the ids that follow the cached ones, and the cache with them."""
        past = next(iter(cache.values())).shape[2]
        inputs = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, past + len(ids)), np.int64),
            "position_ids": np.arange(past, past + len(ids))[None],
        }
        logits, *present = self.session.run(self.outputs, inputs | cache)
        return logits[0], dict(zip(cache, present, strict=True))

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        return torch.from_numpy(self.logits(ids, self.empty_cache)[0]).log_softmax(-1).numpy()

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        new_ids: list[int] = []
        inputs, cache = ids, self.empty_cache
        while len(new_ids) < new_tokens:
            logits, cache = self.logits(inputs, cache)
            logits[-1, self.end_ids] = -np.inf
            inputs = [int(logits[-1].argmax())]
            new_ids += inputs
        return new_ids
