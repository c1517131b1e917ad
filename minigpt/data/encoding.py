"""Encode documents into token ids, in several processes.

Two rules hold wherever documents are encoded:

* nothing is added except one end-of-text id after each document: no beginning-of-text id, no padding;
* nothing in a document is a special token: the characters `<|endoftext|>` in a text are encoded as ordinary text, so
  no document can imitate an end. (A prompt for `minigpt generate` may use special tokens; a document may not.)

A long document is cut into parts, so that memory is bounded and processes share the work. Parts are collected into
batches, and a batch is what one process encodes at a time.
"""

import json
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, cast

import numpy as np

from minigpt.data.chat import Example, LossMasking, encode_examples
from minigpt.data.fast_encoders import FastEncoder, fast_encoder
from minigpt.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 1_000_000
PART_CHARACTERS = 250_000
LONGEST_WORD = 16_000_000  # characters; encoding takes about 65 bytes of memory for each
SAFE_CUT = re.compile(r"\w(?=[ \n])")

# For text without white space: GPT-2's pattern never joins a letter and a digit, nor one of these punctuation marks
# (which include the ideographic comma and full stop, and the full-width comma) and the letter or digit after it.
CUT_IN_A_WORD = re.compile(r"\w(?=[ \n])|[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z])|[,.;:!?\u3001\u3002\uff0c](?=[^\W_])")

Part = tuple[str | Example, bool]  # a part of a document, and whether the document ends with it


class ResumableError(UserError):
    """Preparation stopped for an outside reason; the same command resumes it."""


@dataclass(frozen=True)
class DocumentBatch:
    """Consecutive parts of documents. The first one is part number `part` of document number `document`, from 0."""

    document: int
    part: int
    parts: list[Part]


@dataclass(frozen=True)
class EncodedBatch:
    """The token ids [N] of the batch that starts at `part` of `document`.

    `documents` is the number of documents that end in the batch, and `text_bytes` the UTF-8 bytes of its text. If it
    holds examples, `marks` are the marks of its tokens: uint8 [N], see `minigpt.data.shards`.
    """

    document: int
    part: int
    ids: np.ndarray
    documents: int
    text_bytes: int
    marks: np.ndarray | None = None


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that a process needs to build an `Encoder`, as plain data that can be sent to it.

    `dtype` is the type of the ids in an `EncodedBatch`; `loss_masking` is None for plain text.
    """

    tokenizer_json: str
    end_of_text: int
    dtype: str
    fast: FastEncoder | None = None
    loss_masking: LossMasking | None = None

    @staticmethod
    def from_tokenizer(
        tokenizer: "PreTrainedTokenizerFast",
        dtype: np.dtype,
        large: bool = True,
        loss_masking: LossMasking | None = None,
    ) -> "EncoderSpec":
        """The specification for a tokenizer. `large` text is worth the search for an encoder that is faster."""
        tokenizer_json = tokenizer.backend_tokenizer.to_str()
        fast = fast_encoder(tokenizer_json, large)
        return EncoderSpec(tokenizer_json, tokenizer.eos_token_id, np.dtype(dtype).str, fast, loss_masking)

    @property
    def encodes_parts(self) -> bool:
        """Whether a text may be encoded in parts that end where a letter or digit is followed by a space or newline.

        True for characters and for GPT-2's pattern, which never joins white space to the word before it.
        """
        state = json.loads(self.tokenizer_json)
        if state["normalizer"] is not None or not all(token["special"] for token in state["added_tokens"]):
            return False
        pre_tokenizer = state["pre_tokenizer"] or {}
        if pre_tokenizer.get("type") == "ByteLevel":
            return bool(pre_tokenizer["use_regex"]) and not pre_tokenizer["add_prefix_space"]
        return self.fast is not None and self.fast.by_character

    @property
    def library(self) -> str:
        """The name of the library that encodes."""
        return self.fast.library if self.fast else "tokenizers"


class Encoder:
    """Encodes texts into arrays of token ids."""

    def __init__(self, spec: EncoderSpec) -> None:
        from tokenizers import Tokenizer

        self.spec = spec
        self.backend = Tokenizer.from_str(spec.tokenizer_json)
        self.backend.no_truncation()
        self.backend.no_padding()
        self._fast = spec.fast.encoder() if spec.fast else None

    def encode(self, texts: Sequence[str], allow_special: bool = False) -> list[np.ndarray]:
        """The ids of every text, one array per text; special tokens are recognized only with `allow_special`.

        Raises UserError if the vocabulary cannot express a text.
        """
        for text in texts:
            _refuse_surrogates(text)
        fast = None if allow_special else self._fast
        fast_ids = [fast(text) if fast else None for text in texts]
        remaining = [text for text, ids in zip(texts, fast_ids, strict=True) if ids is None]
        self.backend.encode_special_tokens = not allow_special
        try:
            encodings = iter(self.backend.encode_batch_fast(remaining, add_special_tokens=False))
        except Exception as error:  # Rust raises Exception itself
            raise UserError(self._explain(remaining, error)) from error
        return [np.array(next(encodings).ids, dtype=np.int64) if ids is None else ids for ids in fast_ids]

    def encode_marked(self, text: str, marked: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The ids [N] of a text, and whether each is marked, bool [N]: from the token of the first to that of the last
        character of every (start, end) in `marked`.

        Special tokens are recognized. Raises UserError if the vocabulary cannot express the text.
        """
        _refuse_surrogates(text)
        self.backend.encode_special_tokens = False
        try:
            encoding = self.backend.encode(text, add_special_tokens=False)
        except Exception as error:  # Rust raises Exception itself
            raise UserError(self._explain([text], error)) from error
        is_marked = np.zeros(len(encoding.ids), dtype=bool)
        for start, end in marked:
            # a character has no token if the tokenizer drops it, or leaves it out of its offsets, as some do spaces
            tokens = [token for token in map(encoding.char_to_token, range(start, end)) if token is not None]
            if tokens:
                is_marked[tokens[0] : tokens[-1] + 1] = True
        return np.array(encoding.ids, dtype=np.int64), is_marked

    def encode_batch(self, batch: DocumentBatch) -> EncodedBatch:
        """The ids of a batch, with an end-of-text id after each document.

        Raises UserError with the numbers of the documents if one of them cannot be encoded.
        """
        spec, inputs = self.spec, [part for part, _ in batch.parts]
        try:
            if spec.loss_masking:
                examples = cast("list[Example]", inputs)
                ids, marks, text_bytes = encode_examples(examples, spec.loss_masking, self, spec.end_of_text)
                return EncodedBatch(batch.document, batch.part, ids.astype(spec.dtype), len(inputs), text_bytes, marks)
            texts = cast("list[str]", inputs)
            ids_of_parts = self.encode(texts)
        except UserError as error:
            first, last = batch.document, batch.document + sum(ends for _, ends in batch.parts[:-1])
            which = f"document {first}" if first == last else f"documents {first} to {last}"
            raise UserError(f"{which} of the split, counted from 0: {error}") from error
        end_of_text = np.array([spec.end_of_text])
        arrays = []
        for ids, (_, ends) in zip(ids_of_parts, batch.parts, strict=True):
            arrays += [ids, end_of_text] if ends else [ids]
        return EncodedBatch(
            batch.document,
            batch.part,
            np.concatenate(arrays).astype(spec.dtype),
            sum(ends for _, ends in batch.parts),
            sum(len(text.encode()) for text in texts),
        )

    def _explain(self, texts: Sequence[str], error: Exception) -> str:
        """Why the tokenizer failed."""
        vocabulary = self.backend.get_vocab()
        for character in sorted(set().union(*texts)):
            if self.spec.fast and self.spec.fast.by_character and character not in vocabulary:
                return (
                    f"the character {character!r} (U+{ord(character):04X}) is not in the tokenizer's vocabulary; "
                    "train it on this text too, or use 'bpe', which can encode every character"
                )
        return f"the tokenizer failed: {error}"


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code_point = ord(text[error.start])
        raise UserError(
            f"the text contains half a surrogate pair (U+{code_point:04X}), which is not a character"
        ) from error


def parts(texts: Iterable[Part], whole: bool, limit: int = PART_CHARACTERS) -> Iterator[Part]:
    """Divide documents into parts of about `limit` characters that can be encoded one by one.

    The input may be divided in any way; the places of the cuts do not depend on it. Examples are never cut; nor is any
    document if `whole` is true. A text is cut after a letter, digit or _ that is followed by a space or newline, at
    the first such place from `limit` characters on. If there is none within four times `limit`, it is cut between
    characters that GPT-2's pattern never joins. To bound memory, a word of more than LONGEST_WORD characters is cut at
    that length: the only cut that may change ids, though not the text that they decode to.
    """
    buffer = ""
    searched = 0  # there is no cut before this position of the buffer
    for text, ends in texts:
        if not isinstance(text, str):
            yield text, True
            continue
        buffer += text
        start = 0
        while not whole and len(buffer) - start > limit:
            end = _end_of_part(buffer, start, limit, searched)
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


def _end_of_part(buffer: str, start: int, limit: int, searched: int) -> int | None:
    """The end of the part that starts at `start`; None if more text is needed to decide."""
    window_end = start + 4 * limit
    match = SAFE_CUT.search(buffer, max(start + limit - 1, searched), window_end)
    if match is None and len(buffer) > window_end:
        # calls with a shorter buffer looked for white space only, so the window is searched again
        first = start + limit - 1 if searched < window_end else searched
        match = CUT_IN_A_WORD.search(buffer, first, start + LONGEST_WORD)
    if match is None and len(buffer) > start + LONGEST_WORD:
        return start + LONGEST_WORD
    return match.end() if match else None


def batches(
    document_parts: Iterable[Part], document: int = 0, part: int = 0, characters: int = BATCH_CHARACTERS
) -> Iterator[DocumentBatch]:
    """Collect parts into batches of about `characters`. The first part given is number `part` of `document`."""
    collected: list[Part] = []
    first, size = (document, part), 0
    for text, ends in document_parts:
        collected.append((text, ends))
        size += len(text)
        document, part = (document + 1, 0) if ends else (document, part + 1)
        if size >= characters:
            yield DocumentBatch(*first, collected)
            collected, first, size = [], (document, part), 0
    if collected:
        yield DocumentBatch(*first, collected)


def encode_all(document_batches: Iterable[DocumentBatch], spec: EncoderSpec, workers: int) -> Iterator[EncodedBatch]:
    """Encode batches in `workers` processes and yield them in order; about two per process are in memory at a time.

    Raises UserError if a document cannot be encoded, and ResumableError if a process was killed.
    """
    if workers <= 1:
        yield from map(Encoder(spec).encode_batch, document_batches)
        return
    # spawned, because a forked copy of a process with threads may hang, and because every system supports it
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (spec,))
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in document_batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ResumableError(
            "a tokenizing process was killed, most often for lack of memory; run the same command again to resume, "
            "with fewer --preprocessing_num_workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder


def _start_worker(spec: EncoderSpec) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = Encoder(spec)


def _exit_with_parent() -> None:
    """Exit when the parent has been killed; otherwise the worker would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(batch: DocumentBatch) -> EncodedBatch:
    return _encoder.encode_batch(batch)
