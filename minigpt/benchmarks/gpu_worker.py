"""One step of `minigpt bench gpu`, in a process of its own: python -m minigpt.benchmarks.gpu_worker TASK.

A step is a public function of this module: it takes a `Recorder` and the options of its step, and records figures.
Nothing here imports the packages datasets and evaluate, which GPU images often lack.
"""

import importlib
import importlib.util
import json
import math
import os
import platform
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minigpt.benchmarks.gpu import Figure, Settings

TINY_SHAPE = "--hidden_size 64 --num_hidden_layers 2 --num_attention_heads 2 --block_size 64"
TINY_STEPS = 6
BF16 = ("--mixed_precision", "bf16")
SYNCHRONIZATION = "synchronizing CUDA operation"  # in the warnings of torch.cuda.set_sync_debug_mode

# parts of the names of CUDA kernels and of PyTorch's operations; the first group that matches counts
KERNEL_GROUPS = {
    "attention": r"flash|fmha|sdpa|scaled_dot_product|mem_eff|attention",
    "optimizer": r"adam|multi_tensor|foreach|lpnorm|linalg_vector_norm",
    "loss": r"triton|softmax|nll_loss|cross_entropy|logsumexp",
    "matmul": r"gemm|nvjet|cutlass|cublas|xmma|splitk|aten::(add)?mm$|aten::bmm|mkldnn_linear|aten::linear",
    "norm": r"layer_?norm|gammabeta",
    "activation": r"gelu",
    "casts and copies": r"copy|memcpy|memset|_to_copy|aten::to$|fill",
}


class Recorder:
    """Appends the figures of one step to the report."""

    def __init__(self, step: str, settings: Settings) -> None:
        self.step, self.settings = step, settings
        self.folder = Path(settings.folder)

    def figure(self, name: str, value: float | str, unit: str = "", note: str = "") -> None:
        """Record a figure at once."""
        value = value if isinstance(value, str) else float(value)
        Figure(self.step, name, value, unit, note).append_to(Path(self.settings.figures))

    def check(self, name: str, holds: bool, note: str = "") -> None:
        """Record whether something holds that should."""
        self.figure(name, "passed" if holds else "failed", note=note)


# ---- the machine


def machine(record: Recorder) -> None:
    """Versions, card, driver, attention kernels, rate of a matrix product, FLOPs per token."""
    import accelerate
    import torch
    import transformers

    from minigpt.benchmarks.train import flops_per_token
    from minigpt.utils.hardware import matrix_product_flops, peak_flops

    settings = record.settings
    record.figure("python", platform.python_version())
    for library in (torch, transformers, accelerate):
        record.figure(library.__name__, library.__version__)
    for name in ("triton", "liger_kernel", "flash_attn"):
        record.figure(name, "installed" if importlib.util.find_spec(name) else "not installed")
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record.figure("card", properties.name, note=f"compute capability {properties.major}.{properties.minor}")
        record.figure("memory", properties.total_memory / 2**30, "GiB")
        record.figure("CUDA", str(torch.version.cuda), note=f"cuDNN {torch.backends.cudnn.version()}")
        query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
        smi = shutil.which("nvidia-smi")
        if smi is not None:
            answer = subprocess.run([smi, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
            record.figure("driver", answer.stdout.strip() or "unknown", note="version, power limit, highest clock")
    for name, backend in _attention_kernels(settings.device):
        record.figure(f"attention kernel, {name}", backend)
    record.figure("matrix product", matrix_product_flops(settings.device, bf16=True) / 1e12, "TFLOP/s", "bfloat16")
    if peak := peak_flops(torch.device(settings.device)):
        record.figure("data sheet", peak / 1e12, "TFLOP/s", "bfloat16, dense")
    record.figure("training", flops_per_token(settings.shape) / 1e6, "MFLOP per token")


def _attention_kernels(device: str) -> Iterator[tuple[str, str]]:
    """Which of PyTorch's kernels `scaled_dot_product_attention` chooses."""
    import torch
    from torch.nn.attention import SDPBackend

    for name, dtype, is_masked in (
        ("bfloat16 causal", torch.bfloat16, False),
        ("bfloat16 with a mask", torch.bfloat16, True),
        ("float32 causal", torch.float32, False),
    ):
        query, key, value = (
            torch.zeros(2, 12, 128, 64, device=device, dtype=dtype, requires_grad=True) for _ in "qkv"
        )
        mask = torch.ones(2, 1, 128, 128, device=device, dtype=torch.bool).tril() if is_masked else None
        choice = torch._fused_sdp_choice(query, key, value, mask, is_causal=not is_masked)
        yield name, SDPBackend(choice).name


# ---- training at a tiny size: does it work


def train(record: Recorder, words: str) -> None:
    """A few steps; the loss must fall."""
    losses = _losses(_train(record, words.split()))
    record.figure("loss", losses[-1], "nats", f"after {len(losses)} steps; {losses[0]:.4f} after the first")
    record.check("losses are finite", all(map(math.isfinite, losses)))
    record.check("loss falls", losses[-1] < losses[0])


def resume(record: Recorder) -> None:
    """A checkpoint written in the background, and a run resumed from it, which must equal the first one."""
    from minigpt.training.verify_resume import differences

    words = ["--full_determinism", "--async_save", "--save_steps", str(TINY_STEPS // 2), *BF16]
    first, second = record.folder / "uninterrupted", record.folder / "resumed"
    checkpoint = f"checkpoint-{TINY_STEPS // 2}"
    _train(record, words, first)
    shutil.copytree(first / checkpoint, second / checkpoint)
    _train(record, [*words, "--resume_from_checkpoint", "latest"], second)
    difference = next(differences(first, second, TINY_STEPS // 2, TINY_STEPS), None)
    record.check("resumed run equals the uninterrupted one", difference is None, difference or "")


def distributed(record: Recorder, profile: str) -> None:
    """DDP or FSDP2 with one process, over NCCL, with the settings of a launch profile."""
    import torch
    import yaml
    from accelerate import Accelerator

    from minigpt.config.presets import find_profile

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = yaml.safe_load(find_profile(profile).read_text(encoding="utf-8"))
    if sharding := settings.get("fsdp_config"):  # as accelerate's launcher passes it on
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ |= {name.upper(): str(value).lower() if isinstance(value, bool) else str(value)
                       for name, value in sharding.items()}  # fmt: skip
    else:  # with one process, accelerate leaves the model as it is unless it believes that there are several
        Accelerator.multi_device = property(lambda self: True)  # type: ignore[assignment]
    expected = "FSDPMiniGPTForCausalLM" if sharding else "DistributedDataParallel"
    kinds, backends = set(), set()

    def note(run: Any) -> None:  # the trainer ends the process group when it is done
        kinds.add(type(run.model).__name__)
        backends.add(torch.distributed.get_backend())

    _before_each_step(note)
    train(record, "--mixed_precision bf16")
    record.check(f"model is {expected}", kinds == {expected}, ", ".join(kinds))
    record.check("backend is NCCL", backends == {"nccl"}, ", ".join(backends))


def synchronizations(record: Recorder, words: str) -> None:
    """How often the host waits for the device in a step that is not logged; it should never."""
    import torch

    steps, first_counted = 14, 4  # the first steps compile, allocate and are logged
    seen_before_step: list[int] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")

        def watch(run: Any) -> None:
            seen_before_step.append(len(seen))
            torch.cuda.set_sync_debug_mode("warn" if first_counted <= len(seen_before_step) < steps else "default")

        _before_each_step(watch)
        _train(record, [*BF16, *words.split(), "--max_steps", str(steps), "--logging_steps", "1000"])
    # steps count from 1 here; the last one is logged again
    counted = seen[seen_before_step[first_counted - 1] : seen_before_step[steps - 1]]
    places = Counter(
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in counted
        if SYNCHRONIZATION in str(warning.message)
    )
    per_step = places.total() / (steps - first_counted)
    record.figure("per step", per_step, note=", ".join(f"{place} {count}" for place, count in places.most_common(5)))
    record.check("none", per_step == 0)


def verify_resume(record: Recorder, deterministic: bool) -> None:
    """`minigpt verify-resume`. Without deterministic kernels a difference is no error on a GPU."""
    words = [*_tiny_words(record), *BF16]
    words += ["--full_determinism"] if deterministic else []
    config = record.folder / "config.yaml"
    config.write_text("{}\n", encoding="utf-8")
    command = [sys.executable, "-m", "minigpt", "verify-resume", str(config), "--steps", "8", *words]
    verification = subprocess.run(command, capture_output=True, text=True)
    answer = (verification.stdout.strip().splitlines() or [""])[-1]
    if verification.returncode != 0 and not answer.startswith("NOT equal"):
        raise RuntimeError(verification.stderr[-2000:])
    is_equal = verification.returncode == 0
    if deterministic:
        record.check("resumed run equals the uninterrupted one", is_equal, answer)
    else:
        record.figure("resumed run", "equal" if is_equal else "not equal", note=answer)


def _before_each_step(watch: Callable[[Any], None]) -> None:
    """Let the trainer call `watch` with its `Run` before each step."""
    trainer: Any = importlib.import_module("train_accelerate")
    take_step = trainer.take_step

    def watched_step(run: Any, learning_rate: float) -> Any:
        watch(run)
        return take_step(run, learning_rate)

    trainer.take_step = watched_step


def _train(record: Recorder, words: list[str], run_dir: Path | None = None) -> list[dict[str, float]]:
    """Train in this process. Returns the lines of metrics.jsonl."""
    from accelerate.state import AcceleratorState, GradientState

    from minigpt.config.parser import parse_arguments
    from minigpt.utils.run_files import METRICS_FILE, read_metrics

    run_dir = run_dir or record.folder / "run"
    trainer = importlib.import_module("train_accelerate")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    code = trainer.train(parse_arguments([*_tiny_words(record), *words, "--output_dir", str(run_dir)]))
    if code != 0:
        raise RuntimeError(f"the trainer ended with exit code {code}")
    return read_metrics(run_dir / METRICS_FILE)


def _tiny_words(record: Recorder) -> list[str]:
    """The options of a tiny run. Options that follow them win."""
    data = record.folder / "data"
    if not data.exists():
        write_text_shards(data)
    words = f"{TINY_SHAPE} --data {data} --tokenizer {data} --max_steps {TINY_STEPS} --logging_steps 1 "
    words += "--per_device_train_batch_size 8 --learning_rate 3e-3 --report_to none --eval_steps 0 --save_steps 0 "
    words += "--sample_max_new_tokens 4"
    return [*words.split(), *(["--use_cpu"] if record.settings.device == "cpu" else [])]


def write_text_shards(folder: Path) -> None:
    """Token shards and their tokenizer, made of documents of a few generated sentences each."""
    import numpy as np

    from minigpt.data.tokenizer import train_characters

    words, choice = ("the", "cat", "sees", "hears", "a", "dog", "tree", "and", "follows", "it"), random.Random(0)
    texts = [" ".join(choice.choice(words) for _ in range(choice.randint(3, 30))) + "." for _ in range(1000)]
    folder.mkdir()
    tokenizer = train_characters(texts)
    tokenizer.save_pretrained(folder)
    for name, documents in (("train", texts[100:]), ("val", texts[:100])):
        ids = [token for text in documents for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
        np.asarray(ids, dtype=np.uint16).tofile(folder / f"{name}.bin")


def _losses(metrics: list[dict[str, float]]) -> list[float]:
    return [line["train/loss"] for line in metrics if "train/loss" in line]


# ---- memory and speed


def memory(record: Recorder, gradient_checkpointing: str) -> None:
    """The peak that `minigpt plan` estimates, beside that of the trainer."""
    from minigpt.benchmarks.train import Options, take_turn
    from minigpt.benchmarks.train_worker import build_config
    from minigpt.planning.memory import TrainingSetup, peak_bytes, peak_phase

    settings, shape = record.settings, record.settings.shape
    setup = TrainingSetup(
        config=build_config(shape),
        block_size=shape.block_size,
        micro_batch=shape.batch_size,
        compute_bytes=2,
        gradient_checkpointing=gradient_checkpointing,
        device=settings.device,
    )
    estimate = peak_bytes(setup) / 2**30
    record.figure("estimate", estimate, "GiB", f"in the phase: {peak_phase(setup)[0]}")
    options = Options(
        settings.device,
        "bf16",
        gradient_checkpointing=gradient_checkpointing,
        steps=1,
        warmup=1,
        threads=os.cpu_count(),
    )
    measured = take_turn("minigpt", shape, options, record.folder).memory_gib
    record.figure("measured", measured, "GiB")
    record.figure("estimate / measured", estimate / measured)


def speed(record: Recorder, trainer: str, compiled: bool) -> None:
    """Time of a step, tokens per second, MFU and memory of one trainer."""
    from minigpt.benchmarks.train import Options, take_turn

    settings, shape, known = record.settings, record.settings.shape, record.settings.machine
    options = Options(
        settings.device,
        "bf16",
        compile=compiled,
        compile_backend=settings.compile_backend,
        steps=settings.steps,
        warmup=settings.warmup,
        threads=os.cpu_count(),
        nanogpt=settings.nanogpt,
    )
    turn = take_turn(trainer, shape, options, record.folder)
    step_s = statistics.median(turn.seconds)
    spread = f"{min(turn.seconds) * 1e3:.3f} to {max(turn.seconds) * 1e3:.3f}"
    record.figure("step", step_s * 1e3, "ms", spread)
    record.figure("speed", shape.tokens / step_s, "tokens/s", f"{shape.batch_size} x {shape.block_size} tokens")
    for rate in ("data sheet", "matrix product"):
        if rate in known and "training" in known:
            achieved = known["training"] * 1e6 * shape.tokens / step_s
            record.figure(f"MFU, {rate}", 100 * achieved / (known[rate] * 1e12), "%")
    record.figure("peak memory", turn.memory_gib, "GiB")


def loss_kernels(record: Recorder) -> None:
    """Time and memory of loss and gradient from logits in bfloat16; every kernel must give the same."""
    import torch

    from minigpt.utils.errors import first_line

    settings = record.settings
    rows, ids = settings.loss_rows, settings.shape.vocab_size
    torch.manual_seed(0)
    source = torch.randn(rows, ids, device=settings.device).to(torch.bfloat16)
    targets = torch.randint(ids, (rows,), device=settings.device)
    reference_loss, reference_gradient = _torch_loss(source.clone(), targets)
    for name, kernel in _loss_kernels(settings).items():
        if kernel is None:
            record.figure(name, "skipped", note="not installed")
            continue
        try:
            loss, gradient = kernel(source.clone(), targets)  # compiles
            error = (gradient.float() - reference_gradient.float()).abs().max() / reference_gradient.abs().max()
            close = torch.allclose(loss.float(), reference_loss, rtol=1e-3) and float(error) < 0.02
            record.check(f"{name}: loss and gradient agree", close, f"relative error {float(error):.1e}")
            del loss, gradient
            milliseconds, extra_gib = _time_and_memory(kernel, source, targets)
            record.figure(name, milliseconds, "ms", f"{rows} x {ids}")
            if extra_gib is not None:
                record.figure(f"{name}: memory beyond the logits", extra_gib, "GiB")
        except Exception as error:
            record.check(f"{name} runs", False, first_line(error))


LossKernel = Callable[
    [Any, Any], tuple[Any, Any]
]  # logits [N, V], which it may overwrite, and targets → sum, gradient


def _loss_kernels(settings: Settings) -> dict[str, LossKernel | None]:
    import torch

    from minigpt.modeling.loss import chunked_loss_sum, compiled_loss_sum, fused_loss_sum

    def in_place(loss_sum: Callable[..., Any]) -> LossKernel:
        # the multiplication stands for the backward pass, which scales the gradient
        return lambda logits, targets: (loss_sum(logits, targets, True), logits.mul_(1.0))

    is_gpu = settings.device == "cuda"
    compiled = compiled_loss_sum() if is_gpu else torch.compile(fused_loss_sum, backend=settings.compile_backend)
    liger: LossKernel | None = None
    if is_gpu and importlib.util.find_spec("liger_kernel"):
        module = importlib.import_module("liger_kernel.transformers")
        criterion = module.LigerCrossEntropyLoss(reduction="sum")
        liger = lambda logits, targets: _with_gradient(logits, lambda leaf: criterion(leaf, targets))  # noqa: E731
    return {
        "chunked": in_place(chunked_loss_sum),
        "compiled": in_place(compiled),
        "torch": _torch_loss,
        "liger": liger,
    }


def _torch_loss(logits: Any, targets: Any) -> tuple[Any, Any]:
    from torch.nn.functional import cross_entropy

    return _with_gradient(logits, lambda leaf: cross_entropy(leaf.float(), targets, reduction="sum"))


def _with_gradient(logits: Any, loss_sum: Callable[[Any], Any]) -> tuple[Any, Any]:
    leaf = logits.detach().requires_grad_()
    loss = loss_sum(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


def _time_and_memory(kernel: LossKernel, source: Any, targets: Any) -> tuple[float, float | None]:
    """Milliseconds (median of ten), and GiB beyond the logits (None on a CPU)."""
    import torch

    on_gpu, milliseconds = source.is_cuda, []
    logits = torch.empty_like(source)
    for _ in range(10):
        logits.copy_(source)
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        kernel(logits, targets)
        if on_gpu:
            torch.cuda.synchronize()
        milliseconds.append((time.perf_counter() - started) * 1e3)
    if not on_gpu:
        return statistics.median(milliseconds), None
    logits.copy_(source)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernel(logits, targets)
    torch.cuda.synchronize()
    return statistics.median(milliseconds), (torch.cuda.max_memory_allocated() - before) / 2**30


def profile(record: Recorder) -> None:
    """Which share of a step in a minimal training loop each group of kernels takes, and the longest kernels."""
    import torch
    from torch.autograd import DeviceType

    from minigpt.benchmarks.train_worker import Task, build_bare, random_batches, take_step

    settings = record.settings
    on_gpu = settings.device == "cuda"
    task = Task("bare", settings.shape, bf16=True, compile=False, device=settings.device, steps=3, warmup=3)
    torch.manual_seed(0)
    model, optimizer, compute_loss = build_bare(task)
    batches = random_batches(task)
    for _ in range(3):
        take_step(task, model, optimizer, compute_loss, next(batches))
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            take_step(task, model, optimizer, compute_loss, next(batches))
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    times = Counter(
        {
            event.key: float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
            for event in profiler.key_averages()
            if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
        }
    )
    total = times.total()
    groups = Counter[str]()
    for name, microseconds in times.items():
        groups[kernel_group(name)] += microseconds
    record.figure("all kernels", total / 3e3, "ms per step")
    for group, microseconds in groups.most_common():
        record.figure(group, 100 * microseconds / total, "%")
    for name, microseconds in times.most_common(8):
        short = re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", name)[:80]
        record.figure(f"kernel {short}", 100 * microseconds / total, "%")


def kernel_group(name: str) -> str:
    """The group of a kernel or operation, by its name."""
    for group, pattern in KERNEL_GROUPS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return group
    return "other"


def decode(record: Recorder, mode: str) -> None:
    """Greedy decoding in bfloat16, beside transformers' GPT-2."""
    from transformers.utils import logging

    from minigpt.benchmarks.generate import equal_models, measure

    settings = record.settings
    logging.set_verbosity_error()
    models = equal_models("bfloat16", settings.device, settings.decode_layers)
    for batch_size in (1, 8):
        row = measure(*models, mode, batch_size, settings.new_tokens, settings.turns, settings.compile_backend)
        record.figure(f"minigpt, batch {batch_size}", row.minigpt_tokens_per_s, "tokens/s")
        record.figure(f"transformers GPT-2, batch {batch_size}", row.gpt2_tokens_per_s, "tokens/s")
        record.figure(f"ratio, batch {batch_size}", row.ratio, note=f"{row.ratio_low:.2f} to {row.ratio_high:.2f}")


CHECKS = (machine, train, resume, distributed, synchronizations, verify_resume)
MEASUREMENTS = (memory, speed, loss_kernels, profile, decode)
TASKS: dict[str, Callable[..., None]] = {function.__name__: function for function in (*CHECKS, *MEASUREMENTS)}


def main() -> None:
    """Run the task in the first command-line argument: the step's name, its function, options and settings as JSON."""
    task = json.loads(sys.argv[1])
    record = Recorder(task["step"], Settings.from_dict(task["settings"]))
    TASKS[task["task"]](record, **task["options"])


if __name__ == "__main__":
    main()
