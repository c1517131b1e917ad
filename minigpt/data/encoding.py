"""Encode documents into token ids, on several processes.

Two rules hold wherever documents are encoded:

* nothing is inserted but one end-of-text id after a document: no beginning of text, no padding;
* nothing in a document is special: the characters `<|endoftext|>` in somebody's text are encoded as ordinary text, so
  that no document can pretend to end. (A prompt for `minigpt generate` may use special tokens; a document may not.)
"""

import json
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np

from minigpt.data.chat import Example, Marking, marked_ids
from minigpt.data.fast_encoders import FastBPE, FastCharacters, fast_bpe, fast_characters
from minigpt.utils.errors import UserError

BATCH_CHARACTERS = 1_000_000

PART_CHARACTERS = 250_000

LONGEST_WORD = 16_000_000  # characters; encoding takes about 65 bytes of memory for each

SAFE_CUT = re.compile(r"\w(?=[ \n])")

# where there is no white space: GPT-2's pattern never joins a letter and a digit, nor one of these signs (ideographic
# comma and full stop, and the wide comma, among them) and what comes after it
CUT_IN_A_WORD = re.compile(r"\w(?=[ \n])|[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z])|[,.;:!?\u3001\u3002\uff0c](?=[^\W_])")


class Interrupted(ValueError):
    """Work that stopped for a reason outside of it, and goes on when it is started again."""


@dataclass(frozen=True)
class Batch:
    """Parts of documents, as (text, ends) pairs, and where they stand: the first is part `part` of `document`."""

    document: int
    part: int
    parts: list[tuple[Any, bool]]  # texts, or examples


@dataclass(frozen=True)
class Encoded:
    """The ids of a batch, the number of documents that end in it, the bytes of their text, and marks of examples."""

    document: int
    part: int
    ids: np.ndarray
    documents: int
    text_bytes: int
    marks: np.ndarray | None = None


@dataclass(frozen=True)
class Encoding:
    """What a process needs to encode: small enough to be sent to it, and made of nothing but data."""

    tokenizer_json: str
    end_of_text: int
    dtype: str
    fast: FastBPE | FastCharacters | None = None
    marking: Marking | None = None  # of examples; None for plain text

    @staticmethod
    def of(tokenizer: Any, dtype: np.dtype, large: bool = True, marking: Marking | None = None) -> "Encoding":
        """For a `PreTrainedTokenizerFast`; a stand-in for `tokenizers` is looked for if the text is `large`."""
        tokenizer_json = tokenizer.backend_tokenizer.to_str()
        fast = fast_characters(tokenizer_json) or (fast_bpe(tokenizer_json) if large else None)
        return Encoding(tokenizer_json, tokenizer.eos_token_id, np.dtype(dtype).str, fast, marking)

    @property
    def encodes_parts(self) -> bool:
        """Whether a text may be encoded in parts that end where a space or newline follows a letter.

        True for characters and for GPT-2's pattern, in which white space never joins what stands before it.
        """
        state = json.loads(self.tokenizer_json)
        if state["normalizer"] is not None or not all(token["special"] for token in state["added_tokens"]):
            return False
        pre_tokenizer = state["pre_tokenizer"] or {}
        if pre_tokenizer.get("type") == "ByteLevel":
            return bool(pre_tokenizer["use_regex"]) and not pre_tokenizer["add_prefix_space"]
        return isinstance(self.fast, FastCharacters)

    @property
    def library(self) -> str:
        """Who does the work."""
        return {FastBPE: "tiktoken", FastCharacters: "numpy"}.get(type(self.fast), "tokenizers")


class Encoder:
    """Turns texts into arrays of ids."""

    def __init__(self, encoding: Encoding) -> None:
        from tokenizers import Tokenizer

        self.encoding = encoding
        self.backend = Tokenizer.from_str(encoding.tokenizer_json)
        self.backend.no_truncation()
        self.backend.no_padding()
        self._fast = encoding.fast.encoder() if encoding.fast else None

    def encode(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        """The ids of every text; with `special`, special tokens in it are such.

        Raises UserError for a text that the vocabulary cannot express.
        """
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                point = ord(text[error.start])
                raise UserError(
                    f"half a surrogate pair (U+{point:04X}) is in the text, which is no character"
                ) from error
        fast = None if special else self._fast
        self.backend.encode_special_tokens = not special
        done: list[np.ndarray | None] = [fast(text) if fast else None for text in texts]
        rest = [index for index, ids in enumerate(done) if ids is None]
        try:
            encodings = self.backend.encode_batch_fast([texts[index] for index in rest], add_special_tokens=False)
        except Exception as error:  # a bare Exception from Rust
            raise UserError(self._explain([texts[index] for index in rest], error)) from error
        for index, encoding in zip(rest, encodings, strict=True):
            done[index] = np.array(encoding.ids, dtype=np.int64)
        return done  # type: ignore[return-value]

    def encode_batch(self, batch: Batch) -> Encoded:
        """The ids of a batch in one array, each document with its end."""
        texts = [text for text, _ in batch.parts]
        end = np.array([self.encoding.end_of_text])
        try:
            if self.encoding.marking:
                ids, marks, size = marked_ids(texts, self.encoding.marking, self.encode, self.encoding.end_of_text)
                return Encoded(batch.document, batch.part, ids.astype(self.encoding.dtype), len(texts), size, marks)
            pieces = self.encode(texts)
        except ValueError as error:
            last = batch.document + sum(ends for _, ends in batch.parts[:-1])
            raise UserError(f"documents {batch.document} to {last}, counted from 0: {error}") from error
        arrays = [
            array for ids, (_, ends) in zip(pieces, batch.parts, strict=True) for array in ([ids, end][: 1 + ends])
        ]
        return Encoded(
            batch.document,
            batch.part,
            np.concatenate(arrays).astype(self.encoding.dtype),
            sum(ends for _, ends in batch.parts),
            sum(len(text.encode()) for text in texts),
        )

    def _explain(self, texts: Sequence[str], error: Exception) -> str:
        known = self.backend.get_vocab()
        for character in sorted(set().union(*texts)):
            if isinstance(self.encoding.fast, FastCharacters) and character not in known:
                return (
                    f"the character {character!r} (U+{ord(character):04X}) is not in the tokenizer's vocabulary; "
                    "train it on this text too, or use 'bpe', which knows every character"
                )
        return f"the tokenizer failed: {error}"


def parts(
    texts: Iterable[tuple[str | Example, bool]], whole: bool, limit: int = PART_CHARACTERS
) -> Iterator[tuple[Any, bool]]:
    """Regroup (text, ends a document) so that the parts of a document may be encoded one by one.

    With `whole`, a document becomes one part. Else it is cut before a space or newline that follows a letter, a digit
    or _, near every `limit` characters; where none follows soon, between characters that are never joined. A word of
    more than LONGEST_WORD characters is cut at that length, or memory would grow with it: the one cut that may change
    ids, though not the text that they stand for. Where the cuts fall does not depend on how the input was divided.
    """
    buffer = ""
    searched = 0  # no cut is before this place of the buffer
    for text, ends in texts:
        if not isinstance(text, str):  # an example, which is never cut
            yield text, True
            continue
        buffer += text
        start = 0
        while not whole and len(buffer) - start > limit:
            end = _cut(buffer, start, limit, searched)
            if end is None:
                searched = max(start, len(buffer) - 1)
                break
            yield buffer[start:end], False
            start = searched = end
        buffer, searched = buffer[start:], max(0, searched - start)
        if ends:
            yield buffer, True
            buffer, searched = "", 0
    if buffer:
        yield buffer, True


def _cut(buffer: str, start: int, limit: int, searched: int) -> int | None:
    """Where the part that begins at `start` ends, None while that cannot be said."""
    soon = start + 4 * limit
    cut = SAFE_CUT.search(buffer, max(start + limit - 1, searched), soon)
    if cut is None and len(buffer) > soon:
        # the window above may have held another kind of cut
        first = start + limit - 1 if searched < soon else searched
        cut = CUT_IN_A_WORD.search(buffer, first, start + LONGEST_WORD)
    if cut is None and len(buffer) > start + LONGEST_WORD:
        return start + LONGEST_WORD
    return cut.end() if cut else None


def batches(
    texts: Iterable[tuple[Any, bool]], document: int = 0, part: int = 0, characters: int = BATCH_CHARACTERS
) -> Iterator[Batch]:
    """Group parts into batches of about `characters`; the first given is part `part` of `document`."""
    collected: list[tuple[Any, bool]] = []
    first, size = (document, part), 0
    for text, ends in texts:
        collected.append((text, ends))
        size += len(text)
        document, part = (document + 1, 0) if ends else (document, part + 1)
        if size >= characters:
            yield Batch(*first, collected)
            collected, first, size = [], (document, part), 0
    if collected:
        yield Batch(*first, collected)


def encode_all(work: Iterable[Batch], encoding: Encoding, workers: int) -> Iterator[Encoded]:
    """Encode batches in order, by `workers` processes; a few batches for each of them are in memory at a time."""
    if workers <= 1:
        yield from map(Encoder(encoding).encode_batch, work)
        return
    # spawned, because a forked copy of a process with threads may hang, and because every system can do it
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoding,))
    pending: deque[Any] = deque()
    try:
        for batch in work:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise Interrupted(
            "a process that tokenizes was killed, most often for lack of memory; run the same command again to go on, "
            "with fewer --preprocessing_num_workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder


def _start_worker(encoding: Encoding) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(encoding)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(batch: Batch) -> Encoded:
    return _encoder.encode_batch(batch)
