"""Build the model of a run and check that its options fit together."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import Arguments
from minigpt.data.chat_template import end_of_turn_id, sample_prompts
from minigpt.data.tokenizer import load_tokenizer, vocabulary_size
from minigpt.generation.sampling import prompt_ids
from minigpt.modeling.activation_checkpointing import enable_activation_checkpointing
from minigpt.modeling.embeddings import grow_embeddings
from minigpt.modeling.initialization import scale_input_matrices
from minigpt.modeling.loading import find_model, load_model
from minigpt.modeling.lora import add_adapter, config_source, find_adapter, load_adapter_weights
from minigpt.modeling.loss import in_place_cross_entropy
from minigpt.utils.errors import UserError
from minigpt.utils.formatting import format_bytes
from minigpt.utils.hub_names import refuse_missing_folder
from minigpt.utils.resources import total_memory
from modeling_minigpt import MiniGPTForCausalLM

DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


def build_model(args: Arguments, tokenizer: PreTrainedTokenizerFast, resume_from: Path | None) -> MiniGPTForCausalLM:
    """The model of a checkpoint or of `model_name_or_path`, or a new one; in float32 on the CPU.

    Raises UserError if shape, tokenizer, block_size and sample prompts do not fit together.
    """
    if resume_from is None:
        config = build_config(
            args,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        if args.model_name_or_path is None:
            _check_memory(config)
            config._attn_implementation = args.attn_implementation
            model = MiniGPTForCausalLM(config)
            if args.initializer_gain is not None:
                scale_input_matrices(model, args.initializer_gain, config.initializer_range)
        else:
            model = _load(args.model_name_or_path, args)
            _fit_vocabulary(model, args, tokenizer, config.vocab_size)
    else:
        base = args.model_name_or_path if args.use_peft else None  # a checkpoint holds the adapter alone
        model = _load(base or resume_from, args)
        _check_shape(args, model.config, resume_from)
    if args.use_peft:
        _adapt(model, args, resume_from)
    config = model.config
    name = str(resume_from or args.model_name_or_path or "the new model")
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
    for prompt in sample_prompts(tokenizer, args.sample_prompts or [""]).values():
        prompt_ids(model, tokenizer, prompt)  # refuse a prompt that cannot be continued before training
    _complete_tokenizer(tokenizer, config.max_position_embeddings)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # text never contains the ids that only round the vocabulary up: they are untrained and must not be generated
    model.generation_config.suppress_tokens = list(range(vocabulary_size(tokenizer), config.vocab_size)) or None
    if (end_of_turn := end_of_turn_id(tokenizer)) is not None:
        model.generation_config.eos_token_id = list(dict.fromkeys([end_of_turn, tokenizer.eos_token_id]))
    model.loss_function = in_place_cross_entropy
    return model


def _fit_vocabulary(
    model: MiniGPTForCausalLM, args: Arguments, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> None:
    """Give a loaded model `vocab_size` ids, or as many as the tokenizer has that a chat template has added tokens to.

    Raises UserError if there are new tokens and only an adapter is trained.
    """
    known_ids = _known_ids(str(args.model_name_or_path))
    if known_ids is not None and vocabulary_size(tokenizer) > known_ids:
        if args.use_peft:
            raise UserError(
                f"the tokenizer has {vocabulary_size(tokenizer) - known_ids} tokens more than "
                f"model_name_or_path={args.model_name_or_path}, and LoRA does not train embeddings; use "
                "--chat_template plain, which needs no new token"
            )
        needed = _round_up(len(tokenizer), args.pad_vocab_size_to_multiple_of or 1)
        grow_embeddings(model, max(vocab_size, needed), known_ids)
    elif vocab_size != model.config.vocab_size:
        model.resize_token_embeddings(vocab_size)


def _known_ids(name_or_folder: str) -> int | None:
    """The number of token ids that the tokenizer of a model has; None if it has no tokenizer."""
    try:
        return vocabulary_size(load_tokenizer(name_or_folder))
    except UserError:
        return None


def _adapt(model: MiniGPTForCausalLM, args: Arguments, resume_from: Path | None) -> None:
    """Give the model a LoRA adapter, new or from a checkpoint. Raises UserError if it could not be published."""
    if args.push_to_hub and Path(model.name_or_path or "").is_dir():
        raise UserError(
            f"push_to_hub would publish an adapter of {model.name_or_path}, which only this machine has; give a "
            "name on the Hub as model_name_or_path, or train without it and publish what minigpt merge writes"
        )
    add_adapter(model, args)
    if resume_from is not None:
        load_adapter_weights(model, resume_from)


def _check_memory(config: MiniGPTConfig) -> None:
    """Raises UserError if the float32 weights of a new model alone take more memory than this process may use."""
    needed, memory = 4 * config.matrix_weights, total_memory()
    if needed > memory:
        raise UserError(
            f"hidden_size={config.hidden_size}, num_hidden_layers={config.num_hidden_layers}, "
            f"vocab_size={config.vocab_size}, block_size or max_position_embeddings={config.max_position_embeddings}: "
            f"the weights take {format_bytes(needed)}, and {format_bytes(memory)} of memory can be used; "
            "give smaller sizes"
        )


def _complete_tokenizer(tokenizer: PreTrainedTokenizerFast, context: int) -> None:
    """Give the tokenizer that is saved with the model its context, for truncation, and a token for padding.

    Neither changes the ids of a text. A tokenizer without a token for padding gets its end of text, as is usual for
    GPT-2.
    """
    tokenizer.model_max_length = context
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def build_config(
    args: Arguments, *, vocab_size: int, bos_token_id: int | None = None, eos_token_id: int | None = None
) -> MiniGPTConfig:
    """The configuration of the model that `args` describe.

    It is that of `model_name_or_path`, or a new one for a tokenizer of `vocab_size` ids.

    Raises UserError if the shape is impossible, or the model cannot be found.
    """
    dropout = _dropout_fields(args)
    multiple = args.pad_vocab_size_to_multiple_of or 1
    if args.model_name_or_path is not None:
        refuse_missing_folder("model_name_or_path", args.model_name_or_path)
    try:
        if args.model_name_or_path is not None:
            config = MiniGPTConfig.from_pretrained(config_source(args.model_name_or_path), **dropout)
            assert isinstance(config, MiniGPTConfig)
            config.vocab_size = _round_up(config.vocab_size, multiple)
            return config
        shape = {"vocab_size": _round_up(vocab_size, multiple), "max_position_embeddings": args.block_size}
        no_dropout = dict.fromkeys(DROPOUTS, 0.0)
        ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        return MiniGPTConfig(**(no_dropout | shape | args.shape | ids | dropout))
    except OSError as error:
        message = " ".join(str(error).split())
        raise UserError(f"model_name_or_path={args.model_name_or_path}: {message}") from error
    except ValueError as error:
        place = f"model_name_or_path={args.model_name_or_path}: " if args.model_name_or_path else ""
        raise UserError(f"{place}{error}") from error


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _load(name_or_folder: str | Path, args: Arguments) -> MiniGPTForCausalLM:
    """A MiniGPT in float32 with the dropout and attention kernel of `args`; a UserError for any other model."""
    if args.use_peft:
        name_or_folder = find_model(name_or_folder)
        if find_adapter(name_or_folder) is not None:
            raise UserError(f"model_name_or_path={name_or_folder} is an adapter itself; merge it first: minigpt merge")
    model = load_model(
        name_or_folder,
        dtype=torch.float32,
        device="cpu",
        attn_implementation=args.attn_implementation,
        **_dropout_fields(args),
    )
    if not isinstance(model, MiniGPTForCausalLM):
        raise UserError(f"{name_or_folder} is a {type(model).__name__}; only a MiniGPT or GPT-2 can be trained")
    return model


def _dropout_fields(args: Arguments) -> dict[str, Any]:
    return {} if args.dropout is None else dict.fromkeys(DROPOUTS, args.dropout)


def _check_shape(args: Arguments, config: MiniGPTConfig, folder: Path) -> None:
    for name, value in args.shape.items():
        if getattr(config, name) != value:
            raise UserError(
                f"resume_from_checkpoint={folder} is another model: its {name} is {getattr(config, name)}, not {value}"
            )
    multiple = args.pad_vocab_size_to_multiple_of
    if multiple is not None and config.vocab_size % multiple:
        raise UserError(
            f"resume_from_checkpoint={folder} is another model: its vocab_size={config.vocab_size} is not a multiple "
            f"of pad_vocab_size_to_multiple_of={multiple}"
        )
