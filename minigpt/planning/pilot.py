"""What the fitted law must know of a text: tiny models are trained on a sample of it for some seconds."""

from collections.abc import Sequence

import numpy as np
import torch

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import Arguments
from minigpt.modeling.loss import in_place_cross_entropy
from minigpt.optim.lr_schedule import build_schedule, learning_rate_at, set_learning_rate
from minigpt.optim.optimizer import build_optimizer
from minigpt.planning.recipe import RECIPE, learning_rates
from minigpt.planning.scaling_law import LAW, ModelSize, Observation, TextNumbers, fit_texts
from minigpt.planning.text_profile import TokenizedSample, bpe_samples
from modeling_minigpt import MiniGPTForCausalLM

VOCABULARY_SIZES = (512, 2048, 8192)
HIDDEN_SIZE, LAYERS, HEADS, BLOCK_SIZE, BATCH_SIZE = 64, 2, 2, 128, 16
STEPS, SHORT_STEPS = 240, 60
SEED = 1337
TEXT = "text"  # the only one


def measure_text(args: Arguments, device: torch.device, known: Sequence[TokenizedSample] = ()) -> TextNumbers:
    """The numbers of the text that `args` name.

    Whatever its tokenizer is, the pilots have vocabularies of their own: three, since texts differ in what they gain
    from a larger one, and the two smaller ones for two lengths, which shows the slope.
    known: samples of the text, which need not be tokenized again if they have these vocabularies.
    Raises UserError on bad input.
    """
    samples = [sample for sample in known if sample.vocabulary.size in VOCABULARY_SIZES]
    if len(samples) < len(VOCABULARY_SIZES):
        samples = bpe_samples(args, VOCABULARY_SIZES)
    runs = [_pilot(sample, device, STEPS) for sample in samples]
    return fit_texts([*runs, *(_pilot(sample, device, SHORT_STEPS) for sample in samples[:2])], LAW).texts[TEXT]


def _pilot(sample: TokenizedSample, device: torch.device, steps: int) -> Observation:
    size = sample.vocabulary.size
    epochs = steps * BATCH_SIZE * BLOCK_SIZE / len(sample.train)
    model = ModelSize.of(HIDDEN_SIZE, LAYERS, size)
    loss = pilot_bits_per_byte(sample, device, steps)
    return Observation(TEXT, size, model, epochs * sample.train_bytes, epochs, loss)


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
