"""Local files as corpora: what is read, in which order, into which split, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from ln_removal.data.corpora import Corpus, Document, LocalFiles, hash_split
from ln_removal.data.open_corpus import PythonSource, known_corpora, open_corpus
from ln_removal.data.text_files import MAXIMUM_PIECE_BYTES, WHOLE_FILE_BYTES
from ln_removal.errors import UserError


def write_jsonl(path: Path, rows: list[object]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def write_parquet(path: Path, columns: dict[str, list[object]], rows_in_group: int = 100) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path, row_group_size=rows_in_group)
    return path


def texts(path: Path, **options: object) -> list[str]:
    return [document.text for document in LocalFiles(path, **options).documents()]  # type: ignore[arg-type]


def test_directory_is_read_in_sorted_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "z.txt").write_text("last")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "b" / "code.py").write_text("x = 1")
    (tmp_path / "b" / "empty.py").write_text(" \n")
    (tmp_path / "b" / "blob.txt").write_bytes(b"PK\0\1\2")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git" / "config.txt").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    write_jsonl(tmp_path / "b" / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    write_jsonl(tmp_path / "b" / "rows.jsonl.gz", [{"text": "three"}])
    write_parquet(tmp_path / "b" / "table.parquet", {"text": ["four", "five"], "other": [1, 2]})

    corpus = LocalFiles(tmp_path)
    assert isinstance(corpus, Corpus)
    documents = list(corpus.documents())
    assert [document.text for document in documents] == [
        "first", "last", "x = 1", "one", "two", "three", "four", "five"
    ]  # fmt: skip
    assert all(isinstance(document, Document) for document in documents)
    assert {document.source for document in documents} == {"local"}


def zstandard(data: bytes) -> bytes:
    import pyarrow as pa

    compressed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return compressed


@pytest.mark.parametrize(
    ("ending", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstandard)],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with a mark"])
def test_text_and_json_are_read_in_each_compression_and_encoding(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes], encoding: str
) -> None:
    def write(name: str, text: str) -> None:
        encoded = ("\ufeff" + text).encode("utf-16-be") if encoding.endswith("mark") else text.encode(encoding)
        (tmp_path / f"{name}{ending}").write_bytes(compress(encoded))

    rows = [{"text": "é€𝄞 one\u2028line"}, {"text": "two"}]
    write("a.txt", "naïve\ntext")
    write("b.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write("c.ndjson", "".join(json.dumps(row) + "\r\n" for row in rows))
    write("d.json", "\n" + json.dumps(rows, indent=2, ensure_ascii=False))
    write("e.JSON", "".join(json.dumps(row) + "\n" for row in rows))
    corpus = LocalFiles(tmp_path)
    assert [document.text for document in corpus.documents()] == ["naïve\ntext", *4 * [row["text"] for row in rows]]
    assert corpus.remarks() == []
    assert texts(tmp_path / f"d.json{ending}") == [row["text"] for row in rows]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_large_compressed_text_is_cut_as_the_plain_one_is(tmp_path: Path, encoding: str) -> None:
    text = "".join(f"paragraph {number}: {'wörd ' * 150}\n\n" for number in range(2000))
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    assert (tmp_path / "plain.txt").stat().st_size > WHOLE_FILE_BYTES
    (tmp_path / "packed.txt.zst").write_bytes(zstandard(text.encode(encoding)))
    assert texts(tmp_path / "packed.txt.zst") == texts(tmp_path / "plain.txt")


def test_half_a_character_of_utf16_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one".encode("utf-16") + b"\x3d\xd8x\0")
    (tmp_path / "b.txt").write_bytes("two".encode("utf-16") + b"x")
    corpus = LocalFiles(tmp_path)
    assert [document.text for document in corpus.documents()] == ["one\ufffd\ufffd\ufffdx", "two\ufffd"]
    assert " 2 of the documents" in corpus.remarks()[0]


def test_links_are_followed_once(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "sub").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    (inside / ".store").mkdir()
    (inside / "a.txt").write_text("a")
    (inside / "sub" / "b.txt").write_text("b")
    (inside / ".store" / "e.txt").write_text("e")
    (outside / "c.txt").write_text("c")
    (outside / "deep" / "d.txt").write_text("d")
    for link, target in {
        "again.txt": inside / "a.txt",
        "copy": inside / "sub",
        "loop": inside,
        "upwards": tmp_path,
        "elsewhere": outside,
        "elsewhere-2": outside,
        "file.txt": outside / "c.txt",
        "stored.txt": inside / ".store" / "e.txt",
    }.items():
        (inside / link).symlink_to(target)
    (outside / "deep" / "back").symlink_to(outside)
    corpus = LocalFiles(inside)
    assert sorted(document.text for document in corpus.documents()) == ["a", "b", "c", "d", "e"]
    assert list(corpus.documents()) == list(LocalFiles(inside).documents())
    assert corpus.remarks() == []


def test_one_line_says_what_was_passed_over(tmp_path: Path) -> None:
    for name, content in {
        "a.txt": b"one", "b.txt": b"two", "c.csv": b"text\nthree\n", "d.csv": b"", "e.png": b"\x89PNG", "LICENSE": b"l",
        "f.txt": b"PK\0", "settings.json": b'{\n "lines": 1\n}', ".hidden.txt": b"h", "g.parquet.gz": b"g",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    corpus = LocalFiles(tmp_path)
    assert [document.text for document in corpus.documents()] == ["one", "two"]
    (remark,) = corpus.remarks()
    for part in ("2 .csv", "1 .png", "1 without an ending", "1 binary .txt", "1 .json", "1 broken link", ".parquet.gz"):
        assert part in remark
    with pytest.raises(UserError, match=r"settings.json, line 1"):
        list(LocalFiles(tmp_path / "settings.json").documents())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_rows_without_text_are_passed_over_and_counted_in_every_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    values: list[object] = ["one", None, "two", "", None, "three"]
    if name.endswith("parquet"):
        write_parquet(path, {"text": values})
    elif name.endswith("jsonl"):
        write_jsonl(path, [{"text": value} for value in values])
    else:
        path.write_text(json.dumps([{"text": value} for value in values], indent=0))
    corpus = LocalFiles(path)
    splits = {document.text: document.split for document in corpus.documents(skip=1)}
    (remark,) = corpus.remarks()
    assert list(splits) == ["two", "three"]
    assert " 3 of the rows" in remark and {"jsonl": "line 2", "json": "line 5", "parquet": "row 2"}[name[5:]] in remark


@pytest.mark.parametrize("skip", [0, 1, 3, 7, 8, 20])
def test_skip_gives_the_rest_of_the_same_stream(tmp_path: Path, skip: int) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {number}"} for number in range(7)])
    (tmp_path / "a.txt").write_text("a")
    corpus = LocalFiles(tmp_path, validation_fraction=0.3)
    assert list(corpus.documents(skip)) == list(corpus.documents())[skip:]


def test_large_text_is_streamed_in_pieces_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {number}: " + "wörd " * 150 for number in range(2000)]
    text = "\n\n".join(paragraphs)
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    pieces = texts(path)
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert {document.split for document in LocalFiles(path).documents()} == {"train", "validation"}


def test_a_file_without_any_blank_line_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    text = "a" + "é€𝄞" * 150_000
    path.write_text(text, encoding="utf-8")
    corpus = LocalFiles(path)
    pieces = [document.text for document in corpus.documents()]
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= MAXIMUM_PIECE_BYTES
    assert corpus.remarks() == []


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        for number in range(20_000):
            file.write(json.dumps({"text": f"{number} " * 250}) + "\n")
    corpus = LocalFiles(path)
    tracemalloc.start()
    size = sum(len(document.text) for document in corpus.documents())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 20_000_000
    assert peak < 4_000_000


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"body": [f"row {n}" for n in range(2500)]}, rows_in_group=300)
    assert texts(path, field="body") == [f"row {number}" for number in range(2500)]


def test_invalid_utf8_is_replaced_and_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("café", encoding="utf-8")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "na\xefve"}\n{"text": "half \\ud83d a pair"}\n')
    (tmp_path / "d.txt").write_text("\ufeffafter a byte-order mark", encoding="utf-8")
    corpus = LocalFiles(tmp_path)
    found = [document.text for document in corpus.documents()]
    assert found == ["caf\ufffd", "café", "na\ufffdve", "half \ufffd a pair", "after a byte-order mark"]
    (remark,) = corpus.remarks()
    assert " 3 of the documents" in remark and str(tmp_path / "a.txt") in remark and "UTF-8" in remark
    assert all(text.encode() for text in found)


def test_split_is_a_hash_and_does_not_depend_on_the_files_before(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}"} for number in range(4000)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    held_out = {d.text for d in LocalFiles(path, validation_fraction=0.05).documents() if d.split == "validation"}
    assert 140 < len(held_out) < 260
    write_jsonl(tmp_path / "earlier.jsonl", [{"text": f"new {number}"} for number in range(5)])
    both = {
        d.text
        for d in LocalFiles(tmp_path, validation_fraction=0.05).documents()
        if d.split == "validation" and d.text.startswith("row")
    }
    assert len(held_out ^ both) <= 2  # the first and the second document of the corpus have fixed splits


def test_two_documents_are_enough_for_both_splits(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    assert [document.split for document in LocalFiles(path).documents()] == ["train", "validation"]
    assert [hash_split(index, "k", 1.0) for index in range(3)] == ["train", "validation", "validation"]


def test_max_bytes_limits_the_training_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "é" * 500} for _ in range(100)])
    documents = list(LocalFiles(path, max_bytes=10_000).documents())
    assert sum(len(document.text.encode()) for document in documents if document.split == "train") == 10_000
    assert any(document.split == "validation" for document in documents)


def test_identity_changes_with_content_and_options(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    before = LocalFiles(tmp_path).identity()
    assert LocalFiles(tmp_path).identity() == before
    assert LocalFiles(tmp_path, field="body").identity() != before
    with path.open("a") as file:
        file.write('{"text": "three"}\n')
    assert LocalFiles(tmp_path).identity() != before
    json.dumps(before)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", b'{"text": "a"}\n\n{"text": \n', ["rows.jsonl, line 3", "not JSON"]),
        ("rows.jsonl", b'{"text": "a"}\n{"body": "b", "id": 7}\n', ["line 2", "'text'", "body, id", "field"]),
        ("rows.jsonl", b'{"text": "a"}\n["text"]\n', ["line 2", "list"]),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 7}\n', ["line 2", "'text'", "7"]),
        ("rows.json", b'[\n{"text": "a"},\n{"text": "b"}\n', ["rows.json, line 4", "not JSON"]),
        ("rows.json", b'[\n{"text": "a"},\n{"body": "b"}]', ["line 3", "'text'", "body"]),
        ("rows.jsonl.zst", b'{"text": "a"}\n', ["rows.jsonl.zst", "cannot be read"]),
        ("rows.jsonl.xz", b'{"text": "a"}\n', ["rows.jsonl.xz", "cannot be read"]),
        ("rows.txt.bz2", bz2.compress(b"a" * 999)[:-9], ["rows.txt.bz2", "cannot be read"]),
        ("rows.jsonl.gz", b'{"text": "a"}\n', ["rows.jsonl.gz", "cannot be read"]),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], ["rows.jsonl.gz", "cannot be read"]),
        ("table.parquet", b"PAR1 and then nothing", ["table.parquet", "not a whole parquet file"]),
        ("text.txt", b"PK\0\1", ["text.txt", "binary"]),
        ("text.txt", b"alone", ["1 documents", "at least 2"]),
        ("text.txt", b"", ["0 documents", "0 bytes"]),
        ("words.docx", b"PK", ["words.docx", ".jsonl.gz", ".ndjson", ".zst", ".parquet"]),
        ("table.csv", b"text\na\n", ["table.csv", ".jsonl"]),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(LocalFiles(tmp_path / name).documents())
    for part in expected:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_text_of_every_type_of_arrow(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = ["é one", None, "two", "é one"] * 300
    expected = [row for row in rows if row]
    for number, kind in enumerate(
        [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    ):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pa.table({"text": pa.array(rows, pa.string()).cast(kind)}), path, row_group_size=500)
        assert parquet.ParquetFile(path).schema_arrow.field("text").type == kind
        assert texts(path) == expected
    write_parquet(tmp_path / "4.parquet", {"text": [None, None]})  # a column of nulls has a type of its own
    assert texts(tmp_path) == 4 * expected
    parquet.write_table(pa.table({"text": pa.array([b"a", b"b"], pa.binary())}), tmp_path / "bytes.parquet")
    with pytest.raises(UserError, match=r"'text' holds binary"):
        texts(tmp_path / "bytes.parquet")


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"body": ["a"], "n": [1]})
    with pytest.raises(UserError, match=r"'text'.*body, n"):
        list(LocalFiles(path).documents())
    with pytest.raises(UserError, match=r"'n'.*int64"):
        list(LocalFiles(path, field="n").documents())


def test_directory_with_nothing_to_read_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("a")
    (tmp_path / "b.docx").write_text("b")
    (tmp_path / "c.json").write_text('[{"body": "c"}]')
    with pytest.raises(UserError, match=r"found 2 \.docx, 1 \.json; .*1 \.json without the field 'text'"):
        list(LocalFiles(tmp_path).documents())


def test_unusable_fraction(tmp_path: Path) -> None:
    for fraction in (0, -0.1, 1.5):
        with pytest.raises(UserError, match="validation_fraction"):
            LocalFiles(tmp_path, validation_fraction=fraction)


def test_open_corpus_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"body": "one"}, {"body": "two"}])
    corpus = open_corpus(str(tmp_path / "rows.jsonl"), field="body", max_bytes=None)
    assert [document.text for document in corpus.documents()] == ["one", "two"]  # type: ignore[union-attr]
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_corpus("rows.jsonl"), LocalFiles)
    assert isinstance(open_corpus("python-source", max_bytes=1000), PythonSource)
    assert {"python-source", "openwebtext", "the-pile", "codeparrot"} <= known_corpora().keys()


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("openwebtxt", {}, "did you mean openwebtext?"),
        ("quux", {}, "no corpus or file 'quux'; known: python-source, openwebtext"),
        ("./nowhere", {}, "no such file or directory: ./nowhere"),
        ("some/where.jsonl", {}, "no such file or directory"),
        ("hub:nobody", {}, "hub:OWNER/NAME"),
        ("python-source", {"field": "text"}, "python-source does not take the option field; it takes stdlib"),
        (
            "openwebtext",
            {"colour": 1},
            "does not take the option colour; it takes field, validation_fraction, max_bytes",
        ),
        ("pile-tokenized", {"max_bytes": 5}, "use --max-tokens"),
    ],
)
def test_open_corpus_refuses(name: str, options: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        open_corpus(name, **options)
    assert expected in str(caught.value)
