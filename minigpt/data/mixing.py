"""Mix several data sources in exact proportions.

After any number of samples, each source has contributed its share of them, rounded down or up (the quota method of
Balinski and Young, 1975). The sequence of sources repeats with a period in which every share is a whole number of
samples. The source at a position, and how many samples it contributed before, are therefore looked up in a table, and
the position is the only state of a run.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np

from minigpt.data.samplers import Order
from minigpt.data.shards import Tokens, TokenShards
from minigpt.utils.errors import UserError

LONGEST_PERIOD = 1_000_000  # samples


class MixedOrder:
    """Draws samples from several orders in proportion to `weights`; each order runs through its own epochs.

    An epoch of the mixture has as many samples as the epochs of all sources together.
    Raises UserError as `exact_shares`.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float]) -> None:
        self.orders = orders
        self.samples_per_epoch = sum(order.samples_per_epoch for order in orders)
        self._sources, self._earlier, self._per_period = source_schedule(exact_shares(weights))

    def __getitem__(self, position: int) -> int:
        """The sample id at `position`."""
        period, place = divmod(position, len(self._sources))
        source = self._sources[place]
        return self.orders[source][period * int(self._per_period[source]) + int(self._earlier[place])]


def exact_shares(weights: Sequence[float]) -> list[Fraction]:
    """The weights, as the decimal numbers they are written as, divided by their sum.

    Raises UserError if the period of the mixture would be longer than LONGEST_PERIOD.
    """
    decimals = [Fraction(repr(float(weight))) for weight in weights]
    shares = [decimal / sum(decimals) for decimal in decimals]
    period = lcm(*(share.denominator for share in shares))
    if period > LONGEST_PERIOD:
        raise UserError(
            f"data_weights={' '.join(map(str, weights))}: the shares are whole numbers of samples only every "
            f"{period:,} samples, and {LONGEST_PERIOD:,} is the limit; give weights with fewer digits"
        )
    return shares


def source_schedule(shares: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sequence of sources in one period of P samples, for shares that add up to 1.

    Returns, for every sample, the index of its source and how many samples the source contributed before in the period
    (both int32 [P]), and the samples per period of every source (int64 [sources]).

    The next sample comes from the source with the largest share divided by its samples so far plus one, among those
    that would not exceed their share rounded up.
    """
    period = lcm(*(share.denominator for share in shares))
    per_period = [int(share * period) for share in shares]
    contributed = [0] * len(shares)
    sources, earlier = np.empty(period, dtype=np.int32), np.empty(period, dtype=np.int32)
    for place in range(period):
        eligible = [
            source for source, total in enumerate(per_period) if contributed[source] * period < total * (place + 1)
        ]
        chosen = max(eligible, key=lambda source: (Fraction(per_period[source], contributed[source] + 1), -source))
        sources[place], earlier[place] = chosen, contributed[chosen]
        contributed[chosen] += 1
    return sources, earlier, np.array(per_period)


def join_shards(folders: Sequence[TokenShards], weights: Sequence[float]) -> TokenShards:
    """Several folders of shards as one, with their tokens one after the other, to be mixed by `weights`.

    Raises UserError if they were not made with the same tokenizer, and as `exact_shares`.
    """
    first = folders[0]
    if len(folders) == 1:
        return first
    for shards in folders[1:]:
        if shards.tokenizer_hash != first.tokenizer_hash or shards.train.dtype != first.train.dtype:
            raise UserError(
                f"data={shards.folder} was made with another tokenizer than {first.folder}; prepare it again"
            )
    identity = [*(shards.fingerprint for shards in folders), *map(str, exact_shares(weights))]
    validation = [shards.validation for shards in folders if shards.validation]
    return TokenShards(
        first.folder,
        _joint_manifest(folders, weights),
        _concatenate([shards.train for shards in folders]),
        _concatenate(validation) if validation else None,
        hashlib.sha256(":".join(identity).encode()).hexdigest(),
        tuple(len(shards.train) for shards in folders),
        tuple(weights),
    )


def _joint_manifest(folders: Sequence[TokenShards], weights: Sequence[float]) -> dict[str, Any]:
    first, weighted = folders[0], list(zip(weights, folders, strict=True))
    split_entries = [shards.manifest.get("splits", {}) for shards in folders]
    tokens_of_split = {
        "train": [len(shards.train) for shards in folders],
        "validation": [len(shards.validation) for shards in folders if shards.validation],
    }
    return {
        **{name: value for name, value in first.manifest.items() if name not in ("source", "options", "splits")},
        "conversations": any(shards.holds_conversations for shards in folders),
        "source": {"mixture": ", ".join(f"{weight} of {shards.folder.name}" for weight, shards in weighted)},
        "sources": [
            {
                "folder": shards.folder.name,
                "weight": weight,
                "fingerprint": shards.fingerprint,
                **shards.manifest.get("source", {}),
            }
            for weight, shards in weighted
        ],
        "splits": {
            name: {
                "tokens": sum(tokens),
                "shards": [shard for entries in split_entries for shard in entries.get(name, {}).get("shards", [])],
            }
            for name, tokens in tokens_of_split.items()
            if tokens
        },
    }


def _concatenate(splits: Sequence[Tokens]) -> Tokens:
    """Several splits as one. Its text bytes and documents are known if they are known of every split."""

    def total(counts: list[int | None]) -> int | None:
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    return Tokens(
        [shard for tokens in splits for shard in tokens.shards],
        splits[0].dtype,
        total([tokens.text_bytes for tokens in splits]),
        total([tokens.documents for tokens in splits]),
    )
