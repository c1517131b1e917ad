"""What does the run start from? Data, tokenizer and model as the options name them, checked against each other."""

import shutil
from pathlib import Path
from typing import Any

import torch

from configuration_minigpt import MiniGPTConfig
from minigpt.arguments import Arguments
from minigpt.checkpoint import ARGUMENTS_FILE, SMALL_FILES_BYTES
from minigpt.checkpoint_files import find_checkpoints, lack_of_room
from minigpt.evaluation import Evaluation
from minigpt.feed import Feed
from minigpt.hellaswag import HellaSwagEvaluation
from minigpt.lean_loss import lean_loss
from minigpt.mixing import joined
from minigpt.prepare import prepared_folder
from minigpt.recompute import recompute_activations
from minigpt.sampling import prompt_ids
from minigpt.schedule import Schedule
from minigpt.shards import TokenShards, open_shards
from minigpt.tokenization import load_tokenizer, tokenizer_hash, vocabulary_size
from minigpt.tracking import METRICS_FILE
from modeling_minigpt import MiniGPTForCausalLM


def check_output_dir(args: Arguments) -> None:
    """Raises ValueError when output_dir holds something that this run would mix with."""
    folder = args.run_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder} is a file; give a folder")
    if not folder.exists() or not any(folder.iterdir()) or args.resume_from_checkpoint:
        return
    is_run = (folder / ARGUMENTS_FILE).is_file() or (folder / METRICS_FILE).is_file() or find_checkpoints(folder)
    if not is_run:
        raise ValueError(f"output_dir={folder} is in use and holds no run of MiniGPT; give another folder")
    if not args.overwrite_output_dir:
        raise ValueError(
            f"output_dir={folder} holds a run already; go on with --resume_from_checkpoint latest, "
            "delete it with --overwrite_output_dir, or give another folder"
        )


def clear_output_dir(args: Arguments) -> None:
    """Make output_dir ready: empty when `overwrite_output_dir` says so, and with this run's options in it."""
    if args.overwrite_output_dir:
        shutil.rmtree(args.run_dir, ignore_errors=True)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    (args.run_dir / ARGUMENTS_FILE).write_text(args.as_yaml(), encoding="utf-8")


def check_room(args: Arguments, parameters: int) -> None:
    """Raises ValueError when the disk has no room for a checkpoint and the final model of `parameters` numbers."""
    folder = next(path for path in (args.run_dir.absolute(), *args.run_dir.absolute().parents) if path.is_dir())
    numbers = 4 * parameters  # float32: weights and at most two moments, then the weights once more
    if problem := lack_of_room(folder, 4 * numbers + 2 * SMALL_FILES_BYTES):
        raise ValueError(f"{problem} for one checkpoint and the final model; make room, or give another output_dir")


def load_data(args: Arguments) -> tuple[TokenShards, Any]:
    """The prepared shards and their tokenizer; raw text is prepared first, with the model's tokenizer if it has one.

    Raises ValueError when the shards were made with another tokenizer than the one asked for.
    """
    if args.data is None and args.tokenizer is None and args.model_name_or_path is not None:
        args = args.with_values(tokenizer=args.model_name_or_path)
    folders = [Path(name).expanduser() for name in args.data] if args.data else [prepared_folder(args)]
    shards = joined([open_shards(folder) for folder in folders], args.data_weights or [])
    wanted = args.tokenizer if args.data is not None and args.tokenizer not in ("bpe", "char") else None
    source = wanted or shards.tokenizer_dir or args.model_name_or_path
    if source is None:
        raise ValueError(f"data={folders[0]} has no tokenizer beside it; name the one that made it with --tokenizer")
    tokenizer = load_tokenizer(source)
    if shards.tokenizer_hash is not None and tokenizer_hash(tokenizer) != shards.tokenizer_hash:
        raise ValueError(f"data={folders[0]} was made with another tokenizer than {source}; prepare it again")
    _check_tokenizer_of_model(args, tokenizer)
    return shards, tokenizer


def _check_tokenizer_of_model(args: Arguments, tokenizer: Any) -> None:
    """Raises ValueError when a model that brings a tokenizer would be trained on the ids of another one."""
    try:
        own = args.model_name_or_path and load_tokenizer(args.model_name_or_path)
    except ValueError:  # weights alone: the number of ids is checked when the model is there
        return
    if own and tokenizer_hash(own) != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the text has the ids of another tokenizer than model_name_or_path={args.model_name_or_path}; "
            "prepare it with the model's own (leave --tokenizer out), or train from scratch"
        )


def build_model(args: Arguments, tokenizer: Any, resume_from: Path | None) -> MiniGPTForCausalLM:
    """The model of a checkpoint, of `model_name_or_path`, or a new one of the asked shape; float32, on the CPU.

    Raises ValueError where shape, tokenizer and block_size do not go together.
    """
    options: dict[str, Any] = {"attn_implementation": args.attn_implementation}
    if args.dropout is not None:
        options |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), args.dropout)
    source = resume_from or args.model_name_or_path
    if source is None:
        config = new_config(args, tokenizer, **options)
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
        raise ValueError(
            f"block_size={args.block_size} is longer than the position table of {name}; "
            f"try its max_position_embeddings, block_size={config.max_position_embeddings}"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids but {name} has vocab_size={config.vocab_size}; "
            "use the model's own tokenizer or a larger vocab_size"
        )
    recompute_activations(model, args.gradient_checkpointing)
    for prompt in args.sample_prompts:
        prompt_ids(model, tokenizer, prompt)  # a prompt that cannot be continued is refused before the training
    model.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    # no text has the ids beyond the tokenizer's, so nothing is learned of them: whoever generates must pass them over
    model.generation_config.suppress_tokens = list(range(vocabulary_size(tokenizer), config.vocab_size)) or None
    model.loss_function = lean_loss
    return model


def new_config(args: Arguments, tokenizer: Any, **options: Any) -> MiniGPTConfig:
    """The configuration of a model from scratch."""
    multiple = args.pad_vocab_size_to_multiple_of or 1
    rows = -(-len(tokenizer) // multiple) * multiple
    shape = {"vocab_size": rows, "max_position_embeddings": args.block_size} | args.shape
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return MiniGPTConfig(**(no_dropout | shape | ids | options))


def build_schedule(args: Arguments, max_steps: int, processes: int) -> Schedule:
    """The learning rates of the run, times the number of processes if `scale_learning_rate` says so."""
    scale = processes if args.scale_learning_rate else 1
    decays_late = args.lr_scheduler_type == "warmup_stable_decay"
    return Schedule(
        learning_rate=args.learning_rate * scale,
        min_learning_rate=args.min_learning_rate * scale,
        warmup_steps=args.warmup_steps,
        max_steps=max_steps,
        lr_scheduler_type=args.lr_scheduler_type,
        num_decay_steps=args.num_decay_steps or max(1, max_steps // 5) if decays_late else None,
    )


def check_ids(shards: TokenShards, vocab_size: int) -> None:
    """Raises ValueError when the shards hold an id that the model has no embedding for.

    Shards without a manifest (nanoGPT's) do not say how many ids there are: the first 16 million tokens are looked at.
    """
    highest = (shards.vocab_size or 0) - 1
    if shards.vocab_size is None:
        splits = [split for split in (shards.train, shards.validation) if split]
        highest = max(int(split.read(0, min(len(split), 1 << 24)).max()) for split in splits)
    if highest >= vocab_size:
        raise ValueError(
            f"{shards.folder} holds token id {highest} but the model has vocab_size={vocab_size}; "
            "give the tokenizer that the shards were made with, or a larger vocab_size"
        )


def _check_shape(args: Arguments, config: MiniGPTConfig, folder: Path) -> None:
    for name, value in args.shape.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"resume_from_checkpoint={folder} is another model: its {name} is {getattr(config, name)}, not {value}"
            )
    multiple = args.pad_vocab_size_to_multiple_of
    if multiple is not None and config.vocab_size % multiple:
        raise ValueError(
            f"resume_from_checkpoint={folder} is another model: its vocab_size={config.vocab_size} is no multiple of "
            f"pad_vocab_size_to_multiple_of={multiple}"
        )


def build_evaluations(
    args: Arguments, feed: Feed, tokenizer: Any, max_steps: int
) -> list[Evaluation | HellaSwagEvaluation]:
    """What is measured while the model trains. Raises ValueError when the items of HellaSwag cannot be read."""
    evaluations: list[Evaluation | HellaSwagEvaluation] = []
    if feed.validation:
        evaluations.append(Evaluation(feed.validation, args.eval_batch_size, args.eval_steps, max_steps))
    if args.hellaswag_steps is not None:
        evaluations.append(HellaSwagEvaluation(args, tokenizer, args.eval_batch_size, max_steps))
    return evaluations
