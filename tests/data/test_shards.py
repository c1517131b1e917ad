"""Token shards read back as they were written, wherever they are cut, and damage is reported."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from minigpt.data.encoding import EncodedBatch
from minigpt.data.shard_writer import Journal, SplitWriter, write_manifest
from minigpt.data.shards import Shard, Tokens, open_shards, smallest_dtype
from minigpt.utils.errors import UserError


def write(folder: Path, ids: np.ndarray, shard_tokens: int = 7, vocab_size: int = 60_000) -> Path:
    """Train on `ids` as three documents of 10 bytes; validate on the first five ids, one document of 4 bytes."""
    dtype, journal = smallest_dtype(vocab_size), Journal(folder, "key")
    train = SplitWriter(journal, "train", dtype, shard_tokens)
    for document, part in enumerate(np.array_split(ids, 3)):
        train.write(EncodedBatch(document, 0, part, 1, 10))
    validation = SplitWriter(journal, "validation", dtype, 1000)
    validation.write(EncodedBatch(0, 0, ids[:5], 1, 4))
    write_manifest(folder, dtype, vocab_size, {"train": train.close(), "validation": validation.close()})
    return folder


@pytest.mark.parametrize("shard_tokens", [1, 2, 7, 99, 100, 101])
def test_reading_gives_back_what_was_written_wherever_shards_are_cut(tmp_path: Path, shard_tokens: int) -> None:
    ids = np.random.default_rng(0).integers(0, 60_000, 100)
    tokens = open_shards(write(tmp_path, ids, shard_tokens)).train
    assert len(tokens) == 100
    assert len(tokens.shards) == -(-100 // shard_tokens)
    for start, stop in [(0, 100), (0, 0), (100, 100), (6, 8), (13, 90), (99, 100)]:
        assert np.array_equal(tokens.read(start, stop), ids[start:stop])
    with pytest.raises(IndexError, match=r"\[99, 101\)"):
        tokens.read(99, 101)


def test_ids_are_uint16_exactly_when_every_id_fits() -> None:
    assert smallest_dtype(65_536) == np.dtype("<u2")
    assert smallest_dtype(65_537) == np.dtype("<u4")
    with pytest.raises(UserError, match="vocab_size=4294967297"):
        smallest_dtype(2**32 + 1)


def test_a_large_vocabulary_survives_the_round_trip(tmp_path: Path) -> None:
    ids = np.array([0, 65_535, 65_536, 199_999])
    shards = open_shards(write(tmp_path, ids, vocab_size=200_000))
    assert shards.train.dtype == np.dtype("<u4")
    assert shards.train.read(0, 4).tolist() == ids.tolist()


def test_counts_are_those_of_what_was_written(tmp_path: Path) -> None:
    shards = open_shards(write(tmp_path, np.arange(100)))
    assert (shards.train.documents, shards.train.text_bytes) == (3, 30)
    assert shards.validation is not None
    assert (len(shards.validation), shards.validation.documents, shards.validation.text_bytes) == (5, 1, 4)
    assert shards.vocab_size == 60_000


def test_the_fingerprint_depends_on_the_tokens_alone(tmp_path: Path) -> None:
    ids = np.arange(100)
    first, same = write(tmp_path / "a", ids), write(tmp_path / "b", ids)
    assert open_shards(first).fingerprint == open_shards(same).fingerprint
    ids[50] += 1
    assert open_shards(write(tmp_path / "c", ids)).fingerprint != open_shards(first).fingerprint


def test_tokens_are_pickled_as_paths(tmp_path: Path) -> None:
    tokens = open_shards(write(tmp_path, np.arange(10_000), shard_tokens=5_000)).train
    tokens.read(0, 10_000)
    pickled = pickle.dumps(tokens)
    assert len(pickled) < 2_000
    assert np.array_equal(pickle.loads(pickled).read(4_000, 6_000), np.arange(4_000, 6_000))


def test_positions_beyond_32_bits_are_read_from_sparse_files(tmp_path: Path) -> None:
    """10^10 tokens in 5 sparse files (20 GB, a few kB on the disk)."""
    shards = []
    for index in range(5):
        path = tmp_path / f"train-{index:05d}.bin"
        with path.open("wb") as file:
            file.truncate(2 * 2_000_000_000)
            file.seek(2 * 1_999_999_999)
            file.write(np.array([index + 1], "<u2").tobytes())
        shards.append(Shard(path, 2_000_000_000))
    tokens = Tokens(shards, np.dtype("<u2"))
    assert len(tokens) == 10**10
    for index in range(1, 5):  # 2·10^9 is just below 2^31, 6·10^9 beyond 2^32
        boundary = index * 2_000_000_000
        assert tokens.read(boundary - 2, boundary + 2).tolist() == [0, index, 0, 0]
    assert tokens.read(10**10 - 1, 10**10).tolist() == [5]


def nanogpt(folder: Path, ids: np.ndarray) -> None:
    ids.astype("<u2").tofile(folder / "train.bin")
    ids[:100].astype("<u2").tofile(folder / "val.bin")


def build_nanogpt(folder: Path, ids: np.ndarray) -> None:
    np.save(folder / "edufineweb_train_000001.npy", ids[:6000].astype(np.uint16))
    np.save(folder / "edufineweb_train_000002.npy", ids[6000:].astype(np.uint16))
    np.save(folder / "edufineweb_val_000000.npy", ids[:100].astype(np.uint16))


def llmc(folder: Path, ids: np.ndarray) -> None:
    for name, part in {"train_000001": ids[:6000], "train_000002": ids[6000:], "val_000000": ids[:100]}.items():
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(part)
        (folder / f"fineweb_{name}.bin").write_bytes(header.tobytes() + part.astype(np.uint16).tobytes())


def llmc_llama3(folder: Path, ids: np.ndarray) -> None:
    for name, part in {"train": ids + 100_000, "val": ids[:100]}.items():
        header = np.zeros(256, np.int32)
        header[:3] = 20240801, 7, len(part)
        (folder / f"{name}.bin").write_bytes(header.tobytes() + part.astype(np.uint32).tobytes())


@pytest.mark.parametrize("save", [nanogpt, build_nanogpt, llmc, llmc_llama3])
def test_shards_of_other_programs_are_read(tmp_path: Path, save) -> None:
    ids = np.random.default_rng(1).integers(0, 50_257, 10_000)
    save(tmp_path, ids)
    shards = open_shards(tmp_path)
    assert np.array_equal(shards.train.read(0, 10_000), ids + (100_000 if save is llmc_llama3 else 0))
    assert shards.validation is not None
    assert np.array_equal(shards.validation.read(0, 100), ids[:100])
    assert (shards.vocab_size, shards.train.text_bytes, shards.tokenizer_dir) == (None, None, None)
    before = shards.fingerprint
    assert open_shards(tmp_path).fingerprint == before
    ids[0] ^= 1
    save(tmp_path, ids)
    assert open_shards(tmp_path).fingerprint != before


def test_damaged_shards_of_other_programs_are_reported(tmp_path: Path) -> None:
    llmc(tmp_path, np.arange(10_000))
    os.truncate(tmp_path / "fineweb_train_000002.bin", 2000)
    with pytest.raises(UserError, match=r"fineweb_train_000002\.bin: 2000 bytes are not"):
        open_shards(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    np.save(tmp_path / "train.npy", np.zeros((2, 3)))
    with pytest.raises(UserError, match=r"an array of float64 of shape \(2, 3\)"):
        open_shards(tmp_path)
    nanogpt(tmp_path, np.arange(1000))
    np.save(tmp_path / "train.npy", np.zeros(3, np.uint32))
    with pytest.raises(UserError, match="different types of ids"):
        open_shards(tmp_path)


def test_negative_ids_are_refused_with_the_name_of_their_file(tmp_path: Path) -> None:
    ids = np.arange(10_000, dtype=np.int32)
    for name in ("train_0", "train_1", "val_0"):
        np.save(tmp_path / f"{name}.npy", ids)
    assert open_shards(tmp_path).train.read(9_999, 10_001).tolist() == [9_999, 0]
    ids[7_777] = -100  # as a label that is not in the loss
    np.save(tmp_path / "train_1.npy", ids)
    with pytest.raises(UserError, match=r"train_1\.npy holds token id -100; ids are 0 or more"):
        open_shards(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "bool", "uint8", "nonsense", None, 2])
def test_only_unsigned_ids_are_read_through_a_manifest(tmp_path: Path, dtype: object) -> None:
    folder = write(tmp_path, np.arange(100))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"dtype": dtype}))
    with pytest.raises(UserError, match=rf"manifest\.json: dtype is {dtype!r}, not 'uint16' or 'uint32'"):
        open_shards(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int16, np.int64, bool, ">u2"])
def test_only_16_and_32_bit_ids_are_read_from_npy_files(tmp_path: Path, dtype: object) -> None:
    np.save(tmp_path / "train.npy", np.arange(100).astype(dtype))
    with pytest.raises(UserError, match=r"train\.npy: an array of .* not a list of 16 or 32-bit ids"):
        open_shards(tmp_path)


def damage_missing(folder: Path) -> None:
    (folder / "train-00001.bin").unlink()


def damage_truncated(folder: Path) -> None:
    os.truncate(folder / "train-00001.bin", 13)


def damage_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def damage_version(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))


def damage_split(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["splits"]["train"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "train-00001.bin is missing"),
        (damage_truncated, "train-00001.bin has 13 bytes where the manifest says 14"),
        (damage_json, "manifest.json: "),
        (damage_version, "version 99 is newer"),
        (damage_split, "'train' is missing"),
    ],
)
def test_damage_is_reported_in_one_line(tmp_path: Path, damage, message: str) -> None:
    folder = write(tmp_path, np.arange(100))
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_shards(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither manifest\.json nor train\.bin"):
        open_shards(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        open_shards(tmp_path / "missing")
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="3 bytes are not a whole number"):
        open_shards(tmp_path)
