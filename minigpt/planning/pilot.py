"""How hard a text is: a tiny model is trained on a sample of it for some seconds."""

from collections.abc import Sequence

import numpy as np
import torch

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import Arguments
from minigpt.modeling.loss import in_place_cross_entropy
from minigpt.optim.lr_schedule import build_schedule, learning_rate_at, set_learning_rate
from minigpt.optim.optimizer import build_optimizer
from minigpt.planning.scaling_law import LAW
from minigpt.planning.text_profile import TokenizedSample
from modeling_minigpt import MiniGPTForCausalLM

LARGEST_VOCABULARY = 4096  # a small one makes a fast model; with 2,048 less of the text is learned than in longer runs
HIDDEN_SIZE, LAYERS, HEADS, BLOCK_SIZE, BATCH_SIZE, STEPS = 64, 2, 2, 128, 16, 120
SEED = 1337


def measure_difficulty(args: Arguments, samples: Sequence[TokenizedSample], device: torch.device) -> float:
    """The difficulty of a text in the fitted law: the loss of the pilot over what the law says for difficulty 1.

    `args` have the recipe; `samples` are those of a profile.
    """
    small = [sample for sample in samples if sample.vocabulary.size <= LARGEST_VOCABULARY]
    sample = small[-1] if small else samples[0]
    bits = pilot_bits_per_byte(args, sample, device)
    tokens = STEPS * BATCH_SIZE * BLOCK_SIZE
    layer_parameters = 12 * LAYERS * HIDDEN_SIZE**2
    expected = LAW.relative_loss(sample.vocabulary.unigram_bits, layer_parameters, tokens, tokens / len(sample.train))
    return bits / expected


def pilot_bits_per_byte(args: Arguments, sample: TokenizedSample, device: torch.device) -> float:
    """Bits per byte of the validation sample after the pilot's training."""
    args = args.with_values(max_steps=STEPS, train_minutes=0.0, scale_learning_rate=False)
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
    optimizer, schedule = build_optimizer(model, args, device), build_schedule(args, STEPS, processes=1)
    inputs, targets = _blocks(sample.train)
    for step in range(STEPS):
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
