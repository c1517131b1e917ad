"""What the fitted law must know of a text: tiny models are trained on a sample of it for some seconds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import Arguments
from minigpt.modeling.loss import in_place_cross_entropy
from minigpt.optim.lr_schedule import build_schedule, learning_rate_at, set_learning_rate
from minigpt.optim.optimizer import build_optimizer
from minigpt.planning.recipe import RECIPE, learning_rates
from minigpt.planning.scaling_law import LAW, ModelSize, Observation, fit_texts
from minigpt.planning.text_profile import TokenizedSample, bpe_samples
from modeling_minigpt import MiniGPTForCausalLM

VOCABULARY_SIZES, SLOPE_SIZES = (512, 2048, 8192), (512, 2048)
HIDDEN_SIZE, LAYERS, HEADS, BLOCK_SIZE, BATCH_SIZE = 64, 2, 2, 128, 16
STEPS, SHORT_STEPS = 240, 60
SEED = 1337
TEXT = "text"  # the only one


@dataclass(frozen=True)
class TextNumbers:
    """What the fitted law must know of a text: its difficulty with each of some tokenizers, and its slope."""

    difficulties: Sequence[float]
    slope: float


def measure_text(samples: Sequence[TokenizedSample], device: torch.device, slope: float | None = None) -> TextNumbers:
    """The numbers of a text, with the tokenizers of the samples of its profile.

    What a text gains from a larger vocabulary differs from text to text, so there are three pilots. Between and beyond
    their vocabularies, the logarithm of the difficulty is that of a parabola over the logarithm of the size.
    slope: None measures it with short pilots besides these, in the two smallest vocabularies.
    """
    sizes = [sample.vocabulary.size for sample in samples]
    pilots = sorted({min(sizes, key=lambda size: abs(math.log(size / wanted))) for wanted in VOCABULARY_SIZES})
    chosen = [samples[sizes.index(size)] for size in pilots]
    runs = [_pilot(sample, device, STEPS) for sample in chosen]
    if slope is None:
        slope = _slope([*runs, *(_pilot(sample, device, SHORT_STEPS) for sample in chosen[:2])])
    logs = [math.log(run.loss / LAW.relative_loss(run.size, run.tokens, run.epochs, slope)) for run in runs]
    curve = np.polynomial.Polynomial.fit(np.log(pilots), logs, deg=len(pilots) - 1)
    return TextNumbers([math.exp(curve(math.log(size))) for size in sizes], slope)


def measure_slope(args: Arguments, device: torch.device) -> float:
    """The slope of a text, whatever its tokenizer: pilots of two lengths with small vocabularies show it best.

    Raises UserError on bad input.
    """
    samples = bpe_samples(args, SLOPE_SIZES)
    return _slope([_pilot(sample, device, steps) for sample in samples for steps in (STEPS, SHORT_STEPS)])


def _slope(runs: Sequence[Observation]) -> float:
    return fit_texts(runs, LAW).slope[TEXT]


def _pilot(sample: TokenizedSample, device: torch.device, steps: int) -> Observation:
    size, tokens = sample.vocabulary.size, steps * BATCH_SIZE * BLOCK_SIZE
    model = ModelSize.of(HIDDEN_SIZE, LAYERS, size)
    loss = pilot_bits_per_byte(sample, device, steps)
    return Observation(TEXT, size, model, tokens, tokens / len(sample.train), loss)


def pilot_bits_per_byte(sample: TokenizedSample, device: torch.device, steps: int) -> float:
    """Bits per byte of the validation sample after so many steps of training."""
    args = Arguments(corpus="python-docs", max_steps=steps)  # any text will do: the options of the recipe are used
    args = args.with_values(**RECIPE, **learning_rates(HIDDEN_SIZE))
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        config = MiniGPTConfig(
            vocab_size=sample.vocabulary.size, hidden_size=HIDDEN_SIZE, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, max_position_embeddings=BLOCK_SIZE, embd_pdrop=0.0, attn_pdrop=0.0,
            resid_pdrop=0.0,
        )  # fmt: skip
        model = MiniGPTForCausalLM(config).train()
    model.to(device)
    model.loss_function = in_place_cross_entropy
    optimizer, schedule = build_optimizer(model, args, device), build_schedule(args, steps, processes=1)
    inputs, targets = _blocks(sample.train)
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate_at(step, schedule))
        rows = torch.randint(len(inputs), (BATCH_SIZE,), generator=generator)
        loss = _summed_loss(model, inputs[rows].to(device), targets[rows].to(device)) / (BATCH_SIZE * BLOCK_SIZE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    inputs, targets = _blocks(sample.validation)
    model.eval()
    with torch.inference_mode():
        batches = zip(inputs.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True)
        nats = sum(float(_summed_loss(model, batch.to(device), target.to(device))) for batch, target in batches)
    bytes_of_targets = targets.numel() / len(sample.validation) * sample.validation_bytes
    return nats / float(np.log(2)) / bytes_of_targets


def _blocks(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [blocks, BLOCK_SIZE]; a short text is repeated until it fills one block."""
    ids = np.resize(ids, max(len(ids), BLOCK_SIZE + 1))
    count = (len(ids) - 1) // BLOCK_SIZE
    length = count * BLOCK_SIZE
    return (
        torch.from_numpy(ids[:length]).view(count, BLOCK_SIZE),
        torch.from_numpy(ids[1 : length + 1]).view(count, BLOCK_SIZE),
    )


def _summed_loss(model: MiniGPTForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed loss in nats."""
    return model(inputs, shift_labels=targets, num_items_in_batch=1, use_cache=False, skip_logits=True).loss
