"""Laws of the forecast of memory, checked against the model, autograd and the optimizers themselves."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import OptimizerArguments
from minigpt.modeling.activation_checkpointing import enable_activation_checkpointing
from minigpt.modeling.loss import in_place_cross_entropy
from minigpt.optim.optimizer import build_optimizer
from minigpt.planning import memory
from minigpt.planning.memory import Setup
from modeling_minigpt import MiniGPTForCausalLM

TINY = {"vocab_size": 101, "max_position_embeddings": 32, "hidden_size": 48, "num_attention_heads": 3}
NO_DROPOUT = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)


def tiny_config(**options: object) -> MiniGPTConfig:
    return MiniGPTConfig(**(TINY | NO_DROPOUT | {"num_hidden_layers": 2} | options))


def saved_by_autograd(model: MiniGPTForCausalLM, setup: Setup) -> int:
    """Bytes of all storages that autograd keeps at the end of a forward pass, the parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, or an address could be given out twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    ids, labels = torch.randint(setup.config.vocab_size, (2, setup.micro_batch, setup.block_size)).unbind()
    labels = labels.clone()
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=setup.is_mixed, cache_enabled=False)
    halves = torch.arange(setup.block_size).remainder(setup.block_size // 2).expand_as(ids).clone()
    positions = {"position_ids": halves} if setup.document_attention else {}
    kwargs = {"num_items_in_batch": ids.numel(), "use_cache": False, "skip_logits": True}
    model.loss_function = in_place_cross_entropy
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        model(ids.clone(), shift_labels=labels, **positions, **kwargs)
    logits = ids.numel() * setup.config.vocab_size * setup.compute_bytes  # the loss keeps them by itself
    return logits + sum(storage.nbytes() for storage in storages.values())


SHAPES = [
    {},
    {"num_hidden_layers": 5, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 33},
    {"max_position_embeddings": 64, "tie_word_embeddings": False, "qkv_bias": False, "intermediate_size": 300},
]
DROPOUT = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}


@pytest.mark.parametrize("shape", SHAPES, ids=["tiny", "deep", "untied"])
@pytest.mark.parametrize("compute_bytes", [4, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [NO_DROPOUT, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("checkpointing", ["no", "full"])
def test_saved_bytes_are_those_that_autograd_keeps(
    shape: dict, compute_bytes: int, attention: str, dropout: dict, checkpointing: str
) -> None:
    config = tiny_config(**shape, **dropout)
    config._attn_implementation = attention
    setup = Setup(
        config=config,
        block_size=config.max_position_embeddings,
        micro_batch=3,
        compute_bytes=compute_bytes,
        attention=attention,
        gradient_checkpointing=checkpointing,
    )
    model = MiniGPTForCausalLM(config).train()
    enable_activation_checkpointing(model, checkpointing)
    copies = memory.low_precision_bytes(setup)
    predicted = memory.activation_bytes(setup) + copies + memory.loss_bytes(setup, "saved")
    # what is left out: positions, the divisor of the loss
    assert predicted == pytest.approx(saved_by_autograd(model, setup), abs=8 * setup.block_size + 64)


@pytest.mark.parametrize("compute_bytes", [4, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("attention", "dropout"), [("sdpa", NO_DROPOUT), ("sdpa", DROPOUT), ("eager", NO_DROPOUT)])
def test_documents_kept_apart_cost_a_mask_in_every_layer(compute_bytes: int, attention: str, dropout: dict) -> None:
    config = tiny_config(**dropout)
    config._attn_implementation = attention
    setup = Setup(
        config, block_size=32, micro_batch=3, compute_bytes=compute_bytes, attention=attention, document_attention=True
    )
    saved = saved_by_autograd(MiniGPTForCausalLM(config).train(), setup)
    copies = memory.low_precision_bytes(setup)
    assert memory.activation_bytes(setup) + copies + memory.loss_bytes(setup, "saved") == pytest.approx(saved, abs=64)


class Peaks:
    """What torch's allocator held at most in a training step, bytes, the model and its optimizer included."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.file = setup, folder / "trace.json"
        self.model = MiniGPTForCausalLM(setup.config).train()
        self.model.loss_function = in_place_cross_entropy
        enable_activation_checkpointing(self.model, setup.gradient_checkpointing)
        self.optimizer = build_optimizer(
            self.model, OptimizerArguments(optimizer=setup.optimizer), torch.device("cpu")
        )
        self.ids = torch.randint(setup.config.vocab_size, (setup.micro_batch, setup.block_size))

    def step(self) -> None:
        kwargs = {"num_items_in_batch": self.ids.numel(), "use_cache": False, "skip_logits": True}
        for _ in range(self.setup.accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.setup.is_mixed, cache_enabled=False):
                loss = self.model(self.ids, shift_labels=self.ids, **kwargs).loss
            loss.backward()
            del loss
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measured(self) -> float:
        self.step()  # makes the optimizer's state
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        profile.export_chrome_trace(str(self.file))
        events = json.loads(self.file.read_text())["traceEvents"]
        held = [(event["ts"], event["args"]["Total Allocated"]) for event in events if event.get("name") == "[memory]"]
        held.sort()
        config = self.setup.config
        between = 4 * memory.parameters(config) + memory.optimizer_bytes(config, self.setup.optimizer)
        return max(number for _, number in held) - held[-1][1] + between


WIDE_VOCABULARY = {"vocab_size": 8000, "hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 3}
NARROW_VOCABULARY = WIDE_VOCABULARY | {"vocab_size": 100}


@pytest.mark.parametrize("compute_bytes", [4, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (WIDE_VOCABULARY, {}),
        (WIDE_VOCABULARY, {"accumulation": 2}),
        (NARROW_VOCABULARY, {"accumulation": 2}),
        (NARROW_VOCABULARY, {"gradient_checkpointing": "selective"}),
        (NARROW_VOCABULARY, {"gradient_checkpointing": "full"}),
        (NARROW_VOCABULARY | {"max_position_embeddings": 16}, {"optimizer": "muon", "micro_batch": 1}),
    ],
    ids=["loss", "accumulation", "layers", "selective", "full", "muon"],
)
def test_forecast_is_the_peak_of_the_allocator(shape: dict, options: dict, compute_bytes: int, tmp_path: Path) -> None:
    config = tiny_config(**shape)
    setup = Setup(
        **({"config": config, "block_size": config.max_position_embeddings, "micro_batch": 8} | options),
        compute_bytes=compute_bytes,
    )
    predicted = max(sum(parts.values()) - parts["kept by malloc"] for parts in memory.moments(setup).values())
    assert predicted == pytest.approx(Peaks(setup, tmp_path).measured(), rel=0.08)


@pytest.mark.parametrize("shape", SHAPES, ids=["tiny", "deep", "untied"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_and_optimizer_are_the_bytes_of_real_ones(shape: dict, optimizer: str) -> None:
    config = tiny_config(**shape)
    model = MiniGPTForCausalLM(config)
    assert memory.parameters(config) == model.num_parameters()
    weights = memory.peak(Setup(config, block_size=8, micro_batch=1))[1]["weights"]
    assert weights == sum(parameter.nbytes for parameter in model.parameters())
    real = build_optimizer(model, OptimizerArguments(optimizer=optimizer), torch.device("cpu"))
    model(torch.zeros(1, 8, dtype=torch.long), labels=torch.zeros(1, 8, dtype=torch.long)).loss.backward()
    real.step()
    tensors = [value for state in real.state.values() for value in state.values()]
    assert memory.optimizer_bytes(config, optimizer) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("compute_bytes", [4, 2])
def test_activations_and_loss_grow_linearly_with_the_micro_batch(compute_bytes: int) -> None:
    setup = Setup(tiny_config(), block_size=32, micro_batch=1, compute_bytes=compute_bytes)

    def growing(micro_batch: int) -> float:
        of = replace(setup, micro_batch=micro_batch)
        return memory.activation_bytes(of) + memory.loss_bytes(of, "backward") + memory.backward_bytes(of)

    assert [growing(n) for n in (1, 2, 7)] == [growing(1) * n for n in (1, 2, 7)]


@pytest.mark.parametrize("memory_mib", [3, 5, 8, 16, 64])
@pytest.mark.parametrize("devices", [1, 4])
def test_proposal_is_the_largest_micro_batch_that_fits_and_keeps_the_global_batch(
    memory_mib: int, devices: int
) -> None:
    setup = Setup(tiny_config(), block_size=32, micro_batch=6, accumulation=10, devices=devices)
    best = memory.largest_that_fits(setup, memory_mib * 2**20)
    assert memory.peak_bytes(best) <= memory_mib * 2**20
    assert best.micro_batch * best.accumulation == 60
    larger = [n for n in (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60) if n > best.micro_batch]
    for micro_batch in larger:
        over = replace(setup, micro_batch=micro_batch, accumulation=60 // micro_batch)
        assert memory.peak_bytes(over) > memory_mib * 2**20


def test_a_model_that_fits_with_no_batch_says_the_smallest_need() -> None:
    setup = Setup(tiny_config(), block_size=32, micro_batch=2, accumulation=3, process_bytes=2**30)
    with pytest.raises(ValueError, match=r"even with per_device_train_batch_size=1 this run needs 1\.00 GiB"):
        memory.largest_that_fits(setup, 2**20)


@pytest.mark.parametrize("devices", [2, 8])
def test_fsdp2_divides_weights_gradients_and_optimizer_state(devices: int) -> None:
    whole = Setup(tiny_config(), block_size=32, micro_batch=1, device="cuda")
    alone, parts = memory.moments(whole), memory.moments(replace(whole, devices=devices, sharded=True))
    for moment, name in itertools.product(("update", "end of backward"), ("weights", "gradients", "optimizer state")):
        assert parts[moment][name] * devices == alone[moment][name]
    assert parts["loss"]["activations"] == alone["loss"]["activations"]


def test_data_parallel_keeps_its_gradients_from_step_to_step_and_no_copy_of_them() -> None:
    setup = Setup(tiny_config(), block_size=32, micro_batch=1, device="cuda")
    alone, parts = memory.moments(setup), memory.moments(replace(setup, devices=2))
    assert {moment["gradients"] for moment in parts.values()} == {memory.parameters(setup.config) * 4}
    assert sum(parts["update"].values()) == sum(alone["update"].values())
