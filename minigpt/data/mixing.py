"""Mix several data sources in exact proportions.

After n samples each source has had its share of them, rounded down or up, whatever n is (the quota method of Balinski
and Young, 1975). The turns repeat after a period in which all shares are whole numbers, so that the source at any
position, and how often it had its turn before, are looked up: there is nothing to remember but the position.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from minigpt.data.samplers import Order
from minigpt.data.shards import Tokens, TokenShards
from minigpt.utils.errors import UserError

LONGEST_PERIOD = 1_000_000


class MixedOrder:
    """Position → sample of one of several orders, each of which goes through epochs of its own.

    An epoch of the mixture has as many samples as all sources together.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float]) -> None:
        self.orders = orders
        self.samples = sum(order.samples for order in orders)
        self.source, self.earlier, self.a_period = turns(exact_shares(weights))

    def __getitem__(self, position: int) -> int:
        period, place = divmod(position, len(self.source))
        source = self.source[place]
        return self.orders[source][period * int(self.a_period[source]) + int(self.earlier[place])]


def exact_shares(weights: Sequence[float]) -> list[Fraction]:
    """The weights as decimal fractions of their sum. Raises UserError where the turns would not repeat soon."""
    parts = [Fraction(repr(float(weight))) for weight in weights]
    shares = [part / sum(parts) for part in parts]
    period = lcm(*(share.denominator for share in shares))
    if period > LONGEST_PERIOD:
        raise UserError(
            f"data_weights={' '.join(map(str, weights))}: the shares only come out even after {period:,} samples; "
            "give weights with fewer digits"
        )
    return shares


def turns(shares: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One period of turns: the source of each, how often it had its turn before, and each source's number of turns.

    The turn goes to the source that has waited longest by its share, among those whose share is not used up.
    """
    period = lcm(*(share.denominator for share in shares))
    wanted = [int(share * period) for share in shares]
    had = [0] * len(shares)
    source, earlier = np.empty(period, dtype=np.int32), np.empty(period, dtype=np.int32)
    for place in range(period):
        due = [of for of, number in enumerate(wanted) if had[of] * period < number * (place + 1)]
        chosen = max(due, key=lambda of: (Fraction(wanted[of], had[of] + 1), -of))
        source[place], earlier[place] = chosen, had[chosen]
        had[chosen] += 1
    return source, earlier, np.array(wanted)


def joined(parts: Sequence[TokenShards], weights: Sequence[float]) -> TokenShards:
    """Several folders of shards as one, their tokens one behind the other, to be mixed by `weights`.

    Raises UserError where they were not made with one tokenizer.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        if part.tokenizer_hash != first.tokenizer_hash or part.train.dtype != first.train.dtype:
            raise UserError(
                f"data={part.folder} was made with another tokenizer than {first.folder}; prepare it again"
            )
    digest = hashlib.sha256(
        ":".join([*(part.fingerprint for part in parts), *map(str, exact_shares(weights))]).encode()
    )
    splits = {"train": [part.train for part in parts], "validation": [p.validation for p in parts if p.validation]}
    records = [part.manifest.get("splits", {}) for part in parts]
    manifest = {
        **{name: value for name, value in first.manifest.items() if name not in ("source", "options", "splits")},
        "source": {"mixture": ", ".join(f"{w} of {p.folder.name}" for w, p in zip(weights, parts, strict=True))},
        "sources": [
            {"folder": p.folder.name, "weight": w, "fingerprint": p.fingerprint, **p.manifest.get("source", {})}
            for w, p in zip(weights, parts, strict=True)
        ],
        "splits": {
            name: {
                "tokens": sum(map(len, tokens)),
                "shards": [shard for record in records for shard in record.get(name, {}).get("shards", [])],
            }
            for name, tokens in splits.items()
            if tokens
        },
    }
    return TokenShards(
        first.folder,
        manifest,
        _behind_each_other(splits["train"]),
        _behind_each_other(splits["validation"]) if splits["validation"] else None,
        digest.hexdigest(),
        tuple(len(part.train) for part in parts),
        tuple(weights),
    )


def _behind_each_other(texts: Sequence[Tokens]) -> Tokens:
    """One text of several; how large it is is known where it is of each."""

    def total(numbers: list[int | None]) -> int | None:
        return None if None in numbers else sum(number for number in numbers if number is not None)

    return Tokens(
        [shard for text in texts for shard in text.shards],
        texts[0].dtype,
        total([text.text_bytes for text in texts]),
        total([text.documents for text in texts]),
    )
