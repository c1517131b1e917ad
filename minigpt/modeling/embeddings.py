"""Give a model embeddings for new token ids, such as those of a chat template."""

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def grow_embeddings(model: PreTrainedModel, vocab_size: int, known_ids: int) -> None:
    """Make `vocab_size` rows in the embedding and the head; those from id `known_ids` on become the mean of the rest.

    Rows of known ids keep their bits. Rows that only rounded the vocabulary up count as new: they may now belong to a
    token. A new token is then about as likely as an average one; with random rows it could be likelier than all.
    Source: Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
    """
    if vocab_size != model.config.vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in {id(table.weight): table.weight for table in tables if isinstance(table, nn.Module)}.values():
        assert isinstance(weight, torch.Tensor)
        weight[known_ids:] = weight[:known_ids].float().mean(0).to(weight.dtype)
