"""Mark the parts of a text that are copied from the training text of the model."""

import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock, Thread

from transformers import PreTrainedTokenizerBase

from minigpt.data.copy_index import CopyIndex, build_copy_index, building_bytes, index_folder
from minigpt.data.run_data import find_run_data
from minigpt.evaluation.memorization import COPY_LENGTHS, Copy, Found, copied, describe_copies
from minigpt.generation.sampling import decode, final_text
from minigpt.playground.views import marked_html
from minigpt.utils.errors import UserError, file_errors_are_user_errors
from minigpt.utils.formatting import format_bytes

LEAST = COPY_LENGTHS[0]  # tokens of a copy that is marked


class CopyMarker:
    """The training text of a run. Its index is built once, in a thread, when the first visitor asks for marks.

    `visitors` are those who want marks. Raises UserError if the text is not on this machine, or the index cannot be
    built.
    """

    def __init__(self, run: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        shards, cache = find_run_data(run)
        self.train, self.tokenizer, self.folder = shards.train, tokenizer, index_folder(cache, shards)
        if not self.folder.is_dir() and importlib.util.find_spec("pydivsufsort") is None:
            raise UserError('marking copies needs pydivsufsort: pip install "minigpt-lm[memorization]"')
        self.visitors: set[str | None] = set()
        self.index: CopyIndex | None = None
        self._lock, self._thread = Lock(), Thread()
        self._error: Exception | None = None

    @property
    def cost(self) -> str:
        """What building the index takes; "" if it has been built."""
        if self.folder.is_dir():
            return ""
        memory = format_bytes(building_bytes(self.train))
        return f"The first use builds an index of {len(self.train):,} tokens, in {memory} of memory"

    def build(self) -> Iterator[str]:
        """Wait for the index; yields how far it is. Raises UserError if it cannot be built."""
        started = time.monotonic()
        with self._lock:
            if self.index is None and not self._thread.is_alive():
                self._thread = Thread(target=self._build, daemon=True)
                self._thread.start()
        while self._thread.is_alive():
            self._thread.join(timeout=0.5)
            yield f"Building the index of {len(self.train):,} training tokens: {time.monotonic() - started:.0f} s"
        if self._error is not None:
            raise self._error

    def _build(self) -> None:
        self._error = None
        try:
            with file_errors_are_user_errors():
                self.index = build_copy_index(self.train, int(self.tokenizer.eos_token_id), self.folder)
        except Exception as error:  # raised again where a visitor waits
            self._error = error


class MarkedText:
    """The marks of one text while it grows."""

    def __init__(self, marker: CopyMarker) -> None:
        self.marker = marker
        self._found: Found | None = None

    def copies(self, ids: Sequence[int]) -> list[Copy]:
        """The copies in a text that begins as the one of the call before, or is a beginning of it."""
        marker = self.marker
        assert marker.index is not None
        if self._found is not None and len(self._found[0]) > len(ids):  # the end of text is not shown
            self._found = None
        self._found = copied(marker.index, ids, int(marker.tokenizer.eos_token_id), self._found)
        return describe_copies(marker.index, marker.train, marker.tokenizer, ids, self._found, LEAST)

    def html(self, ids: Sequence[int]) -> str:
        """The text with its copies marked, and a list of them."""

        def characters(tokens: int) -> int:
            return len(self._text(ids[:tokens]))

        copies = self.copies(ids)
        bounds = [(characters(copy.start), characters(copy.start + copy.tokens)) for copy in copies]
        return marked_html(self._text(ids), list(zip(bounds, copies, strict=True)))

    def _text(self, ids: Sequence[int]) -> str:
        return final_text(decode(self.marker.tokenizer, ids, skip_special_tokens=True), ())
