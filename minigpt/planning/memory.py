"""Estimate the peak memory of a training run.

A step has several phases that can be its peak: the end of the forward pass, the backward pass of the loss, its end,
the update, an evaluation. The memory of each is a sum of named parts, in bytes; the largest sum is the estimate.
Nothing here runs a model: the formulas follow from what autograd saves in modeling_minigpt.py, and from how DDP and
FSDP2 store parameters and gradients.

Letters: N tokens of a micro-batch, C hidden size, I intermediate size, H heads, T block size, V vocabulary, L layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from configuration_minigpt import MiniGPTConfig
from minigpt.modeling.loss import CHUNK_ELEMENTS

FLOAT32 = 4  # bytes
RUNTIME_BYTES = 0.05 * 2**30  # what a training process on a CPU needs beyond its imports: threads, kernels, loader
MALLOC_OVERHEAD = 0.2  # share of the activations that glibc's malloc keeps and cannot reuse. Measured, not derived

# What a process on a GPU needs beyond its tensors. The first, second and fourth are assumptions, not measured here.
CUDA_CONTEXT_BYTES = 0.5 * 2**30  # driver and loaded kernels; nvidia-smi shows 0.3 to 0.5 GiB for an idle process
NCCL_BYTES = 0.5 * 2**30  # up to 32 channels, whose buffers take 4 MiB (NCCL_BUFFSIZE) and more per ring or tree
# PyTorch's default on Hopper, CUBLAS_WORKSPACE_CONFIG in its documentation (other GPUs: 8 MiB). The forward and the
# backward pass run in two threads, each with its own cuBLAS handle
CUBLAS_WORKSPACE_BYTES = 2 * 32 * 2**20
# of what a step allocates and frees: share that PyTorch's allocator reserves in blocks that no tensor fits into
FRAGMENTATION = 0.1
BEYOND_TENSORS = ("process", "CUDA context", "NCCL buffers", "fragmentation", "kept by malloc")  # parts that are not

Parts = dict[str, float]  # name → bytes


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of `rank` on the linear layers called `modules`; the model itself is frozen."""

    rank: int
    modules: tuple[str, ...]
    dropout: float = 0.0


@dataclass(frozen=True)
class TrainingSetup:
    """What decides the memory of one device. `compute_bytes` is 2 under mixed precision, else 4.

    Mixed precision is autocast on one device and under DDP. FSDP2 instead gathers bfloat16 copies of its float32
    shards, and the whole model computes in bfloat16.
    """

    config: MiniGPTConfig
    block_size: int
    micro_batch: int
    accumulation: int = 1
    eval_batch: int = 1
    compute_bytes: int = FLOAT32
    optimizer: str = "adamw"
    attention: str = "sdpa"
    document_attention: bool = False
    muon_ns_steps: int = 5
    gradient_checkpointing: str = "no"  # or selective, full
    device: str = "cpu"  # or cuda
    devices: int = 1
    sharded: bool = False  # FSDP2; otherwise DDP
    replicas: int = 1  # copies of a sharded model, one on each node (HSDP)
    process_bytes: float = 0.0  # the process before it has a model
    adapter: Adapter | None = None  # the only thing that is trained, if it is given

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.block_size

    @property
    def is_mixed(self) -> bool:
        return self.compute_bytes < FLOAT32

    @property
    def is_autocast(self) -> bool:
        return self.is_mixed and not self.sharded

    @property
    def hidden_bytes(self) -> int:
        """Bytes per number of the hidden states between the layers; autocast leaves them in float32."""
        return self.compute_bytes if self.sharded else FLOAT32

    @property
    def is_ddp(self) -> bool:
        return self.devices > 1 and not self.sharded

    @property
    def shards(self) -> int:
        """Into how many parts weights, gradients and optimizer state are divided."""
        return self.devices // self.replicas if self.sharded else 1

    @property
    def parallelism(self) -> str:
        """What the devices share: one, DDP, FSDP2 or HSDP."""
        if self.devices == 1:
            return "one"
        return "DDP" if not self.sharded else "FSDP2" if self.replicas == 1 else "HSDP"


def layer_matrices(config: MiniGPTConfig) -> dict[tuple[int, int], int]:
    """The shapes (rows, columns) of the matrices of one layer, and how many have each shape."""
    hidden, intermediate = config.hidden_size, _intermediate_size(config)
    counts: dict[tuple[int, int], int] = {(hidden, hidden): 4}
    for shape in ((intermediate, hidden), (hidden, intermediate)):
        counts[shape] = counts.get(shape, 0) + 1
    return counts


def muon_matrices(config: MiniGPTConfig) -> dict[tuple[int, int], int]:
    """The same as Muon takes them: each head of the query and key projections is a matrix of its own."""
    counts = layer_matrices(config)
    hidden, heads = config.hidden_size, config.num_attention_heads
    counts[hidden, hidden] -= 2
    counts[hidden // heads, hidden] = counts.get((hidden // heads, hidden), 0) + 2 * heads
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


def module_widths(config: MiniGPTConfig) -> dict[str, tuple[int, int]]:
    """The inputs and outputs of each linear layer of a layer."""
    hidden, intermediate = config.hidden_size, _intermediate_size(config)
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    return square | {"up_proj": (hidden, intermediate), "down_proj": (intermediate, hidden)}


def adapter_layer_parameters(setup: TrainingSetup) -> int:
    """Number of parameters of the adapter in one layer; 0 without an adapter."""
    if setup.adapter is None:
        return 0
    widths = module_widths(setup.config)
    return setup.adapter.rank * sum(sum(widths[name]) for name in setup.adapter.modules)


def all_parameters(setup: TrainingSetup) -> int:
    """Number of parameters in the whole model and its adapter."""
    return parameters(setup.config) + setup.config.num_hidden_layers * adapter_layer_parameters(setup)


def trained_parameters(setup: TrainingSetup) -> int:
    """Number of parameters that are trained: those of the adapter if there is one, otherwise all."""
    if setup.adapter is None:
        return parameters(setup.config)
    return setup.config.num_hidden_layers * adapter_layer_parameters(setup)


def optimizer_bytes(setup: TrainingSetup) -> int:
    """State of the optimizer.

    AdamW has two moments per parameter and a step count per tensor. Muon has one moment per parameter of the layers'
    matrices and no step count for them; it uses AdamW for the rest.
    """
    config, layers = setup.config, setup.config.num_hidden_layers
    if setup.adapter is not None:
        return FLOAT32 * (2 * trained_parameters(setup) + 2 * layers * len(setup.adapter.modules))
    tensors = layers * (16 if config.qkv_bias else 13) + (4 if config.tie_word_embeddings else 5)
    if setup.optimizer != "muon":
        return FLOAT32 * (2 * parameters(config) + tensors)
    by_muon = layers * layer_matrix_parameters(config)
    return FLOAT32 * (2 * (parameters(config) - by_muon) + by_muon + tensors - 6 * layers)


def update_bytes(setup: TrainingSetup) -> float:
    """Working memory of the update. AdamW's kernel has none; Muon stacks the matrices of one shape and their products.

    Stacks in float32 are the averages and the update of the shape before; with DDP also the updates of all processes,
    with FSDP2 the buffers of two exchanges. The iteration, on the share of one process, has two stacks and two Gram
    matrices, in bfloat16 on a GPU.
    """
    if setup.optimizer != "muon":
        return 0.0
    iteration = (2 if setup.device == "cuda" else FLOAT32) / (setup.devices // setup.replicas)
    stacks = 6 / setup.shards if setup.sharded else 3 if setup.is_ddp else 2
    sizes = []
    for (rows, columns), count in muon_matrices(setup.config).items():
        matrices, short = setup.config.num_hidden_layers * count, min(rows, columns)
        per_matrix = stacks * FLOAT32 * rows * columns + 2 * iteration * (rows * columns + short * short)
        sizes.append(matrices * per_matrix)
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
    """What autograd saves in one layer without checkpointing."""
    config, compute_bytes = setup.config, setup.compute_bytes
    hidden, intermediate = _widths(setup)
    norms = 2 * (hidden * setup.hidden_bytes + _norm_statistics_bytes(setup))
    if setup.adapter is None:
        # the inputs of query, key and value (one), of the output and of the MLP
        projections: float = 3 * hidden * compute_bytes
        activation = 2 * intermediate * compute_bytes  # the inputs of the activation function and of down_proj
    else:  # frozen matrices need no input
        keeps_its_result = setup.attention == "sdpa" and (config.attn_pdrop == 0 or setup.device == "cuda")
        projections = adapter_activation_bytes(setup, keeps_its_result)
        projections += hidden * compute_bytes if keeps_its_result else 0.0
        activation = intermediate * compute_bytes
    masks = 2 * hidden * _dropout_mask_bytes(setup, compute_bytes) if config.resid_pdrop > 0 else 0
    return norms + projections + activation + attention_bytes(setup) + masks


def adapter_activation_bytes(setup: TrainingSetup, attention_keeps_its_result: bool) -> float:
    """What autograd saves of the adapter in one layer: the inputs of A, after its dropout, and of B; dropout masks.

    Without dropout and autocast the input of A is that of the frozen layer, which may be kept already. PEFT converts
    it to float32 first, so under autocast each A has a copy in half precision.
    """
    adapter, compute_bytes, widths = setup.adapter, setup.compute_bytes, module_widths(setup.config)
    assert adapter is not None
    kept = setup.tokens * adapter.rank * compute_bytes * len(adapter.modules)
    shared = _attention_inputs(adapter)
    inputs = [name for name in adapter.modules if name not in shared]
    if has_own_copies := adapter.dropout > 0 or setup.is_autocast:
        inputs = list(adapter.modules)
    else:
        inputs += shared[:1]
    for name in inputs:
        if has_own_copies or name != "o_proj" or not attention_keeps_its_result:
            kept += setup.tokens * widths[name][0] * compute_bytes
    if adapter.dropout > 0:
        mask_bytes = _dropout_mask_bytes(setup, setup.hidden_bytes)
        kept += setup.tokens * mask_bytes * sum(widths[name][0] for name in adapter.modules)
    return kept


def is_attention_recomputed(setup: TrainingSetup) -> bool:
    """Whether the backward pass computes attention again; selective checkpointing keeps the output of some kernels."""
    is_kept = setup.attention == "sdpa" and setup.config.attn_pdrop == 0
    return setup.gradient_checkpointing == "full" or (setup.gradient_checkpointing == "selective" and not is_kept)


def kept_layer_activation_bytes(setup: TrainingSetup) -> float:
    """What one layer keeps until its backward pass: everything, or what activation checkpointing keeps of it."""
    if setup.gradient_checkpointing == "no":
        return layer_activation_bytes(setup)
    hidden, intermediate = _widths(setup)
    kept = hidden * setup.hidden_bytes  # the layer's input
    if setup.gradient_checkpointing == "selective":
        kept += (5 * hidden + intermediate) * setup.compute_bytes  # the results of six products
        if setup.adapter is not None:  # and of two more in each adapted layer
            outputs = sum(module_widths(setup.config)[name][1] + setup.adapter.rank for name in setup.adapter.modules)
            kept += setup.tokens * outputs * setup.compute_bytes
        if not is_attention_recomputed(setup):
            kept += hidden * setup.compute_bytes + setup.tokens * setup.config.num_attention_heads * FLOAT32
    return kept


def activation_bytes(setup: TrainingSetup) -> float:
    """What autograd saves from the token ids to the head's input. Linear in the micro-batch."""
    config, tokens = setup.config, setup.tokens
    hidden = tokens * config.hidden_size
    ids = 8 * tokens * (2 if setup.document_attention else 1)  # token ids, and positions
    embedding_mask = hidden * _dropout_mask_bytes(setup, setup.hidden_bytes) if config.embd_pdrop > 0 else 0
    last_norm = hidden * setup.hidden_bytes + _norm_statistics_bytes(setup)
    layers = config.num_hidden_layers * kept_layer_activation_bytes(setup)
    if setup.adapter is None:
        return layers + ids + embedding_mask + last_norm + hidden * setup.compute_bytes
    if setup.gradient_checkpointing != "no":
        return layers + embedding_mask + last_norm
    # the embeddings are frozen: the first layer keeps neither the input of its norm nor masks of dropout after it
    masks = hidden * _dropout_mask_bytes(setup, setup.hidden_bytes) if setup.adapter.dropout > 0 else 0
    return (
        layers
        - len(_attention_inputs(setup.adapter)) * masks
        - _norm_statistics_bytes(setup)
        - hidden * setup.hidden_bytes
        + last_norm
    )


def _attention_inputs(adapter: Adapter) -> list[str]:
    """The adapted layers whose input is that of attention."""
    return [name for name in adapter.modules if name in ("q_proj", "k_proj", "v_proj")]


def loss_bytes(setup: TrainingSetup, phase: Literal["forward", "backward", "evaluation"]) -> float:
    """The logits [N, V], whose memory the gradient takes over, and the float32 chunks of `in_place_cross_entropy`.

    The forward pass and an evaluation also hold one chunk of probabilities, and of the logits in float32.
    """
    samples = setup.eval_batch if phase == "evaluation" else setup.micro_batch
    logits = samples * setup.block_size * setup.config.vocab_size
    chunks = 0 if phase == "backward" else 2 if setup.is_mixed else 1
    return logits * setup.compute_bytes + chunks * FLOAT32 * min(logits, CHUNK_ELEMENTS)


def low_precision_weight_bytes(setup: TrainingSetup) -> float:
    """Matrices that autocast has converted and that the backward pass needs.

    With checkpointing only the head's is kept: those of the layers are converted again. An adapter's are converted,
    too; with one, the input of the first layer needs no gradient, and so not the matrices that it is multiplied with.
    """
    if not setup.is_autocast:
        return 0.0
    config = setup.config
    layers = config.num_hidden_layers if setup.gradient_checkpointing == "no" else 0
    numbers = layers * (layer_matrix_parameters(config) + adapter_layer_parameters(setup))
    if setup.adapter is not None and layers:
        first = 3 * config.hidden_size + setup.adapter.rank * len(_attention_inputs(setup.adapter))
        numbers -= first * config.hidden_size
    return (numbers + config.vocab_size * config.hidden_size) * setup.compute_bytes


def backward_bytes(setup: TrainingSetup) -> float:
    """Gradients in the backward pass of one MLP: of its output, in both precisions, and around the activation.

    With an adapter, autocast has several gradients of one linear layer's input at a time: those of A's input in half
    precision, in float32 and before its dropout, and that of the frozen layer.
    """
    hidden, intermediate = _widths(setup)
    around_activation = 2 * intermediate * setup.compute_bytes
    if setup.adapter is not None and setup.is_autocast:
        widest = max(module_widths(setup.config)[name][0] for name in setup.adapter.modules)
        copies = 2 * setup.compute_bytes + FLOAT32 * (2 if setup.adapter.dropout > 0 else 1)
        around_activation = max(around_activation, setup.tokens * widest * copies)
    return hidden * (FLOAT32 + setup.compute_bytes) + around_activation


def memory_by_phase(setup: TrainingSetup) -> dict[str, Parts]:
    """The parts of each phase that can be the peak of one device.

    Gradients are float32. DDP has one per parameter, inside its buckets, which are never freed. FSDP2 has shards, also
    between micro-batches. It gathers the parameters of two layers, the one that computes and the next, and keeps those
    outside the layers until the end of the step. The whole gradients of a layer are in the compute dtype like its
    parameters, and are copied to a float32 buffer that is reduced. With an adapter only its parameters have gradients.
    """
    config, is_whole = setup.config, setup.adapter is None
    adapter_layer = adapter_layer_parameters(setup)
    weights = all_parameters(setup) * FLOAT32 / setup.shards
    all_gradients = trained_parameters(setup) * FLOAT32 / setup.shards
    ddp_buckets = all_gradients if setup.is_ddp else 0.0
    accumulated = all_gradients if setup.accumulation > 1 else ddp_buckets  # gradients of the micro-batches before
    activations, working = activation_bytes(setup), backward_bytes(setup)
    recomputed = layer_activation_bytes(setup) - kept_layer_activation_bytes(setup)  # of the layer at work
    converted = low_precision_weight_bytes(setup)
    if not is_whole and setup.is_autocast and setup.gradient_checkpointing != "no":  # of the layer at work
        recomputed += (layer_matrix_parameters(config) + adapter_layer) * setup.compute_bytes
    layer, non_layer = layer_parameters(config) + adapter_layer, non_layer_parameters(config)
    # the parameters with a gradient: of the head, of a layer, and of what is outside the layers
    head = config.vocab_size * config.hidden_size if is_whole else 0
    layer_gradients, non_layer_gradients = (layer, non_layer) if is_whole else (adapter_layer, 0)
    # bytes per number of whole parameters and gradients, and of the buffer in which gradients are summed
    whole, summed = (setup.compute_bytes, FLOAT32) if setup.sharded else (0, 0)
    gathered = (non_layer + 2 * layer) * whole
    # the head's gradient stays until the end: whole with FSDP2, otherwise in its place
    head_gradient = 0.0 if setup.sharded else max(0.0, head * FLOAT32 - accumulated)
    # autocast's gradient of a matrix, before and after its conversion to float32
    matrix = max(rows * columns for rows, columns in layer_matrices(config)) if is_whole else 0
    working += matrix * (setup.compute_bytes + FLOAT32) if setup.is_autocast else 0.0
    # a tied table has two gradients at the end: one as the head, one as the embedding
    tied_table = head * (whole or FLOAT32) if config.tie_word_embeddings else 0.0

    always: Parts = {
        "process": setup.process_bytes,
        "weights": weights,
        "optimizer state": optimizer_bytes(setup) / setup.shards,
    }
    if setup.device == "cuda":
        always |= {
            "CUDA context": CUDA_CONTEXT_BYTES,
            "cuBLAS workspaces": CUBLAS_WORKSPACE_BYTES,
            "NCCL buffers": NCCL_BYTES if setup.devices > 1 else 0.0,
        }
    forward: Parts = {
        "gradients": accumulated,
        "activations": activations,
        "weights in low precision": converted,
        "gathered by FSDP2": gathered,
    }
    last_layer: Parts = forward | {
        "activations": activations + recomputed,
        "gradients": accumulated + head_gradient,
        "working memory": working,
        "whole gradients of FSDP2": (head + layer_gradients) * whole,
    }
    phases: dict[str, Parts] = {
        "forward": forward | {"logits and loss": loss_bytes(setup, "forward")},
        "loss": forward
        | {"logits and loss": loss_bytes(setup, "backward"), "working memory": head * setup.compute_bytes},
        "layers": last_layer,
        # the backward pass has all gradients except this layer's, and needs only this layer's activations
        "first layer": {
            "gradients": ddp_buckets or all_gradients - (0.0 if setup.sharded else layer_gradients * FLOAT32),
            "activations": layer_activation_bytes(setup),
            "weights in low precision": converted / config.num_hidden_layers,
            "working memory": working,
            "gathered by FSDP2": gathered - layer * whole,
            "whole gradients of FSDP2": (head + layer_gradients) * whole + layer_gradients * summed,
        },
        "end of backward": {
            "gradients": all_gradients,
            "working memory": tied_table,
            "gathered by FSDP2": non_layer * whole,
            "whole gradients of FSDP2": non_layer_gradients * (whole + summed),
        },
        "update": {"gradients": all_gradients, "working memory": update_bytes(setup)},
        "evaluation": {
            "gradients": ddp_buckets,
            "gathered by FSDP2": gathered,
            "logits and loss": loss_bytes(setup, "evaluation"),
        },
    }
    if setup.sharded and config.num_hidden_layers > 1:
        # one layer later: its activations are gone, and its gradients are being reduced
        phases["second layer from the end"] = last_layer | {
            "activations": activations + recomputed - kept_layer_activation_bytes(setup),
            "gradients": accumulated or layer_gradients * FLOAT32 / setup.shards,
            "whole gradients of FSDP2": (head + layer_gradients) * whole + layer_gradients * summed,
        }
    if setup.is_ddp and setup.device == "cuda":  # on a CPU this is part of what malloc keeps
        # after the first step DDP knows the order of the gradients, and allocates its buckets again
        phases["buckets"] = {"gradients": 2 * ddp_buckets}
    return {
        name: always | parts | _overhead(setup, all_gradients + ddp_buckets, parts) for name, parts in phases.items()
    }


def _overhead(setup: TrainingSetup, gradients: float, parts: Parts) -> Parts:
    """What the allocator keeps beyond the tensors."""
    if setup.device == "cpu":  # room for all gradients; DDP allocates its buckets again after the first step
        return {"kept by malloc": gradients + MALLOC_OVERHEAD * activation_bytes(setup)}
    lasting = parts["gradients"] if setup.is_ddp else 0.0
    return {"fragmentation": FRAGMENTATION * (sum(parts.values()) - lasting)}


def tensor_bytes(parts: Parts) -> float:
    """The part of a phase that PyTorch's allocator counts as allocated (`torch.cuda.max_memory_allocated`)."""
    return sum(size for name, size in parts.items() if name not in BEYOND_TENSORS)


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


def largest_that_fits(setup: TrainingSetup, memory_bytes: float) -> TrainingSetup | None:
    """The setup with the same global batch and the largest micro-batch that needs at most `memory_bytes`, if any."""
    return next((same for same in setups_of_same_batch(setup) if peak_bytes(same) <= memory_bytes), None)


def variants(setups: Sequence[TrainingSetup]) -> list[TrainingSetup]:
    """Each of the setups with each kind of activation checkpointing."""
    return [
        replace(setup, gradient_checkpointing=checkpointing)
        for setup in setups
        for checkpointing in ("no", "selective", "full")
    ]


def too_little_memory(setups: Sequence[TrainingSetup], memory_bytes: float) -> str:
    """A message that names the smallest need of `setups` with any micro-batch, and how to get below it."""
    smallest = min((same for setup in setups for same in setups_of_same_batch(setup)), key=peak_bytes)
    options = ["per_device_train_batch_size=1", f"gradient_checkpointing={smallest.gradient_checkpointing}"]
    options += ["fsdp" if smallest.replicas == 1 else "hsdp"] if smallest.sharded else []
    advice = "a smaller model or block_size" + (" or more --devices" if smallest.device == "cuda" else "")
    return (
        f"memory={memory_bytes / 2**30:.2f} GiB is too little: even with {', '.join(options)} this run needs "
        f"{peak_bytes(smallest) / 2**30:.2f} GiB; try {advice}"
    )


def _norm_statistics_bytes(setup: TrainingSetup) -> float:
    """Mean and deviation per token; a CPU keeps them in the dtype of the norm's weights."""
    return 2 * setup.tokens * (setup.hidden_bytes if setup.device == "cpu" else FLOAT32)


def _widths(setup: TrainingSetup) -> tuple[int, int]:
    """N · C and N · I."""
    return setup.tokens * setup.config.hidden_size, setup.tokens * _intermediate_size(setup.config)


def _intermediate_size(config: MiniGPTConfig) -> int:
    assert config.intermediate_size is not None  # the config replaces None by its default
    return config.intermediate_size


def _dropout_mask_bytes(setup: TrainingSetup, value_bytes: int) -> int:
    """Bytes per element of a dropout mask: in the values' dtype on a CPU, boolean on a GPU."""
    return value_bytes if setup.device == "cpu" else 1
