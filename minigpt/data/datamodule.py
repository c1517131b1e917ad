"""The data of a run: tokenizer and shards, training samples in their order, validation samples."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from minigpt.config.arguments import Arguments, BatchArguments
from minigpt.data.mixing import MixedOrder, join_shards
from minigpt.data.packing import PackedDocuments, kept_packing, pack
from minigpt.data.prepare import cache_folder, prepared_folder
from minigpt.data.samplers import BlockOrder, EvaluationBatchSampler, Order, ShuffledOrder, TrainBatchSampler
from minigpt.data.samples import Batch, Samples, TokenBlocks
from minigpt.data.shards import Tokens, TokenShards, open_shards
from minigpt.data.tokenizer import load_tokenizer, tokenizer_hash, vocabulary_size
from minigpt.utils.errors import UserError
from minigpt.utils.hub_names import refuse_missing_folder
from minigpt.utils.once_per_host import once_per_host

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STEPS_OF_A_TIME = 1_000_000
LONG_TEXT = 100_000_000  # tokens from which on the packing is kept: it takes seconds, and gigabytes for the largest


@dataclass(frozen=True)
class DataModule:
    """The training samples, their order, and the validation samples (None if there is no validation split)."""

    train: Samples
    order: Order
    validation: Samples | None

    def packing_summary(self) -> dict[str, int | str]:
        """How documents fill the rows, for the record of the run; empty if the samples are not packed."""
        if not isinstance(self.train, PackedDocuments):
            return {}
        return {
            "strategy": self.train.strategy,
            "block_size": self.train.block_size,
            "documents": self.train.documents,
            "cut": self.train.documents_cut,
            "rows": len(self.train.packing.row_targets),
        }

    def batches(self, args: BatchArguments, start: int, rank: int, processes: int) -> Iterator[Batch]:
        """The micro-batches of one process from position `start` of the run on, without end."""
        sampler = TrainBatchSampler(self.order, start, args.per_device_train_batch_size, rank, processes)
        return iter(loader(self.train, sampler, args.dataloader_num_workers))

    def target_count(self, start: int, samples: int) -> int:
        """Number of targets in the loss at positions [start, start + samples) of the run, over all processes.

        It follows from the order and the lengths of the documents, so processes need no communication for it.
        """
        if self.train.targets_per_sample is not None:
            return samples * self.train.targets_per_sample
        return self.train.target_count(self.sample_ids(start, samples))

    def sample_ids(self, start: int, samples: int) -> list[int]:
        """The sample ids at positions [start, start + samples) of the run."""
        return [self.order[position] for position in range(start, start + samples)]


def open_data_module(
    args: BatchArguments, shards: TokenShards, end_of_text: int, cache: Path | None = None
) -> DataModule:
    """Divide the tokens of `shards` into samples as `args` describe; `end_of_text` is the id that ends a document.

    cache: a folder that keeps how the documents of a long text are packed.

    Raises UserError if there are too few tokens for one sample.
    """
    source_tokens = shards.source_tokens or (len(shards.train),)
    identity = f"{shards.fingerprint} {args.packing_strategy} {args.block_size} {end_of_text} {source_tokens}"
    folder = cache and cache / f"packing-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
    train = _samples(args, shards.train, end_of_text, source_tokens, folder and folder / "train")
    validation = None
    if shards.validation:
        validation = _samples(args, shards.validation, end_of_text, None, folder and folder / "validation")
    orders: list[Order]
    if isinstance(train, PackedDocuments):
        rows_of_sources = train.packing.source_rows.tolist()
        first_ids = accumulate(rows_of_sources, initial=0)
        orders = [
            ShuffledOrder(rows, args.seed, first_id, source)
            for source, (rows, first_id) in enumerate(zip(rows_of_sources, first_ids, strict=False))
        ]
    else:
        first_ids = accumulate(source_tokens, initial=0)
        orders = [
            BlockOrder(tokens, args.block_size, args.seed, args.stride, first_id, source)
            for source, (tokens, first_id) in enumerate(zip(source_tokens, first_ids, strict=False))
        ]
    order = orders[0] if len(orders) == 1 else MixedOrder(orders, shards.weights)
    return DataModule(train, order, validation)


def _samples(
    args: BatchArguments,
    tokens: Tokens,
    end_of_text: int,
    source_tokens: Sequence[int] | None,
    kept_in: Path | None,
) -> TokenBlocks | PackedDocuments:
    strategy = args.packing_strategy
    if strategy == "wrapped":
        return TokenBlocks(tokens, args.block_size, end_of_text if args.document_attention else None)
    compute = partial(pack, tokens, args.block_size, end_of_text, strategy, source_tokens)
    packing = kept_packing(kept_in, compute) if kept_in and len(tokens) >= LONG_TEXT else compute()
    return PackedDocuments(tokens, args.block_size, strategy, packing)


def loader(
    samples: Samples, sampler: TrainBatchSampler | EvaluationBatchSampler, workers: int = 0
) -> DataLoader[Batch]:
    """PyTorch's loader for the batches that `sampler` yields, in pinned memory if there is a CUDA device."""
    return DataLoader(
        samples,
        batch_sampler=sampler,
        collate_fn=_identity,  # type: ignore[arg-type]  # a batch from __getitems__, not a list of samples
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def _identity(batch: Batch) -> Batch:
    return batch


def samples_per_step(args: BatchArguments, processes: int) -> int:
    """The global batch size in samples."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes


def steps_of_run(args: BatchArguments, samples_per_epoch: int, processes: int) -> int:
    """The number of steps of the whole run: `max_steps`, or what `num_train_epochs` epochs take, rounded.

    With `train_minutes` it is not known yet, and any number of steps stands for the whole time.
    """
    if args.train_minutes:
        return STEPS_OF_A_TIME
    if args.max_steps is not None:
        return args.max_steps
    return max(1, round(args.num_train_epochs * samples_per_epoch / samples_per_step(args, processes)))


def prepare_data(args: Arguments) -> list[Path]:
    """The folders of the shards. Raw text is prepared first, with the model's tokenizer if it has one.

    Of the processes of a launch, one per host prepares the text while the others wait. To be called before they form
    a process group, which does not wait long enough. Raises UserError on bad input.
    """
    if args.model_name_or_path is not None:
        refuse_missing_folder("model_name_or_path", args.model_name_or_path)
    if args.data:
        return [Path(name).expanduser() for name in args.data]
    if args.tokenizer is None and args.model_name_or_path is not None:
        args = args.with_values(tokenizer=args.model_name_or_path)
    template = default_chat_template(args)
    return [Path(once_per_host(cache_folder(args), repr(args), lambda: str(prepared_folder(args, template))))]


def default_chat_template(args: Arguments) -> str:
    """The chat template for conversations if none is given: LoRA does not train the embeddings of new tokens."""
    return "plain" if args.use_peft else "chatml"


def load_data(args: Arguments, folders: list[Path] | None = None) -> "tuple[TokenShards, PreTrainedTokenizerFast]":
    """The shards in `folders` and their tokenizer. Without `folders`, those of `prepare_data`.

    Raises UserError if shards, tokenizer and model do not belong together, and on bad input.
    """
    folders = folders or prepare_data(args)
    shards = join_shards([open_shards(folder) for folder in folders], args.data_weights or [])
    requested = args.tokenizer if args.data is not None and args.tokenizer not in ("bpe", "char") else None
    source = requested or shards.tokenizer_dir or args.model_name_or_path
    if source is None:
        raise UserError(
            f"data={folders[0]} has no tokenizer in it; give the one that made the shards with --tokenizer"
        )
    tokenizer = load_tokenizer(source)
    if shards.tokenizer_hash is not None and tokenizer_hash(tokenizer) != shards.tokenizer_hash:
        raise UserError(f"data={folders[0]} was made with another tokenizer than {source}; prepare it again")
    _check_tokenizer_of_model(args, tokenizer)
    if args.model_name_or_path is None and not shards.holds_conversations:
        tokenizer.chat_template = None  # saved with the template, a base model would be taken for one that chats
    return shards, tokenizer


def _check_tokenizer_of_model(args: Arguments, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Raises UserError if a model that has a tokenizer would be trained on the ids of another one."""
    if not args.model_name_or_path:
        return
    try:
        model_tokenizer = load_tokenizer(args.model_name_or_path)
    except UserError:  # weights without a tokenizer: the vocabulary size is checked once the model is loaded
        return
    known_ids = vocabulary_size(model_tokenizer)  # a chat template may have added others
    if tokenizer_hash(model_tokenizer) != tokenizer_hash(tokenizer, below=known_ids):
        raise UserError(
            f"the text has the ids of another tokenizer than model_name_or_path={args.model_name_or_path}; "
            "prepare it with the model's tokenizer (without --tokenizer), or train from scratch"
        )


def check_ids(shards: TokenShards, vocab_size: int) -> None:
    """Raises UserError if the shards hold an id that the model has no embedding for.

    The first 16 million tokens of each split are read: a damaged shard may hold ids that its manifest does not allow.
    """
    splits = [tokens for tokens in shards.splits.values() if tokens]
    largest_id = max(int(tokens.read(0, min(len(tokens), 1 << 24)).max()) for tokens in splits)
    largest_id = max(largest_id, (shards.vocab_size or 0) - 1)
    if largest_id >= vocab_size:
        raise UserError(
            f"{shards.folder} holds token id {largest_id} but the model has vocab_size={vocab_size}; give the "
            "tokenizer that the shards were made with, or a larger vocab_size, or check them: minigpt data verify"
        )
