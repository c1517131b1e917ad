"""Which samples does a run read, in which order, and how many targets has a step?"""

from collections.abc import Iterator
from dataclasses import dataclass

from minigpt.arguments import BatchArguments
from minigpt.data import Batch, EpochOrder, Order, SampleOrder, Samples, TokenBlocks, TrainBatches, loader
from minigpt.packing import PackedDocuments
from minigpt.shards import TokenShards


@dataclass(frozen=True)
class Feed:
    """The samples of a run in their order, and those that it is judged by."""

    train: Samples
    order: Order
    validation: Samples | None

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
        return self.train.targets([self.order[position] for position in range(start, start + samples)])


def open_feed(args: BatchArguments, shards: TokenShards, end_of_text: int) -> Feed:
    """The samples of `shards` as `args` want them cut; `end_of_text` is the id that ends a document."""
    if args.packing_strategy == "wrapped":
        apart = end_of_text if args.document_attention else None
        order: Order = SampleOrder(len(shards.train), args.block_size, args.seed, args.stride)
        validation = TokenBlocks(shards.validation, args.block_size, apart) if shards.validation else None
        return Feed(TokenBlocks(shards.train, args.block_size, apart), order, validation)
    packed = [
        PackedDocuments(tokens, args.block_size, end_of_text, args.packing_strategy) if tokens else None
        for tokens in (shards.train, shards.validation)
    ]
    assert packed[0] is not None
    return Feed(packed[0], EpochOrder(packed[0].source_rows[0], args.seed), packed[1])
