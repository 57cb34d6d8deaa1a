"""Token shards and their index: what is written comes back, and any damage is one clear line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ln_removal.data.tokens import Shard, TokenDataset, TokenIndex, dtype_for, write_index
from ln_removal.errors import UserError
from ln_removal.files.atomic import checksum, write_json_atomically

EOT = 0


def write_dataset(
    directory: Path, train: list[list[int]], validation: list[list[int]], vocab_size: int = 50_257
) -> TokenDataset:
    """A data set with these shards, each one document."""
    directory.mkdir(parents=True, exist_ok=True)
    index = TokenIndex({"name": "made"}, {"name": "gpt2", "sha256": "f" * 64}, vocab_size, EOT, dtype_for(vocab_size))
    for split, shards in (("train", train), ("validation", validation)):
        for number, tokens in enumerate(shards):
            file = directory / f"{split}-made-{number:05d}.bin"
            np.asarray(tokens, dtype=index.dtype).tofile(file)
            index.shards.append(
                Shard(file.name, split, "made", len(tokens), 1, 4 * len(tokens), checksum(file))  # type: ignore[arg-type]
            )
    write_index(directory, index)
    return TokenDataset.open(directory)


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return write_dataset(tmp_path / "tokens", [list(range(1, 11)), [], list(range(20, 27))], [[5, 6, 7, EOT]])


shards_of = st.lists(st.lists(st.integers(0, 65_535), max_size=30), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(train=shards_of, validation=shards_of, wide=st.booleans())
def test_tokens_come_back(
    tmp_path_factory: pytest.TempPathFactory, train: list[list[int]], validation: list[list[int]], wide: bool
) -> None:
    directory = tmp_path_factory.mktemp("tokens")
    data = write_dataset(directory, train, validation, vocab_size=100_000 if wide else 65_536)
    assert data.index.dtype == ("uint32" if wide else "uint16")
    for name, shards in (("train", train), ("validation", validation)):
        split = data.split(name)  # type: ignore[arg-type]
        assert split.tokens == sum(map(len, shards))
        assert split.bytes == 4 * split.tokens
        assert split.documents == len(shards)
        stored = [tokens for tokens in shards if tokens]
        assert len(split.maps) == len(stored)
        for number, tokens in enumerate(stored):
            read = split.read(number, 0, len(tokens))
            assert read.dtype == np.int64 and read.tolist() == tokens
            assert split.read(number, 1, 3).tolist() == tokens[1:4]
    data.verify()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2, "uint16"), (50_257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_the_vocabulary_decides_the_dtype(vocab_size: int, dtype: str) -> None:
    assert dtype_for(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_what_the_index_says(dataset: TokenDataset) -> None:
    assert (dataset.vocab_size, dataset.eot_token_id) == (50_257, EOT)
    assert dataset.tokenizer == {"name": "gpt2", "sha256": "f" * 64}
    again = TokenDataset.open(str(dataset.directory))
    assert again.index == dataset.index


def test_windows(dataset: TokenDataset) -> None:
    train = dataset.split("train")
    batches = list(train.windows(3, batch=2))
    assert [batch.shape for batch in batches] == [(2, 3), (2, 3), (1, 3)]
    rows = np.concatenate(batches).tolist()
    assert rows == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [20, 21, 22], [23, 24, 25]]
    assert np.concatenate(list(train.windows(3, limit_tokens=11, batch=8))).tolist() == rows[:3]
    assert np.concatenate(list(train.windows(3, limit_tokens=1))).tolist() == rows[:1], "at least one"
    assert list(train.windows(11)) == []


def test_where_documents_start(tmp_path: Path) -> None:
    shards = [[5, 6, EOT, 7, EOT, EOT, 8, 9], [4, EOT]]
    split = write_dataset(tmp_path / "tokens", shards, [[1, 2]]).split("train")
    assert [starts.tolist() for starts in split.document_starts] == [[0, 3, 5, 6], [0]]


def test_verify_finds_a_flipped_bit(dataset: TokenDataset) -> None:
    dataset.verify()
    shard = dataset.directory / "train-made-00002.bin"
    data = bytearray(shard.read_bytes())
    data[4] ^= 1
    shard.write_bytes(data)
    reopened = TokenDataset.open(dataset.directory)  # the size is right
    with pytest.raises(UserError, match=r"train-made-00002\.bin"):
        reopened.verify()


def test_a_truncated_shard(dataset: TokenDataset) -> None:
    os.truncate(dataset.directory / "train-made-00000.bin", 18)
    with pytest.raises(UserError, match=r"train-made-00000\.bin.*18.*20"):
        TokenDataset.open(dataset.directory)


def test_a_missing_shard(dataset: TokenDataset) -> None:
    (dataset.directory / "validation-made-00000.bin").unlink()
    with pytest.raises(UserError, match=r"validation-made-00000\.bin"):
        TokenDataset.open(dataset.directory)


def edited(change: dict[str, Any], *, shard: dict[str, Any] | None = None, drop: str = "") -> Any:
    def edit(text: str) -> bytes:
        raw = json.loads(text)
        raw.update(change)
        raw["shards"][0].update(shard or {})
        raw.pop(drop, None)
        return json.dumps(raw).encode()

    return edit


DAMAGES = {
    "empty": lambda text: b"",
    "cut short": lambda text: text.encode()[:-20],
    "not UTF-8": lambda text: b"\xff\xfe" + text.encode(),
    "a list": lambda text: b"[1, 2]",
    "a number": lambda text: b"7",
    "without shards": edited({}, drop="shards"),
    "without vocabulary": edited({}, drop="vocab_size"),
    "with an unknown key": edited({"colour": "red"}),
    "with shards that are numbers": lambda text: json.dumps(json.loads(text) | {"shards": [1]}).encode(),
    "of an odd dtype": edited({"dtype": "float32"}),
    "with a count that is text": edited({}, shard={"tokens": "10"}),
    "with a negative count": edited({}, shard={"documents": -1}),
    "with a fraction of an end-of-text token": edited({"eot_token_id": 0.5}),
    "with a shard elsewhere": edited({}, shard={"file": "../train-made-00000.bin"}),
    "with an unknown split": edited({}, shard={"split": "test"}),
    "with a tokenizer that is text": edited({"tokenizer": "gpt2"}),
    "with a tokenizer without checksum": edited({"tokenizer": {"name": "gpt2"}}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_index(dataset: TokenDataset, damage: Any) -> None:
    path = dataset.directory / "index.json"
    path.write_bytes(damage(path.read_text()))
    with pytest.raises(UserError, match=r"index\.json") as caught:
        TokenDataset.open(dataset.directory)
    assert "\n" not in str(caught.value)


def test_an_index_of_another_version(dataset: TokenDataset) -> None:
    path = dataset.directory / "index.json"
    path.write_bytes(edited({"format": "ln-removal tokens 9"})(path.read_text()))
    with pytest.raises(UserError, match="'ln-removal tokens 9'"):
        TokenDataset.open(dataset.directory)


def test_no_index(tmp_path: Path, dataset: TokenDataset) -> None:
    (dataset.directory / "index.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        TokenDataset.open(dataset.directory)
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="ln-prepare"):
            TokenDataset.open(place)


@pytest.mark.parametrize("named", ["data", "data/train.bin"])
def test_token_files_of_another_program_are_not_taken_for_an_unfinished_preparation(
    tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("train.bin", "val.bin"):
        np.arange(99, dtype=np.uint16).tofile(f"data/{name}")
    with pytest.raises(UserError) as caught:
        TokenDataset.open(named)
    for part in ("train.bin, val.bin", "nanoGPT", "ln-prepare", "openwebtext"):
        assert part in str(caught.value)
    assert "unfinished" not in str(caught.value)


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json_atomically(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"new": list(range(1000)), "bad": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    write_json_atomically(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]
