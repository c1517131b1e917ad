"""Estimate the peak memory of a training run.

A step has several phases that can be its peak: the end of the forward pass, the backward pass of the loss, its end,
the update, an evaluation. The memory of each is a sum of named parts, in bytes; the largest sum is the estimate.
Nothing here runs a model: the formulas follow from what autograd saves in modeling_minigpt.py.

Letters: N tokens of a micro-batch, C hidden size, I intermediate size, H heads, T block size, V vocabulary, L layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from configuration_minigpt import MiniGPTConfig
from minigpt.modeling.loss import CHUNK_ELEMENTS
from minigpt.utils.errors import UserError

FLOAT32 = 4  # bytes
RUNTIME_BYTES = 0.05 * 2**30  # what a training process on a CPU needs beyond its imports: threads, kernels, loader
MALLOC_OVERHEAD = 0.2  # share of the activations that glibc's malloc keeps and cannot reuse. Measured, not derived

Parts = dict[str, float]  # name → bytes


@dataclass(frozen=True)
class TrainingSetup:
    """What decides the memory of one device. `compute_bytes` is 2 under mixed precision, else 4."""

    config: MiniGPTConfig
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
    sharded: bool = False  # FSDP2; otherwise DDP
    process_bytes: float = 0.0  # the process before it has a model

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.block_size

    @property
    def is_mixed(self) -> bool:
        return self.compute_bytes < FLOAT32

    @property
    def shards(self) -> int:
        """Into how many parts weights, gradients and optimizer state are divided."""
        return self.devices if self.sharded else 1


def layer_matrices(config: MiniGPTConfig) -> dict[tuple[int, int], int]:
    """The shapes (rows, columns) of the matrices of one layer, and how many have each shape."""
    hidden, intermediate = config.hidden_size, _intermediate_size(config)
    counts: dict[tuple[int, int], int] = {(hidden, hidden): 4}
    for shape in ((intermediate, hidden), (hidden, intermediate)):
        counts[shape] = counts.get(shape, 0) + 1
    return counts


def layer_matrix_parameters(config: MiniGPTConfig) -> int:
    """Number of parameters in the matrices of one layer."""
    return sum(rows * columns * count for (rows, columns), count in layer_matrices(config).items())


def layer_parameters(config: MiniGPTConfig) -> int:
    """Number of parameters in one layer: matrices, biases and two norms."""
    biases = (5 if config.qkv_bias else 2) * config.hidden_size + _intermediate_size(config)
    return layer_matrix_parameters(config) + biases + 4 * config.hidden_size


def non_layer_parameters(config: MiniGPTConfig) -> int:
    """Number of parameters outside the layers: token and position embeddings, last norm, and an untied head."""
    rows = config.vocab_size * (1 if config.tie_word_embeddings else 2) + config.max_position_embeddings
    return (rows + 2) * config.hidden_size


def parameters(config: MiniGPTConfig) -> int:
    """Number of parameters in the whole model; a tied head counts once."""
    return config.num_hidden_layers * layer_parameters(config) + non_layer_parameters(config)


def optimizer_bytes(config: MiniGPTConfig, optimizer: str) -> int:
    """State of the optimizer.

    AdamW has two moments per parameter and a step count per tensor. Muon has one moment per parameter of the layers'
    matrices and no step count for them; it uses AdamW for the rest.
    """
    layers = config.num_hidden_layers
    tensors = layers * (16 if config.qkv_bias else 13) + (4 if config.tie_word_embeddings else 5)
    if optimizer != "muon":
        return FLOAT32 * (2 * parameters(config) + tensors)
    by_muon = layers * layer_matrix_parameters(config)
    return FLOAT32 * (2 * (parameters(config) - by_muon) + by_muon + tensors - 6 * layers)


def update_bytes(setup: TrainingSetup) -> float:
    """Working memory of the update. AdamW's kernel has none; Muon stacks the matrices of one shape and their products.

    Two stacks in float32 (the averages, and the update of the shape before) and two stacks and two Gram matrices of
    the iteration, which runs in bfloat16 on a GPU.
    """
    if setup.optimizer != "muon":
        return 0.0
    iteration = 2 if setup.device == "cuda" else FLOAT32
    sizes = []
    for (rows, columns), count in layer_matrices(setup.config).items():
        matrices, short = setup.config.num_hidden_layers * count, min(rows, columns)
        sizes.append(matrices * (2 * FLOAT32 * rows * columns + 2 * iteration * (rows * columns + short * short)))
    return max(sizes)


def attention_bytes(setup: TrainingSetup) -> float:
    """What the attention kernel of one layer saves: queries, keys, values, and the weights if it stores them.

    Its result is counted as the input of the output projection. On a CPU, dropout on attention weights uses the plain
    computation in float32; a GPU's kernels only keep a seed.
    """
    config, hidden = setup.config, setup.tokens * setup.config.hidden_size
    heads, has_dropout = setup.tokens * config.num_attention_heads, config.attn_pdrop > 0
    weights = heads * setup.block_size  # H · T² per sample
    mask_bytes = setup.compute_bytes if setup.device == "cpu" else 1
    if setup.attention == "eager":
        # the cast weights are a second copy; without mixed precision and dropout the softmax is the only one
        cast_bytes = setup.compute_bytes if setup.is_mixed or has_dropout else 0
        per_weight = FLOAT32 + cast_bytes + (mask_bytes if has_dropout else 0)
        return 3 * hidden * setup.compute_bytes + weights * per_weight
    if has_dropout and setup.device == "cpu":
        return 3 * hidden * FLOAT32 + weights * 3 * FLOAT32
    document_mask = setup.tokens * setup.block_size * setup.compute_bytes if setup.document_attention else 0  # [B,T,T]
    row_sums = heads * FLOAT32  # their logarithms
    return 3 * hidden * setup.compute_bytes + row_sums + document_mask


def layer_activation_bytes(setup: TrainingSetup) -> float:
    """What autograd saves in one layer without checkpointing.

    In float32 the three projections share their input; autocast converts the norm's output once for each of them.
    """
    config, compute_bytes = setup.config, setup.compute_bytes
    hidden, intermediate = _widths(setup)
    norms = 2 * (hidden * FLOAT32 + 2 * setup.tokens * FLOAT32)  # inputs, means and deviations
    projections = hidden * compute_bytes * ((3 if setup.is_mixed else 1) + 2)
    activation = 2 * intermediate * compute_bytes  # the input of the activation function and of the down projection
    masks = 2 * hidden * _dropout_mask_bytes(setup, compute_bytes) if config.resid_pdrop > 0 else 0
    return norms + projections + activation + attention_bytes(setup) + masks


def kept_layer_activation_bytes(setup: TrainingSetup) -> float:
    """What one layer keeps until its backward pass: everything, or what activation checkpointing keeps of it."""
    if setup.gradient_checkpointing == "no":
        return layer_activation_bytes(setup)
    hidden, intermediate = _widths(setup)
    kept = hidden * FLOAT32  # the layer's input
    if setup.gradient_checkpointing == "selective":
        kept += (5 * hidden + intermediate) * setup.compute_bytes  # the results of six products
        if setup.attention == "sdpa" and setup.config.attn_pdrop == 0:
            kept += hidden * setup.compute_bytes + setup.tokens * setup.config.num_attention_heads * FLOAT32
    return kept


def activation_bytes(setup: TrainingSetup) -> float:
    """What autograd saves from the token ids to the head's input. Linear in the micro-batch."""
    config, tokens = setup.config, setup.tokens
    hidden = tokens * config.hidden_size
    ids = 8 * tokens * (2 if setup.document_attention else 1)  # token ids, and positions
    embedding = ids + (hidden * _dropout_mask_bytes(setup, FLOAT32) if config.embd_pdrop > 0 else 0)
    last_norm = hidden * FLOAT32 + 2 * tokens * FLOAT32
    layers = config.num_hidden_layers * kept_layer_activation_bytes(setup)
    return layers + embedding + last_norm + hidden * setup.compute_bytes


def loss_bytes(setup: TrainingSetup, phase: Literal["forward", "backward", "evaluation"]) -> float:
    """The logits [N, V], whose memory the gradient takes over, and the float32 chunks of `in_place_cross_entropy`.

    The forward pass and an evaluation also hold one chunk of probabilities, and of the logits in float32.
    """
    samples = setup.eval_batch if phase == "evaluation" else setup.micro_batch
    logits = samples * setup.block_size * setup.config.vocab_size
    chunks = 0 if phase == "backward" else 2 if setup.is_mixed else 1
    return logits * setup.compute_bytes + chunks * FLOAT32 * min(logits, CHUNK_ELEMENTS)


def low_precision_weight_bytes(setup: TrainingSetup) -> float:
    """Matrices that autocast has converted and that the backward pass needs; FSDP2 converts what it gathers instead.

    With checkpointing only the head's is kept: those of the layers are converted again.
    """
    if not setup.is_mixed or setup.sharded:
        return 0.0
    config = setup.config
    layers = config.num_hidden_layers if setup.gradient_checkpointing == "no" else 0
    return (layers * layer_matrix_parameters(config) + config.vocab_size * config.hidden_size) * setup.compute_bytes


def backward_bytes(setup: TrainingSetup) -> float:
    """Gradients in the backward pass of one MLP: of its output, in both precisions, and around the activation."""
    hidden, intermediate = _widths(setup)
    return hidden * (FLOAT32 + setup.compute_bytes) + 2 * intermediate * setup.compute_bytes


def communication_bytes(setup: TrainingSetup, backward: bool) -> float:
    """What FSDP2 gathers beyond its own shard: everything outside the layers, and two layers.

    It communicates in the compute dtype, and holds whole gradients of what it has gathered until they are reduced.
    """
    if not setup.sharded:
        return 0.0
    gathered = non_layer_parameters(setup.config) + 2 * layer_parameters(setup.config)
    return gathered * setup.compute_bytes * (2 if backward else 1)


def memory_by_phase(setup: TrainingSetup) -> dict[str, Parts]:
    """The parts of each phase that can be the peak of one device."""
    config = setup.config
    weights = parameters(config) * FLOAT32 / setup.shards
    ddp_buckets = weights if setup.devices > 1 and not setup.sharded else 0.0  # hold the gradients, are never freed
    accumulated = weights if setup.accumulation > 1 else ddp_buckets  # gradients of the micro-batches before
    activations, working = activation_bytes(setup), backward_bytes(setup)
    recomputed = layer_activation_bytes(setup) - kept_layer_activation_bytes(setup)  # of the layer at work
    converted = low_precision_weight_bytes(setup)
    tied_table = config.vocab_size * config.hidden_size * FLOAT32 / setup.shards if config.tie_word_embeddings else 0.0

    always: Parts = {
        "process": setup.process_bytes,
        "weights": weights,
        "optimizer state": optimizer_bytes(config, setup.optimizer) / setup.shards,
        # room for all gradients; DDP allocates its buckets again after the first step
        "kept by malloc": weights + ddp_buckets + MALLOC_OVERHEAD * activations if setup.device == "cpu" else 0.0,
    }
    forward: Parts = {
        "gradients": accumulated,
        "activations": activations,
        "weights in low precision": converted,
        "communication": communication_bytes(setup, backward=False),
    }
    backward: Parts = {"communication": communication_bytes(setup, backward=True)}
    return {
        "forward": always | forward | {"logits and loss": loss_bytes(setup, "forward")},
        "loss": always | forward | {"logits and loss": loss_bytes(setup, "backward")},
        "layers": always | forward | backward | {"activations": activations + recomputed, "working memory": working},
        # the backward pass has all gradients except this layer's, and needs only this layer's activations
        "first layer": always
        | backward
        | {
            "gradients": ddp_buckets or weights - layer_parameters(config) * FLOAT32 / setup.shards,
            "activations": layer_activation_bytes(setup),
            "weights in low precision": converted / config.num_hidden_layers,
            "working memory": working,
        },
        # a tied table has two gradients at the end: one as the head, one as the embedding
        "end of backward": always | backward | {"gradients": weights, "working memory": tied_table},
        "update": always | {"gradients": weights, "working memory": update_bytes(setup)},
        "evaluation": always | {"gradients": ddp_buckets, "logits and loss": loss_bytes(setup, "evaluation")},
    }


def peak_phase(setup: TrainingSetup) -> tuple[str, Parts]:
    """The phase with the largest sum, and its parts."""
    phases = memory_by_phase(setup)
    name = max(phases, key=lambda phase: sum(phases[phase].values()))
    return name, phases[name]


def peak_bytes(setup: TrainingSetup) -> float:
    """The most memory that one device holds at a time, bytes."""
    return sum(peak_phase(setup)[1].values())


def setups_of_same_batch(setup: TrainingSetup) -> Iterator[TrainingSetup]:
    """The setups with the same global batch, the largest micro-batch first."""
    samples = setup.micro_batch * setup.accumulation
    for micro_batch in range(samples, 0, -1):
        if samples % micro_batch == 0:
            yield replace(setup, micro_batch=micro_batch, accumulation=samples // micro_batch)


def largest_that_fits(setup: TrainingSetup, memory_bytes: float) -> TrainingSetup:
    """The setup with the same global batch and the largest micro-batch that needs at most `memory_bytes`.

    Raises UserError that names the smallest need if none fits.
    """
    for candidate in setups_of_same_batch(setup):
        if peak_bytes(candidate) <= memory_bytes:
            return candidate
    smallest = min(peak_bytes(candidate) for candidate in setups_of_same_batch(setup))
    advice = ["a smaller model or block_size"]
    advice += [] if setup.gradient_checkpointing == "full" else ["--gradient_checkpointing full"]
    advice += [] if setup.sharded else ["--fsdp on several --devices"]
    raise UserError(
        f"memory={memory_bytes / 2**30:.2f} GiB is too little: even with per_device_train_batch_size=1 this run needs "
        f"{smallest / 2**30:.2f} GiB; try {' or '.join(advice)}"
    )


def _widths(setup: TrainingSetup) -> tuple[int, int]:
    """N · C and N · I."""
    return setup.tokens * setup.config.hidden_size, setup.tokens * _intermediate_size(setup.config)


def _intermediate_size(config: MiniGPTConfig) -> int:
    assert config.intermediate_size is not None  # the config replaces None by its default
    return config.intermediate_size


def _dropout_mask_bytes(setup: TrainingSetup, value_bytes: int) -> int:
    """Bytes per element of a dropout mask: in the values' dtype on a CPU, boolean on a GPU."""
    return value_bytes if setup.device == "cpu" else 1
