"""Preparing a corpus: what ends up in the shards, and that an interruption at any place changes nothing about it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Commands, done, refused
from filelock import FileLock
from small_model import REMOVE, write_corpus
from tokenizers import Tokenizer

from ln_removal.data import encoder
from ln_removal.data import prepare as prepare_module
from ln_removal.data import tokens as tokens_module
from ln_removal.data.corpora import Document, LocalFiles, Split, TokenDocument
from ln_removal.data.encoder import END_OF_TEXT, train_code_tokenizer
from ln_removal.data.open_corpus import HeldOutText
from ln_removal.data.prepare import QUEUED_BATCHES, PrepareProgress, prepare
from ln_removal.data.tokens import TokenDataset
from ln_removal.errors import UserError

BATCH = 4
"""Documents in a batch, in these tests."""

EOT = 0
AnyDocument = Document | TokenDocument


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = [f"def f{n}(x):\n    return x + {n}  # héllo\n" for n in range(200)]
    return train_code_tokenizer(texts, 300, model_max_length=64)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_DOCUMENTS", BATCH)


class ListCorpus:
    """A corpus of given documents; `before` is called with the number of each before it is given."""

    name = "listed"

    def __init__(
        self, documents: list[AnyDocument], before: Callable[[int], None] | None = None, **options: Any
    ) -> None:
        self._documents = documents
        self._before = before
        self._options = options

    def identity(self) -> dict[str, object]:
        return {"name": self.name, **self._options}

    def documents(self, skip: int = 0) -> Iterator[AnyDocument]:
        for number, document in enumerate(self._documents):
            if number >= skip:
                if self._before is not None:
                    self._before(number)
                yield document


def text(number: int) -> str:
    return f"def name_{number}(x):\n    return x * {number * 7919} + 'é{'a' * (number % 13)}'\n"


def documents(count: int = 60) -> list[AnyDocument]:
    """Every fifth for validation; training text from two sources."""
    return [
        Document(text(n), "validation" if n % 5 == 1 else "train", "one" if n % 5 == 1 or n % 2 else "two")
        for n in range(count)
    ]


def run(corpus: ListCorpus, tokenizer: Any, out: Path, **options: Any) -> TokenDataset:
    return prepare(corpus, tokenizer, out, tokenizer_name="test", tokenizer_sha256="a" * 64, **options)  # type: ignore[arg-type]


def contents(directory: Path) -> dict[str, bytes]:
    """Shards and index; the lock file stays behind and does not count."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "prepare.lock"}


def tokens_of(data: TokenDataset, split: Split, source: str | None = None) -> list[int]:
    part = data.split(split)
    chosen = [number for number, shard in enumerate(part.shards) if source in (None, shard.source)]
    return [token for number in chosen for token in part.maps[number].tolist()]


def test_documents_come_back_in_order_each_with_its_end(tmp_path: Path, tokenizer: Any) -> None:
    given = documents()
    data = run(ListCorpus(given), tokenizer, tmp_path)
    data.verify()
    for split in ("train", "validation"):
        for source in ("one", "two"):
            texts = [d.text for d in given if isinstance(d, Document) and (d.split, d.source) == (split, source)]
            found = tokens_of(data, split, source)
            assert found.count(EOT) == len(texts)
            assert not found or found[-1] == EOT
            assert tokenizer.decode(found).split(END_OF_TEXT)[:-1] == texts
        of_split = [document for document in given if document.split == split]
        part = data.split(split)
        assert part.documents == len(of_split)
        assert part.bytes == sum(len(document.text.encode()) for document in of_split)
        assert part.tokens == len(tokens_of(data, split))
    assert {shard.source for shard in data.index.shards} == {"one", "two"}
    assert data.index.dtype == "uint16"
    assert data.vocab_size == len(tokenizer)
    assert data.tokenizer == {"name": "test", "sha256": "a" * 64, "ids_sha256": tokens_module.ids_sha256(tokenizer)}
    assert sorted(contents(tmp_path)) == [
        "index.json",
        "train-one-00000.bin",
        "train-two-00000.bin",
        "validation-one-00000.bin",
    ]


def test_end_of_text_spelled_out_in_a_document_is_text(tmp_path: Path, tokenizer: Any) -> None:
    spelled = f"token = '{END_OF_TEXT}'\n"
    assert EOT in tokenizer(spelled).input_ids, "the tokenizer itself makes it the special token"
    data = run(ListCorpus([Document(spelled, "train", "a"), Document(spelled, "validation", "a")]), tokenizer, tmp_path)
    found = tokens_of(data, "train")
    assert found.index(EOT) == len(found) - 1
    assert tokenizer.decode(found) == spelled + END_OF_TEXT


def test_what_the_tokenizer_was_saved_with_does_not_cut_or_pad(tmp_path: Path, tokenizer: Any) -> None:
    expected = run(ListCorpus(documents()), tokenizer, tmp_path / "plain")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=50)
    found = run(ListCorpus(documents()), PlainTokenizer(backend), tmp_path / "cut")
    assert contents(found.directory) == contents(expected.directory)
    assert backend.truncation is not None and backend.padding is not None, "the caller's tokenizer stays as it was"


class PlainTokenizer:
    """What `prepare` needs of a tokenizer."""

    def __init__(self, backend: Tokenizer, eos_token_id: int | None = EOT) -> None:
        self.backend_tokenizer = backend
        self.eos_token_id = eos_token_id

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path, tokenizer: Any) -> None:
    class Wide(PlainTokenizer):
        def __len__(self) -> int:
            return 70_000

    given: list[AnyDocument] = [
        TokenDocument([65_536, 69_999, 1], "train", "rows"),
        TokenDocument([2], "validation", "rows"),
    ]
    data = run(ListCorpus(given), Wide(tokenizer.backend_tokenizer), tmp_path)
    assert data.index.dtype == "uint32"
    assert tokens_of(data, "train") == [65_536, 69_999, 1]


def test_rows_that_are_tokenised_already_are_taken_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    rows = [[5, 6, EOT, 7], [8, 9], [], [10]]
    given: list[AnyDocument] = [TokenDocument(row, "train", "rows") for row in rows]
    given.append(TokenDocument([1, 2], "validation", "rows"))
    given.append(Document(text(0), "train", "texts"))
    data = run(ListCorpus(given), tokenizer, tmp_path)
    assert tokens_of(data, "train", "rows") == [5, 6, EOT, 7, 8, 9, 10]
    (shard,) = [shard for shard in data.index.shards if (shard.split, shard.source) == ("train", "rows")]
    assert (shard.documents, shard.tokens, shard.bytes) == (4, 7, 0)
    assert tokenizer.decode(tokens_of(data, "train", "texts")) == text(0) + END_OF_TEXT


@pytest.mark.parametrize("wrong", [300, 70_000, -1])
def test_a_token_the_tokenizer_does_not_have(tmp_path: Path, tokenizer: Any, wrong: int) -> None:
    assert len(tokenizer) == 300
    given: list[AnyDocument] = [TokenDocument([1, wrong, 2], "train", "rows")]
    with pytest.raises(UserError, match=str(wrong)):
        run(ListCorpus(given), tokenizer, tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_shards_are_closed_between_documents(tmp_path: Path, tokenizer: Any) -> None:
    whole = run(ListCorpus(documents()), tokenizer, tmp_path / "whole")
    data = run(ListCorpus(documents()), tokenizer, tmp_path / "many", shard_tokens=100)
    assert len(data.index.shards) > 10
    assert len({shard.file for shard in data.index.shards}) == len(data.index.shards)
    for part in (data.split("train"), data.split("validation")):
        assert all(shard[-1] == EOT for shard in part.maps)
    data.verify()
    for split in ("train", "validation"):
        for source in ("one", "two"):
            assert tokens_of(data, split, source) == tokens_of(whole, split, source)
        assert data.split(split).documents == whole.split(split).documents
        assert data.split(split).bytes == whole.split(split).bytes


def test_sources_whose_file_names_would_be_the_same(tmp_path: Path, tokenizer: Any) -> None:
    given: list[AnyDocument] = [
        Document(text(n), "train" if n else "validation", source) for n in range(40) for source in ("a/b", "a-b", "a b")
    ]
    data = run(ListCorpus(given), tokenizer, tmp_path, shard_tokens=200)
    assert len({shard.file for shard in data.index.shards}) == len(data.index.shards)
    texts = "".join(text(n) + END_OF_TEXT for n in range(1, 40))
    for source in ("a/b", "a-b", "a b"):
        assert tokenizer.decode(tokens_of(data, "train", source)) == texts


@pytest.mark.parametrize(("place", "shard_tokens"), [(0, 150), (3, 100_000), (21, 150), (39, 100_000), (59, 150)])
def test_an_interrupted_preparation_resumes_to_the_same_bytes(
    tmp_path: Path, tokenizer: Any, place: int, shard_tokens: int
) -> None:
    options = {"shard_tokens": shard_tokens, "checkpoint_tokens": 300}
    whole = run(ListCorpus(documents()), tokenizer, tmp_path / "whole", **options)

    def fail(number: int) -> None:
        if number == place:
            raise RuntimeError("the connection broke")

    with pytest.raises(RuntimeError, match="the connection broke"):
        run(ListCorpus(documents(), before=fail), tokenizer, tmp_path / "broken", **options)
    assert not (tmp_path / "broken" / "index.json").exists()
    asked: list[int] = []
    run(ListCorpus(documents(), before=asked.append), tokenizer, tmp_path / "broken", **options)
    assert contents(tmp_path / "broken") == contents(whole.directory)
    assert asked[-1] == 59
    if place >= 39:
        assert asked[0] > 0, "documents behind a checkpoint are not encoded again"


def test_documents_without_text_are_counted_once_across_interruptions(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    given = documents()
    for number in (2, 7, 30, 58):
        given[number] = TokenDocument([], "train", "one")

    def fail(number: int) -> None:
        if number == 45:
            raise RuntimeError("the connection broke")

    options = {"shard_tokens": 150, "checkpoint_tokens": 300}
    with pytest.raises(RuntimeError, match="the connection broke"):
        run(ListCorpus(given, before=fail), tokenizer, tmp_path / "broken", **options)
    assert not caplog.messages
    asked: list[int] = []
    resumed = run(ListCorpus(given, before=asked.append), tokenizer, tmp_path / "broken", **options)
    assert 7 < asked[0] <= 45, "some of them were read before the interruption"
    assert resumed.index.without_text == 4
    (message,) = caplog.messages
    assert "listed" in message and " 4 of the documents" in message
    texts = run(
        ListCorpus([document for document in given if isinstance(document, Document)]), tokenizer, tmp_path / "all"
    )
    for source in ("one", "two"):
        assert tokens_of(resumed, "train", source) == tokens_of(texts, "train", source)


def test_an_index_without_the_count_of_empty_documents_is_read(tmp_path: Path, tokenizer: Any) -> None:
    run(ListCorpus(documents()), tokenizer, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    del index["without_text"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert run(ListCorpus(documents()), tokenizer, tmp_path).index.without_text == 0


def test_what_was_changed_or_passed_over_is_said_at_the_end(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": null}\n{"text": "caf\xe9"}\n{"text": "two"}\n')
    (texts / "b.csv").write_text("text\n")
    for corpus in (LocalFiles(texts), HeldOutText(LocalFiles(texts))):
        caplog.clear()
        for _ in range(2):  # what was prepared before is opened without a word
            run(corpus, tokenizer, tmp_path / type(corpus).__name__)  # type: ignore[arg-type]
        replaced, without_text, passed_over = caplog.messages
        assert "UTF-8" in replaced and " 1 of" in replaced and "a.jsonl, line 3" in replaced
        assert "'text'" in without_text and " 1 of" in without_text and "a.jsonl, line 2" in without_text
        assert "1 .csv" in passed_over


def test_worker_processes_change_nothing(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"shard_tokens": 150, "checkpoint_tokens": 300}
    whole = run(ListCorpus(documents()), tokenizer, tmp_path / "whole", workers=1, **options)
    monkeypatch.setattr(encoder, "BYTES_ALONE", 0)

    def fail(number: int) -> None:
        if number == 55:
            raise RuntimeError("the connection broke")

    with pytest.raises(RuntimeError, match="the connection broke"):
        run(ListCorpus(documents(), before=fail), tokenizer, tmp_path / "broken", workers=2, **options)
    given: list[int] = []
    ahead: list[int] = []
    progress = ahead_of(given, ahead)
    corpus = ListCorpus(documents(), before=given.append)
    run(corpus, tokenizer, tmp_path / "broken", workers=2, progress=progress, **options)
    assert given[0] > 0, "it was resumed"
    assert contents(tmp_path / "broken") == contents(whole.directory)
    assert max(ahead) <= (QUEUED_BATCHES + 2 + 2 * encoder.BATCHES_A_WORKER) * BATCH


def ahead_of(given: list[int], ahead: list[int]) -> Callable[[PrepareProgress], None]:
    """A progress callback that notes how many documents were read and not yet written."""

    def look(progress: PrepareProgress) -> None:
        time.sleep(0.01)  # time enough for a reader without limit to run away
        ahead.append(given[-1] + 1 - progress.documents)

    return look


def prepare_and_hang() -> None:
    """In a process of its own, with TOKENIZER OUT: it stops at document 55 and waits to be killed."""
    prepare_module.BATCH_DOCUMENTS = BATCH

    def wait(number: int) -> None:
        if number == 55:
            time.sleep(600)

    corpus = ListCorpus(documents(), before=wait)
    tokenizer = PlainTokenizer(Tokenizer.from_file(sys.argv[1]))
    run(corpus, tokenizer, Path(sys.argv[2]), shard_tokens=150, checkpoint_tokens=300)


def test_a_killed_preparation_resumes_to_the_same_bytes(tmp_path: Path, tokenizer: Any, forked: Commands) -> None:
    options = {"shard_tokens": 150, "checkpoint_tokens": 300}
    whole = run(ListCorpus(documents()), tokenizer, tmp_path / "whole", **options)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "killed"
    worker = forked.start("test_prepare:prepare_and_hang", str(tmp_path / "tokenizer.json"), str(out))

    def consumed() -> int:
        progress = out / "progress.json"
        return int(json.loads(progress.read_text())["consumed"]) if progress.exists() else 0

    worker.wait_until(lambda: consumed() >= 30).send(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    assert consumed() >= 30
    assert not (out / "index.json").exists()
    # What a power cut may leave behind the last checkpoint.
    last = json.loads((out / "progress.json").read_text())["index"]["shards"][-1]["file"]
    with (out / last).open("ab") as file:
        file.write(b"garbage")
    (out / "train-three-00000.bin").write_bytes(b"begun after the checkpoint")
    asked: list[int] = []
    run(ListCorpus(documents(), before=asked.append), tokenizer, out, **options)
    assert contents(out) == contents(whole.directory)
    assert asked[0] >= 30


def test_a_damaged_progress_file(tmp_path: Path, tokenizer: Any) -> None:
    def fail(number: int) -> None:
        if number == 50:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run(ListCorpus(documents(), before=fail), tokenizer, tmp_path, checkpoint_tokens=300)
    progress = tmp_path / "progress.json"
    whole = progress.read_bytes()
    for damaged in (b"", whole[:-30], b"[]", b"\xff\xfe", whole.replace(b'"consumed"', b'"eaten"')):
        progress.write_bytes(damaged)
        with pytest.raises(UserError, match=r"progress\.json"):
            run(ListCorpus(documents()), tokenizer, tmp_path)
    progress.write_bytes(whole)
    (tmp_path / "train-one-00000.bin").write_bytes(b"short")
    with pytest.raises(UserError, match=r"train-one-00000\.bin"):
        run(ListCorpus(documents()), tokenizer, tmp_path)


def refuse(number: int) -> None:
    raise AssertionError("nothing should be read")


def test_a_complete_directory_is_opened_and_not_read_again(tmp_path: Path, tokenizer: Any) -> None:
    first = run(ListCorpus(documents()), tokenizer, tmp_path)
    again = run(ListCorpus(documents(), before=refuse), tokenizer, tmp_path)
    assert again.index == first.index


@pytest.mark.parametrize("complete", [True, False])
def test_another_corpus_or_tokenizer_in_the_directory(tmp_path: Path, tokenizer: Any, complete: bool) -> None:
    def fail(number: int) -> None:
        if number == 50 and not complete:
            raise RuntimeError

    try:
        run(ListCorpus(documents(), before=fail, revision=1), tokenizer, tmp_path, checkpoint_tokens=300)
    except RuntimeError:
        assert (tmp_path / "progress.json").exists()
    before = contents(tmp_path)
    same = ListCorpus(documents(), before=refuse, revision=1)
    with pytest.raises(UserError, match="revision"):
        run(ListCorpus(documents(), before=refuse, revision=2), tokenizer, tmp_path)
    with pytest.raises(UserError, match="max_tokens"):
        run(same, tokenizer, tmp_path, max_tokens=10)
    other = train_code_tokenizer(["while True: print(1, 2)\n"] * 20, 300, model_max_length=64)
    with pytest.raises(UserError, match=r"aaaaaaaa.*bbbbbbbb"):
        prepare(same, other, tmp_path, tokenizer_name="other", tokenizer_sha256="b" * 64)  # type: ignore[arg-type]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("complete", [True, False])
def test_local_files_are_compared_by_content_where_times_or_place_differ(
    tmp_path: Path, tokenizer: Any, complete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, out = write_corpus(tmp_path / "texts"), tmp_path / "tokens"
    expected = run(LocalFiles(texts), tokenizer, tmp_path / "expected")
    if complete:
        run(LocalFiles(texts), tokenizer, out)
    else:
        real = prepare_module._batches

        def stopped(corpus: Any, skip: int) -> Iterator[Any]:
            yield from itertools.islice(real(corpus, skip), 3)
            raise RuntimeError

        monkeypatch.setattr(prepare_module, "_batches", stopped)
        with pytest.raises(RuntimeError):
            run(LocalFiles(texts), tokenizer, out, checkpoint_tokens=300)
        monkeypatch.setattr(prepare_module, "_batches", real)
    copied = shutil.copytree(texts, tmp_path / "copied")
    file = sorted(texts.glob("*.txt"))[-1]
    content, changed = file.read_bytes(), file.read_bytes().replace(b"value", b"VALUE")
    before = contents(out)
    file.write_bytes(changed)  # of the same size
    os.utime(file, (1, 1))
    with pytest.raises(UserError, match="content of the files"):
        run(LocalFiles(texts), tokenizer, out)
    assert contents(out) == before
    file.write_bytes(content)
    os.utime(file, (2, 2))
    for place in (texts, copied):
        found = run(LocalFiles(place), tokenizer, out)
        assert found.split("train").tokens == expected.split("train").tokens
        assert contents(out)["train-local-00000.bin"] == contents(tmp_path / "expected")["train-local-00000.bin"]


def test_tokens_of_an_older_version_are_compared_by_size_and_time(tmp_path: Path, tokenizer: Any) -> None:
    texts, out = write_corpus(tmp_path / "texts", documents=4), tmp_path / "tokens"
    run(LocalFiles(texts), tokenizer, out)
    index = json.loads((out / "index.json").read_text())
    del index["corpus"][prepare_module.CONTENT], index["tokenizer"]["ids_sha256"]
    (out / "index.json").write_text(json.dumps(index))
    run(LocalFiles(texts), tokenizer, out)
    os.utime(next(texts.glob("*.txt")), (1, 1))
    with pytest.raises(UserError, match=f"times of the files in {texts}"):
        run(LocalFiles(texts), tokenizer, out)


def test_a_failed_preparation_leaves_nothing_but_what_another_process_makes(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "train-one-00000.bin").write_bytes(b"in the making")
    only_training = ListCorpus([document for document in documents() if document.split == "train"])
    with FileLock(tmp_path / prepare_module.LOCK), pytest.raises(UserError, match="another process is preparing"):
        run(only_training, tokenizer, tmp_path)
    assert (tmp_path / "train-one-00000.bin").exists()
    with pytest.raises(UserError, match="gave no validation document"):
        run(only_training, tokenizer, tmp_path)
    assert not tmp_path.exists()


def test_many_ranks_may_open_a_complete_directory_at_once(tmp_path: Path, tokenizer: Any) -> None:
    run(ListCorpus(documents()), tokenizer, tmp_path)
    with FileLock(tmp_path / prepare_module.LOCK):
        run(ListCorpus(documents(), before=refuse), tokenizer, tmp_path)


def test_max_tokens_stops_after_the_batch_that_reaches_it(tmp_path: Path, tokenizer: Any) -> None:
    asked: list[int] = []
    corpus = ListCorpus(documents(4000), before=asked.append)
    seen: list[PrepareProgress] = []
    data = run(corpus, tokenizer, tmp_path, max_tokens=500, progress=seen.append)
    assert data.split("train").tokens >= 500
    whole = run(ListCorpus(documents()), tokenizer, tmp_path / "whole")
    prefix = tokens_of(data, "train", "two")
    assert tokens_of(whole, "train", "two")[: len(prefix)] == prefix
    total = data.split("train").documents + data.split("validation").documents
    assert seen[-1].documents == total == BATCH * len(seen)
    assert data.split("train").tokens < 500 + BATCH * 50, "no more than one batch beyond"
    assert max(asked) < total + (QUEUED_BATCHES + 2) * BATCH


def test_a_crash_after_max_tokens_does_not_add_more(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    whole = run(ListCorpus(documents()), tokenizer, tmp_path / "whole", max_tokens=500, checkpoint_tokens=1)

    def crash(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tokens_module, "checksum", crash)
        with pytest.raises(KeyboardInterrupt):
            run(ListCorpus(documents()), tokenizer, tmp_path / "broken", max_tokens=500, checkpoint_tokens=1)
    run(ListCorpus(documents(), before=refuse), tokenizer, tmp_path / "broken", max_tokens=500, checkpoint_tokens=1)
    assert contents(tmp_path / "broken") == contents(whole.directory)


def test_a_corpus_is_read_a_few_batches_ahead_and_no_further(tmp_path: Path, tokenizer: Any) -> None:
    given: list[int] = []
    ahead: list[int] = []
    run(ListCorpus(documents(400), before=given.append), tokenizer, tmp_path, progress=ahead_of(given, ahead))
    # One batch being read, the queue, and one that waits to be put into it.
    assert max(ahead) <= (QUEUED_BATCHES + 2) * BATCH
    assert max(ahead) > BATCH, "but it is read ahead"
    assert len(ahead) == 100


def test_a_corpus_without_one_of_the_splits(tmp_path: Path, tokenizer: Any) -> None:
    train: list[AnyDocument] = [Document(text(n), "train", "a") for n in range(40)]
    validation: list[AnyDocument] = [Document(text(0), "validation", "a")]
    with pytest.raises(UserError, match=r"listed.*validation"):
        run(ListCorpus(train), tokenizer, tmp_path / "a")
    with pytest.raises(UserError, match="train"):
        run(ListCorpus(validation), tokenizer, tmp_path / "b")
    with pytest.raises(UserError, match="train"):
        run(ListCorpus([]), tokenizer, tmp_path / "c")
    with pytest.raises(UserError, match="max_tokens"):
        run(ListCorpus(train + validation), tokenizer, tmp_path / "d", max_tokens=100)


def test_the_code_tokenizer(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == tokenizer.eos_token_id == EOT
    for sample in (text(3), "  \n\n\t x\r\n  y", "naïve 漢字 🙂 \x00", "a.b_c(self)[1234567]", ""):
        assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    trained_on = "def f7(x):\n    return x + 7  # héllo\n"
    assert len(tokenizer(trained_on).input_ids) < len(trained_on.encode()) / 2


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.usefixtures("here")
def test_the_share_of_validation_documents(share: float) -> None:
    rows = "".join(json.dumps({"text": text(number)}) + "\n" for number in range(300))
    Path("new").mkdir()
    Path("new/rows.jsonl").write_text(rows, encoding="utf-8")
    done(f"ln-prepare new/rows.jsonl --tokenizer model --validation-share {share} --out new/tokens")
    assert TokenDataset.open("new/tokens").split("validation").documents == pytest.approx(300 * share, abs=20)
    assert "validation_fraction" in refused("ln-prepare new/rows.jsonl --tokenizer model --out new/tokens")
    again = f"{REMOVE} --set data.corpus=new/rows.jsonl --set data.validation_share={share} --out new/run"
    done(again.replace("--set data.corpus=texts ", ""))
    of_run = TokenDataset.open("new/run/tokens")
    assert of_run.split("validation").documents == TokenDataset.open("new/tokens").split("validation").documents


@pytest.mark.parametrize("corpus", ["python-source", "openwebtext"])
@pytest.mark.usefixtures("here")
def test_a_share_for_a_corpus_that_has_its_own_split(corpus: str) -> None:
    line = refused(f"ln-prepare {corpus} --tokenizer model --validation-share 0.1 --out new")
    assert corpus in line and "--validation-share" in line and not Path("new").exists()
