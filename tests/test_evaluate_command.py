"""`ln-evaluate` on several data sets, with overlap, odd text and prompts; held-out text prepared on the spot."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from small_model import write_corpus, write_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ln_removal.cli.evaluate import app
from ln_removal.data.corpora import Document, TokenDocument
from ln_removal.data.hub_corpora import KNOWN_CORPORA, HubCorpus
from ln_removal.data.open_corpus import HeldOutText, held_out_tokens
from ln_removal.data.stress_text import KINDS
from ln_removal.errors import UserError

runner = CliRunner()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluate")
    write_model(directory / "model")
    write_model(directory / "other", seed=1)
    write_corpus(directory / "texts", documents=24)
    (directory / "notes.txt").write_text("one note, held out as a whole\n" * 40, encoding="utf-8")
    return directory


def scored(*arguments: str) -> dict[str, Any]:
    result = runner.invoke(app, [*arguments, "--json", "--device", "cpu"])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_several_data_sets_in_one_call(place: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("ln-evaluate-*"))
    found = scored(
        str(place / "model"),
        *("--control", str(place / "other"), "--corpus", str(place / "texts"), "--corpus", str(place / "notes.txt")),
        *("--context", "32", "--max-tokens", "2000"),
    )
    assert set(Path(tempfile.gettempdir()).glob("ln-evaluate-*")) <= before, "tokens were left behind"
    texts, notes = found["by_data"]
    assert (texts["data"], notes["data"]) == (str(place / "texts"), str(place / "notes.txt"))
    assert found["cross_entropy"] == texts["cross_entropy"] and found["settings"]["data"] == texts["data"]
    assert texts["tokens"] <= 2000 and notes["tokens"] > 100, "a single file is evaluated as a whole"
    assert notes["bits_per_byte"]["original"] > 0
    assert [(d["model"], d["than"]) for d in texts["differences"]] == [("control", "original")]
    assert texts["differences"][0]["unit"] in ("documents", "windows")
    alone = scored(
        str(place / "model"), "--corpus", str(place / "notes.txt"), "--context", "32", "--max-tokens", "2000"
    )
    assert alone["cross_entropy"]["original"] == pytest.approx(notes["cross_entropy"]["original"], abs=1e-6)


def test_odd_text_prompts_and_stride(place: Path) -> None:
    arguments = [str(place / "model"), "--original", str(place / "other"), "--corpus", str(place / "notes.txt")]
    arguments += ["--context", "32", "--odd-text", "--prompt", "def f", "--prompt", "total", "--seed", "5"]
    found = scored(*arguments, "--stride", "8")
    assert [(one["kind"], one["bos"]) for one in found["odd_text"]] == [
        (kind, bos) for bos in (False, True) for kind in KINDS
    ]
    assert all(one["loss"]["original"] > 0 for one in found["odd_text"])
    assert [one["prompt"] for one in found["continuations"]] == ["def f", "total"]
    assert found["continuations"][0]["texts"]["original"]
    assert (found["by_data"][0]["stride"], found["by_data"][0]["context"]) == (8, 32)
    again = scored(*arguments, "--stride", "8")
    assert {**again, "seconds": 0} == {**found, "seconds": 0}, "seeded"
    overlapping = runner.invoke(app, [*arguments, "--stride", "8", "--device", "cpu"]).stdout
    assert "context 32, stride 8, " in " ".join(overlapping.split())
    table = runner.invoke(app, [*arguments, "--device", "cpu"]).stdout
    for shown in (
        *("Odd text", "form feeds", "tabs, with BOS", "worst window", "calibration error", "--- original", "def f"),
        *("document start, with BOS", "second copy, random tokens", "TransformerLens"),
    ):
        assert shown in table, shown


class Stream:
    """A corpus of documents that are held out every third time, and that must not be read to its end."""

    name = "stream"

    def identity(self) -> dict[str, object]:
        return {"name": self.name}

    def documents(self, skip: int = 0) -> Any:
        for number in range(1000):
            assert number < 100, "read on after there was enough"
            split = "validation" if number % 3 == 2 else "train"
            yield Document(f"document {number} " * 10, split, "s")  # type: ignore[arg-type]


def test_only_held_out_text_is_taken_and_no_more_than_needed() -> None:
    first, *rest = HeldOutText(Stream(), max_tokens=200).documents()
    assert isinstance(first, Document) and (first.text, first.split) == ("", "train")
    texts = [document.text for document in rest if isinstance(document, Document)]
    assert texts[:2] == ["document 2 " * 10, "document 5 " * 10]
    assert all(document.split == "validation" for document in rest)
    assert sum(len(text) for text in texts) >= 8 * 200 > sum(len(text) for text in texts[:-1])
    resumed = list(HeldOutText(Stream(), max_tokens=200).documents(skip=4))
    assert resumed == [first, *rest][4:]


def test_a_data_set_with_a_held_out_part_is_not_read_beyond_it() -> None:
    class Downloaded(HubCorpus):
        def documents(self, skip: int = 0) -> Any:
            for number in range(8):
                held_out = number < 3 or (number == 6 and self.source.nanogpt_split)
                assert number < 4 or self.source.nanogpt_split, "read on into the training split"
                yield Document(f"{number}", "validation" if held_out else "train", "s")

    def texts(name: str) -> list[str]:
        found = HeldOutText(Downloaded(KNOWN_CORPORA[name])).documents()
        return [document.text for document in found if isinstance(document, Document)]

    assert texts("wikitext") == texts("the-pile") == ["", "0", "1", "2"]
    assert texts("openwebtext") == ["", "0", "1", "2", "6"], "scattered over the whole data set"


def test_held_out_rows_of_tokens(place: Path, tmp_path: Path) -> None:
    class Rows(Stream):
        def documents(self, skip: int = 0) -> Any:
            for number in range(10):
                yield TokenDocument([1, 2, 3 + number], "validation" if number else "train", "s")

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    corpus = HeldOutText(Rows(), max_tokens=9)
    assert [document.tokens for document in corpus.documents() if isinstance(document, TokenDocument)] == [
        [1, 2, 4],
        [1, 2, 5],
        [1, 2, 6],
    ]
    data = held_out_tokens(str(place / "notes.txt"), tokenizer, tmp_path / "t", tokenizer_name="m", max_tokens=None)
    assert data.split("train").tokens == 1 and data.split("validation").documents == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no text"):
        list(HeldOutText(_files(tmp_path / "empty")).documents())


def _files(path: Path) -> Any:
    from ln_removal.data.corpora import LocalFiles

    return LocalFiles(path)
