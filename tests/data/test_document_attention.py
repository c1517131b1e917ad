"""Document attention: documents in one sample have the logits and gradients that they have alone."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.data.samples import TokenBlocks, document_positions
from minigpt.data.shards import Shard, Tokens

END = 0


def tokens_of(folder: Path, documents: list[list[int]]) -> Tokens:
    """The documents in one shard, each with its end."""
    ids = np.array([token for document in documents for token in [*document, END]], dtype="<u2")
    ids.tofile(folder / "train.bin")
    return Tokens([Shard(folder / "train.bin", len(ids))], np.dtype("<u2"))


def test_positions_restart_after_every_end() -> None:
    rows = np.array([[5, 6, END, END, 7, 8, 9], [END, 5, 6, 7, 8, END, 9]])
    assert document_positions(rows == END).tolist() == [[0, 1, 2, 0, 0, 1, 2], [0, 0, 1, 2, 3, 4, 0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_each_document_alone(model, tmp_path: Path, attention: str) -> None:
    model.set_attn_implementation(attention)
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 50, length).tolist() for length in (7, 1, 0, 20, 3, 33, 2, 12)]
    tokens = tokens_of(tmp_path, [*documents, documents[0]])
    total = sum(len(document) + 1 for document in documents)
    width = total // 2
    assert 2 * width == total
    batch = TokenBlocks(tokens, width, END).__getitems__([0, width])  # the second row starts inside a document
    with torch.inference_mode():
        logits = model(**batch, use_cache=False).logits
        for row in range(2):
            starts = [0, *(np.flatnonzero(batch["input_ids"][row][:-1] == END) + 1), width]
            for start, stop in pairwise(starts):
                alone = model(batch["input_ids"][row : row + 1, start:stop], use_cache=False).logits
                assert (logits[row : row + 1, start:stop] - alone).abs().max() <= 1e-5


def test_without_document_attention_documents_see_each_other(model, tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path, [[1, 2, 3], [4, 5, 6], [7, 8]])
    separate = TokenBlocks(tokens, 8, END).__getitems__([0])
    together = TokenBlocks(tokens, 8).__getitems__([0])
    assert torch.equal(separate["input_ids"], together["input_ids"])
    assert torch.equal(separate["shift_labels"], together["shift_labels"])
    with torch.inference_mode():
        logits, joint_logits = (model(**batch, use_cache=False).logits for batch in (separate, together))
    difference = (logits - joint_logits).abs().amax(dim=(0, 2))
    assert difference[:4].max() <= 1e-5
    assert difference[4:].min() > 1e-3


def test_gradients_do_not_cross_documents(model, tmp_path: Path) -> None:
    batch = TokenBlocks(tokens_of(tmp_path, [[1, 2, 3], [4, 5, 6], [7, 8]]), 8, END).__getitems__([0])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeds, position_ids=batch["position_ids"], use_cache=False).logits[0, 6].sum().backward()
    has_gradient = embeds.grad[0].abs().sum(dim=1) > 0
    assert has_gradient.tolist() == [False] * 4 + [True] * 3 + [False]
