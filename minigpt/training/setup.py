"""Build the model of a run and check that its options fit together."""

from pathlib import Path
from typing import Any

import torch

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import Arguments
from minigpt.data.tokenizer import vocabulary_size
from minigpt.generation.sampling import prompt_ids
from minigpt.modeling.activation_checkpointing import enable_activation_checkpointing
from minigpt.modeling.loss import in_place_cross_entropy
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM


def build_model(args: Arguments, tokenizer: Any, resume_from: Path | None) -> MiniGPTForCausalLM:
    """The model of a checkpoint, of `model_name_or_path`, or a new one of the asked shape; float32, on the CPU.

    Raises UserError where shape, tokenizer and block_size do not go together.
    """
    options: dict[str, Any] = {"attn_implementation": args.attn_implementation}
    if args.dropout is not None:
        options |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), args.dropout)
    source = resume_from or args.model_name_or_path
    if source is None:
        config = build_config(args, tokenizer, **options)
        model = MiniGPTForCausalLM(config)
    else:
        model = MiniGPTForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        config = model.config
        if resume_from is None and args.pad_vocab_size_to_multiple_of is not None:
            model.resize_token_embeddings(pad_to_multiple_of=args.pad_vocab_size_to_multiple_of)
    if resume_from is not None:
        _check_shape(args, config, resume_from)
    name = str(source or "the new model")
    if args.block_size > config.max_position_embeddings:
        raise UserError(
            f"block_size={args.block_size} is longer than the position table of {name}; "
            f"try its max_position_embeddings, block_size={config.max_position_embeddings}"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} ids but {name} has vocab_size={config.vocab_size}; "
            "use the model's own tokenizer or a larger vocab_size"
        )
    enable_activation_checkpointing(model, args.gradient_checkpointing)
    for prompt in args.sample_prompts:
        prompt_ids(model, tokenizer, prompt)  # a prompt that cannot be continued is refused before the training
    model.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    # no text has the ids beyond the tokenizer's, so nothing is learned of them: whoever generates must pass them over
    model.generation_config.suppress_tokens = list(range(vocabulary_size(tokenizer), config.vocab_size)) or None
    model.loss_function = in_place_cross_entropy
    return model


def build_config(args: Arguments, tokenizer: Any, **options: Any) -> MiniGPTConfig:
    """The configuration of a model from scratch."""
    multiple = args.pad_vocab_size_to_multiple_of or 1
    rows = -(-len(tokenizer) // multiple) * multiple
    shape = {"vocab_size": rows, "max_position_embeddings": args.block_size} | args.shape
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return MiniGPTConfig(**(no_dropout | shape | ids | options))


def _check_shape(args: Arguments, config: MiniGPTConfig, folder: Path) -> None:
    for name, value in args.shape.items():
        if getattr(config, name) != value:
            raise UserError(
                f"resume_from_checkpoint={folder} is another model: its {name} is {getattr(config, name)}, not {value}"
            )
    multiple = args.pad_vocab_size_to_multiple_of
    if multiple is not None and config.vocab_size % multiple:
        raise UserError(
            f"resume_from_checkpoint={folder} is another model: its vocab_size={config.vocab_size} is no multiple of "
            f"pad_vocab_size_to_multiple_of={multiple}"
        )
