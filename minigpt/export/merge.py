"""Write an adapter and its base model as one model."""

from pathlib import Path

from minigpt.data.tokenizer import has_tokenizer, load_tokenizer
from minigpt.export.source import empty_folder
from minigpt.modeling.loading import find_model, load_model
from minigpt.modeling.lora import find_adapter
from minigpt.utils.errors import UserError


def export_merged(source: str | Path, destination: str | Path) -> list[str]:
    """Write the model that the adapter in `source` (a folder or Hub name) and its base are together.

    A run folder without a final model gives its newest checkpoint. The adapter is added to the weights in float32, and
    the weights keep the dtype of the base. The tokenizer and the generation config are the adapter's. Returns notes
    for the user. Raises UserError if `source` is not an adapter or `destination` is not empty.
    """
    folder = empty_folder(destination)
    adapter_source = find_model(source)
    if find_adapter(adapter_source) is None:
        raise UserError(f"{adapter_source} is a whole model already, not an adapter")
    model = load_model(adapter_source, dtype="auto", device="cpu")
    tokenizer, notes = None, []
    if not Path(adapter_source).is_dir() or has_tokenizer(Path(adapter_source)):
        tokenizer = load_tokenizer(adapter_source, require_eos=False, require_fast=False)
    else:
        notes.append(f"{adapter_source} has no tokenizer, so the merged folder has none either")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return notes
