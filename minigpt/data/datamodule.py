"""The data of a run: shards and tokenizer, training samples in order, validation samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from minigpt.config.arguments import Arguments, BatchArguments
from minigpt.data.mixing import MixedOrder, joined
from minigpt.data.packing import PackedDocuments
from minigpt.data.prepare import prepared_folder
from minigpt.data.samplers import EpochOrder, EvaluationBatches, Order, SampleOrder, TrainBatches
from minigpt.data.samples import Batch, Samples, TokenBlocks
from minigpt.data.shards import Tokens, TokenShards, open_shards
from minigpt.data.tokenizer import load_tokenizer, tokenizer_hash
from minigpt.utils.errors import UserError


@dataclass(frozen=True)
class DataModule:
    """The samples of a run in their order, and those that it is judged by."""

    train: Samples
    order: Order
    validation: Samples | None

    def facts(self) -> dict[str, int | str]:
        """What became of the documents, for whoever asks later what a run has seen."""
        if not isinstance(self.train, PackedDocuments):
            return {}
        names = ("strategy", "block_size", "documents", "cut")
        return {name: getattr(self.train, name) for name in names} | {"rows": len(self.train.row_targets)}

    def batches(self, args: BatchArguments, start: int, rank: int, processes: int) -> Iterator[Batch]:
        """The micro-batches of one process from position `start` of the run on, without end."""
        batches = TrainBatches(self.order, start, args.per_device_train_batch_size, rank, processes)
        return iter(loader(self.train, batches, args.dataloader_num_workers))

    def targets(self, start: int, samples: int) -> int:
        """Real targets at positions `start` … `start + samples`, whichever processes read them.

        Every process computes this from the order and the lengths of the documents: none has to ask another one.
        """
        if self.train.equal_targets is not None:
            return samples * self.train.equal_targets
        return self.train.targets(self.numbers(start, samples))

    def numbers(self, start: int, samples: int) -> list[int]:
        """The samples at positions `start` … `start + samples`."""
        return [self.order[position] for position in range(start, start + samples)]


def open_data_module(args: BatchArguments, shards: TokenShards, end_of_text: int) -> DataModule:
    """The samples of `shards` as `args` want them cut; `end_of_text` is the id that ends a document."""
    source_tokens = shards.source_tokens or (len(shards.train),)
    train, validation = (
        _samples(args, tokens, end_of_text, of) if tokens else None
        for tokens, of in ((shards.train, source_tokens), (shards.validation, None))
    )
    assert train is not None
    if isinstance(train, PackedDocuments):
        firsts = accumulate(train.source_rows, initial=0)
        orders: list[Order] = [
            EpochOrder(rows, args.seed, first, source)
            for source, (rows, first) in enumerate(zip(train.source_rows, firsts, strict=False))
        ]
    else:
        firsts = accumulate(source_tokens, initial=0)
        orders = [
            SampleOrder(tokens, args.block_size, args.seed, args.stride, first, source)
            for source, (tokens, first) in enumerate(zip(source_tokens, firsts, strict=False))
        ]
    order = orders[0] if len(orders) == 1 else MixedOrder(orders, shards.weights)
    return DataModule(train, order, validation)


def _samples(
    args: BatchArguments, tokens: Tokens, end_of_text: int, source_tokens: Sequence[int] | None
) -> TokenBlocks | PackedDocuments:
    if args.packing_strategy == "wrapped":
        return TokenBlocks(tokens, args.block_size, end_of_text if args.document_attention else None)
    return PackedDocuments(tokens, args.block_size, end_of_text, args.packing_strategy, source_tokens)


def loader(samples: Samples, batches: TrainBatches | EvaluationBatches, workers: int = 0) -> DataLoader[Batch]:
    """Read `batches` of `samples` with PyTorch's loader, into pinned memory where there is a CUDA device."""
    return DataLoader(
        samples,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=_as_it_is,  # __getitems__ has made the batch already
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def samples_per_step(args: BatchArguments, processes: int) -> int:
    """The global batch, samples."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes


def steps_of_run(args: BatchArguments, samples: int, processes: int) -> int:
    """Steps of the whole run: `max_steps`, or as many as `num_train_epochs` passes over `samples` need."""
    if args.max_steps is not None:
        return args.max_steps
    per_step = samples_per_step(args, processes)
    return max(1, round(args.num_train_epochs * samples / per_step))


def load_data(args: Arguments) -> tuple[TokenShards, Any]:
    """The prepared shards and their tokenizer; raw text is prepared first, with the model's tokenizer if it has one.

    Raises UserError when the shards were made with another tokenizer than the one asked for.
    """
    if args.data is None and args.tokenizer is None and args.model_name_or_path is not None:
        args = args.with_values(tokenizer=args.model_name_or_path)
    folders = [Path(name).expanduser() for name in args.data] if args.data else [prepared_folder(args)]
    shards = joined([open_shards(folder) for folder in folders], args.data_weights or [])
    wanted = args.tokenizer if args.data is not None and args.tokenizer not in ("bpe", "char") else None
    source = wanted or shards.tokenizer_dir or args.model_name_or_path
    if source is None:
        raise UserError(f"data={folders[0]} has no tokenizer beside it; name the one that made it with --tokenizer")
    tokenizer = load_tokenizer(source)
    if shards.tokenizer_hash is not None and tokenizer_hash(tokenizer) != shards.tokenizer_hash:
        raise UserError(f"data={folders[0]} was made with another tokenizer than {source}; prepare it again")
    _check_tokenizer_of_model(args, tokenizer)
    return shards, tokenizer


def _check_tokenizer_of_model(args: Arguments, tokenizer: Any) -> None:
    """Raises UserError when a model that brings a tokenizer would be trained on the ids of another one."""
    try:
        own = args.model_name_or_path and load_tokenizer(args.model_name_or_path)
    except ValueError:  # weights alone: the number of ids is checked when the model is there
        return
    if own and tokenizer_hash(own) != tokenizer_hash(tokenizer):
        raise UserError(
            f"the text has the ids of another tokenizer than model_name_or_path={args.model_name_or_path}; "
            "prepare it with the model's own (leave --tokenizer out), or train from scratch"
        )


def check_ids(shards: TokenShards, vocab_size: int) -> None:
    """Raises UserError when the shards hold an id that the model has no embedding for.

    Shards without a manifest (nanoGPT's) do not say how many ids there are: the first 16 million tokens are looked at.
    """
    highest = (shards.vocab_size or 0) - 1
    if shards.vocab_size is None:
        splits = [split for split in (shards.train, shards.validation) if split]
        highest = max(int(split.read(0, min(len(split), 1 << 24)).max()) for split in splits)
    if highest >= vocab_size:
        raise UserError(
            f"{shards.folder} holds token id {highest} but the model has vocab_size={vocab_size}; "
            "give the tokenizer that the shards were made with, or a larger vocab_size"
        )
