"""Which samples does a run read, in which order, and how many targets has a step?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from minigpt.arguments import BatchArguments
from minigpt.data import Batch, EpochOrder, Order, SampleOrder, Samples, TokenBlocks, TrainBatches, loader
from minigpt.mixing import MixedOrder
from minigpt.packing import PackedDocuments
from minigpt.shards import Tokens, TokenShards


@dataclass(frozen=True)
class Feed:
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


def open_feed(args: BatchArguments, shards: TokenShards, end_of_text: int) -> Feed:
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
    return Feed(train, order, validation)


def _samples(
    args: BatchArguments, tokens: Tokens, end_of_text: int, source_tokens: Sequence[int] | None
) -> TokenBlocks | PackedDocuments:
    if args.packing_strategy == "wrapped":
        return TokenBlocks(tokens, args.block_size, end_of_text if args.document_attention else None)
    return PackedDocuments(tokens, args.block_size, end_of_text, args.packing_strategy, source_tokens)
