"""Estimate the peak memory of a training run.

A step has several moments that can be its peak: the end of the forward pass, the backward pass of the loss, its end,
the update, an evaluation. Each is a sum of named parts, in bytes; the largest sum is the forecast. Nothing here
runs a model: it is arithmetic about what autograd saves in modeling_minigpt.py.

Letters: N tokens of a micro-batch, C hidden size, I intermediate size, H heads, T block, V vocabulary, L layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from minigpt.utils.errors import UserError

FLOAT32 = 4

RUNTIME_BYTES = 0.05 * 2**30  # of a CPU process that trains beside its imports: threads, kernels, loader, trackers

UNRETURNED = 0.2  # of the activations: what glibc's malloc keeps beside room for all gradients. Observed, no law

Parts = dict[str, float]


@dataclass(frozen=True)
class Setup:
    """What decides the memory of one device. `compute_bytes` is 2 under mixed precision, else 4."""

    config: Any
    block_size: int
    micro_batch: int
    accumulation: int = 1
    eval_batch: int = 1
    compute_bytes: int = FLOAT32
    optimizer: str = "adamw"
    attention: str = "sdpa"
    document_attention: bool = False
    gradient_checkpointing: str = "no"  # or selective, full
    device: str = "cpu"  # or cuda
    devices: int = 1
    sharded: bool = False  # FSDP2; else data parallel
    process_bytes: float = 0.0  # of the program itself, before it has a model

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.block_size

    @property
    def is_mixed(self) -> bool:
        return self.compute_bytes < FLOAT32

    @property
    def shards(self) -> int:
        return self.devices if self.sharded else 1


def layer_matrices(config: Any) -> dict[tuple[int, int], int]:
    """How many matrices of each shape (rows, columns) one layer has."""
    wide, inner = config.hidden_size, config.intermediate_size
    counts: dict[tuple[int, int], int] = {(wide, wide): 4}
    for shape in ((inner, wide), (wide, inner)):
        counts[shape] = counts.get(shape, 0) + 1
    return counts


def layer_parameters(config: Any) -> int:
    """Numbers in one layer: its matrices, their biases and two norms."""
    matrices = sum(rows * columns * count for (rows, columns), count in layer_matrices(config).items())
    biases = (5 if config.qkv_bias else 2) * config.hidden_size + config.intermediate_size
    return matrices + biases + 4 * config.hidden_size


def outer_parameters(config: Any) -> int:
    """Numbers outside the layers: embeddings, positions, the last norm, and the head if it is not the embedding."""
    tables = config.vocab_size * (1 if config.tie_word_embeddings else 2) + config.max_position_embeddings
    return (tables + 2) * config.hidden_size


def parameters(config: Any) -> int:
    """Numbers in the whole model; a tied head counts once."""
    return config.num_hidden_layers * layer_parameters(config) + outer_parameters(config)


def optimizer_bytes(config: Any, optimizer: str) -> int:
    """State of the optimizer: two moments a number, and a step count a tensor; Muon has one moment for a matrix."""
    layers = config.num_hidden_layers
    tensors = layers * (16 if config.qkv_bias else 13) + (4 if config.tie_word_embeddings else 5)
    if optimizer != "muon":
        return FLOAT32 * (2 * parameters(config) + tensors)
    numbers = layers * sum(rows * columns * count for (rows, columns), count in layer_matrices(config).items())
    return FLOAT32 * (2 * (parameters(config) - numbers) + numbers + tensors - 6 * layers)


def update_bytes(setup: Setup) -> float:
    """Working memory of the update. AdamW's kernel has none; Muon stacks the matrices of one shape and their products.

    Two stacks in float32 (of the averages, and what is applied of the shape before) and two stacks and two Gram
    matrices of the iteration, which runs in bfloat16 on a GPU.
    """
    if setup.optimizer != "muon":
        return 0.0
    iteration = 2 if setup.device == "cuda" else FLOAT32
    needs = []
    for (rows, columns), count in layer_matrices(setup.config).items():
        stack, short = setup.config.num_hidden_layers * count, min(rows, columns)
        needs.append(stack * (2 * FLOAT32 * rows * columns + 2 * iteration * (rows * columns + short * short)))
    return max(needs)


def attention_bytes(setup: Setup) -> float:
    """What the attention kernel of one layer saves: queries, keys, values, and the weights if it writes them out.

    The mix of values that it returns is counted as the input of the output projection. On a CPU, dropout inside
    attention takes the plain computation in float32; a GPU's kernels keep a seed.
    """
    config, wide = setup.config, setup.tokens * setup.config.hidden_size
    heads, drops = setup.tokens * config.num_attention_heads, config.attn_pdrop > 0
    weights = heads * setup.block_size  # H · T² a sample
    mask = setup.compute_bytes if setup.device == "cpu" else 1
    if setup.attention == "eager":
        cast = setup.compute_bytes if setup.is_mixed or drops else 0  # without either the softmax is the weights
        return 3 * wide * setup.compute_bytes + weights * (FLOAT32 + cast + (mask if drops else 0))
    if drops and setup.device == "cpu":
        return 3 * wide * FLOAT32 + weights * 3 * FLOAT32
    apart = (
        setup.tokens * setup.block_size * setup.compute_bytes if setup.document_attention else 0
    )  # a mask [B, T, T]
    return 3 * wide * setup.compute_bytes + heads * FLOAT32 + apart  # and the logarithm of each row's sum


def layer_bytes(setup: Setup) -> float:
    """What autograd saves in one layer, bytes.

    In float32 the three projections share their input; autocast converts the norm's output once for each of them.
    """
    config, small = setup.config, setup.compute_bytes
    wide, inner = setup.tokens * config.hidden_size, setup.tokens * config.intermediate_size
    norms = 2 * (wide * FLOAT32 + 2 * setup.tokens * FLOAT32)  # their inputs, means and deviations
    linears = wide * small * ((3 if setup.is_mixed else 1) + 2) + 2 * inner * small  # and the activation function
    masks = 2 * wide * _mask_bytes(setup, small) if config.resid_pdrop > 0 else 0
    return norms + linears + attention_bytes(setup) + masks


def kept_bytes(setup: Setup) -> float:
    """What one layer keeps until its backward pass, bytes: all of it, or what `minigpt.recompute` leaves."""
    if setup.gradient_checkpointing == "no":
        return layer_bytes(setup)
    config, tokens = setup.config, setup.tokens
    kept = tokens * config.hidden_size * FLOAT32  # its input
    if setup.gradient_checkpointing == "selective":
        kept += tokens * (5 * config.hidden_size + config.intermediate_size) * setup.compute_bytes  # six products
        if setup.attention == "sdpa" and config.attn_pdrop == 0:
            kept += tokens * (config.hidden_size * setup.compute_bytes + config.num_attention_heads * FLOAT32)
    return kept


def activation_bytes(setup: Setup) -> float:
    """What autograd saves from the token ids to the head's input, bytes. Linear in the micro-batch."""
    config, tokens = setup.config, setup.tokens
    wide = tokens * config.hidden_size
    ids = 8 * tokens * (2 if setup.document_attention else 1)  # and positions
    embedding = ids + (wide * _mask_bytes(setup, FLOAT32) if config.embd_pdrop > 0 else 0)
    last_norm = wide * FLOAT32 + 2 * tokens * FLOAT32
    return config.num_hidden_layers * kept_bytes(setup) + embedding + last_norm + wide * setup.compute_bytes


def loss_bytes(setup: Setup, moment: str) -> float:
    """The logits [N, V], whose gradient takes their place, and what `in_place_cross_entropy` makes of a few rows.

    saved, backward: the logits. forward, evaluation: a chunk of probabilities too, and of its logits in float32.
    """
    from minigpt.modeling.loss import CHUNK_NUMBERS  # here, since it needs torch

    samples = setup.eval_batch if moment == "evaluation" else setup.micro_batch
    logits = samples * setup.block_size * setup.config.vocab_size
    copies = (2 if setup.is_mixed else 1) if moment in ("forward", "evaluation") else 0
    chunk = copies * FLOAT32 * min(logits, CHUNK_NUMBERS)
    return logits * setup.compute_bytes + chunk


def low_precision_bytes(setup: Setup) -> float:
    """Matrices that autocast converts for the forward pass and that wait for the backward pass; FSDP2 holds its own.

    With checkpointing that is the head alone: the matrices of the layers are converted again.
    """
    if not setup.is_mixed or setup.sharded:
        return 0.0
    config = setup.config
    layer = sum(rows * columns * count for (rows, columns), count in layer_matrices(config).items())
    layers = config.num_hidden_layers if setup.gradient_checkpointing == "no" else 0
    return (layers * layer + config.vocab_size * config.hidden_size) * setup.compute_bytes


def backward_bytes(setup: Setup) -> float:
    """Gradients that flow through a layer's MLP: of its output, in both precisions, and around the activation."""
    config = setup.config
    wide, inner = setup.tokens * config.hidden_size, setup.tokens * config.intermediate_size
    return wide * (FLOAT32 + setup.compute_bytes) + 2 * inner * setup.compute_bytes


def communication_bytes(setup: Setup, backward: bool) -> float:
    """What FSDP2 gathers beyond its share: all that is outside the layers, and two layers.

    It sends in the compute dtype, and holds the whole gradients of what it has gathered before they are reduced.
    """
    if not setup.sharded:
        return 0.0
    gathered = outer_parameters(setup.config) + 2 * layer_parameters(setup.config)
    return gathered * setup.compute_bytes * (2 if backward else 1)


def moments(setup: Setup) -> dict[str, Parts]:
    """The parts of each moment that can be the peak, bytes of one device."""
    config = setup.config
    weights = parameters(config) * FLOAT32 / setup.shards
    always: Parts = {
        "process": setup.process_bytes,
        "weights": weights,
        "optimizer state": optimizer_bytes(config, setup.optimizer) / setup.shards,
    }
    buckets = weights if setup.devices > 1 and not setup.sharded else 0.0  # of DDP: its gradients, and they stay
    kept = weights if setup.accumulation > 1 else buckets  # gradients of the micro-batches before
    # DDP makes its buckets anew after the first step
    kept_by_malloc = weights + buckets + UNRETURNED * activation_bytes(setup)
    always["kept by malloc"] = kept_by_malloc if setup.device == "cpu" else 0.0
    forward = {
        "gradients": kept,
        "activations": activation_bytes(setup),
        "communication": communication_bytes(setup, False),
    }
    table = config.vocab_size * config.hidden_size * FLOAT32 if config.tie_word_embeddings else 0
    copies = low_precision_bytes(setup)
    backward = {"communication": communication_bytes(setup, True)}
    recomputed = forward["activations"] + layer_bytes(setup) - kept_bytes(setup)  # one layer is whole again
    return {
        "forward": always
        | forward
        | {"weights in low precision": copies, "logits and loss": loss_bytes(setup, "forward")},
        "loss": always
        | forward
        | {"weights in low precision": copies, "logits and loss": loss_bytes(setup, "backward")},
        "layers": always
        | forward
        | backward
        | {"activations": recomputed, "weights in low precision": copies, "working memory": backward_bytes(setup)},
        # all gradients but its own are there, and what it needs: with checkpointing that is made again just now
        "first layer": always
        | backward
        | {
            "gradients": buckets or weights - layer_parameters(config) * FLOAT32 / setup.shards,
            "activations": layer_bytes(setup),
            "weights in low precision": copies / config.num_hidden_layers,
            "working memory": backward_bytes(setup),
        },
        # a tied table gets its second gradient last: once as the head, once as the embedding
        "end of backward": always | backward | {"gradients": weights, "working memory": table / setup.shards},
        "update": always | {"gradients": weights, "working memory": update_bytes(setup)},
        "evaluation": always | {"gradients": buckets, "logits and loss": loss_bytes(setup, "evaluation")},
    }


def peak(setup: Setup) -> tuple[str, Parts]:
    """The moment with the largest sum, and its parts in bytes."""
    every = moments(setup)
    moment = max(every, key=lambda name: sum(every[name].values()))
    return moment, every[moment]


def peak_bytes(setup: Setup) -> float:
    """Most memory that one device holds, bytes."""
    return sum(peak(setup)[1].values())


def same_batch(setup: Setup) -> Iterator[Setup]:
    """The setups of the same global batch, the largest micro-batch first."""
    samples = setup.micro_batch * setup.accumulation
    for micro_batch in range(samples, 0, -1):
        if samples % micro_batch == 0:
            yield replace(setup, micro_batch=micro_batch, accumulation=samples // micro_batch)


def largest_that_fits(setup: Setup, memory_bytes: float) -> Setup:
    """The setup of the same global batch with the largest micro-batch whose peak is within `memory_bytes`.

    Raises UserError that says the smallest need where none fits.
    """
    for candidate in same_batch(setup):
        if peak_bytes(candidate) <= memory_bytes:
            return candidate
    smallest = min(peak_bytes(candidate) for candidate in same_batch(setup))
    ways = ["a smaller model or block_size"]
    ways += [] if setup.gradient_checkpointing == "full" else ["--gradient_checkpointing full"]
    ways += [] if setup.sharded else ["--fsdp on several --devices"]
    raise UserError(
        f"memory={memory_bytes / 2**30:.2f} GiB is too little: even with per_device_train_batch_size=1 this run needs "
        f"{smallest / 2**30:.2f} GiB; try {' or '.join(ways)}"
    )


def _mask_bytes(setup: Setup, dtype_bytes: int) -> int:
    """Bytes an element of dropout's mask: of the values' dtype on a CPU, boolean on a GPU."""
    return dtype_bytes if setup.device == "cpu" else 1
