"""Corpora of the Hub, streamed by the real clients from a Hub on localhost."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import FakeHub, run_client

from ln_removal.data.corpora import Document, TokenDocument
from ln_removal.data.hub_corpora import KNOWN_CORPORA, HubCorpus, _articles, hub_source, nanogpt_validation
from ln_removal.errors import UserError

Results = tuple[dict[str, Any], dict[str, int]]

DOCUMENTS_A_FILE = 60
OPENWEBTEXT = [f"document {number}" for number in range(3 * DOCUMENTS_A_FILE)]

# Read a corpus in the client's process and print what came out as one line of JSON.
PRELUDE = """
import json, time
from dataclasses import replace
from huggingface_hub import HfApi
from ln_removal.data.hub_corpora import KNOWN_CORPORA, HubCorpus
from ln_removal.data.open_corpus import open_corpus
from ln_removal.errors import UserError

def report(name, corpus, skip=0):
    result = {"name": name}
    try:
        result["documents"] = [
            [getattr(d, "text", None) or getattr(d, "tokens", ""), d.split, d.source] for d in corpus.documents(skip)
        ]
    except UserError as error:
        result["error"] = str(error)
    print(json.dumps(result), flush=True)
"""


def parquet(columns: dict[str, list[Any]], rows_in_group: int = 20) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=rows_in_group)
    return buffer.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def ballast(rows: int) -> list[bytes]:
    """A column that does not compress, so that reading a file shows in the bytes sent."""
    return [np.random.default_rng(row).bytes(20_000) for row in range(rows)]


def fill(hub: FakeHub) -> None:
    first = {"README.md": b"---\nlicense: cc0-1.0\n---\n", "openwebtext.py": b"raise SystemExit('a script ran')\n"}
    hub.add("datasets", "Skylion007/openwebtext", first)
    shards = {}
    for shard in range(3):
        rows = OPENWEBTEXT[shard * DOCUMENTS_A_FILE : (shard + 1) * DOCUMENTS_A_FILE]
        shards[f"plain_text/train/{shard:04d}.parquet"] = parquet({"text": rows, "ballast": ballast(len(rows))})
    hub.add("datasets", "Skylion007/openwebtext", shards, revision="refs/convert/parquet")
    sets = ["Pile-CC", "Books3", "OpenWebText2", "Github", "BookCorpus2"]
    pile = [{"text": f"{name} {number}", "meta": {"pile_set_name": name}} for number in range(4) for name in sets]
    hub.add(
        "datasets", "monology/pile-uncopyrighted", {"train/00.jsonl": jsonl(pile[5:]), "val.jsonl": jsonl(pile[:5])}
    )
    tokens = [[row] * 8 for row in range(50)]
    hub.add(
        "datasets",
        "apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
        {"data/train-00000-of-00001.parquet": parquet({"input_ids": tokens})},
    )
    lines = [
        "",
        " = First = \n",
        "",
        " one \n",
        " = = Section = = \n",
        " two \n",
        "",
        " = Second = \n",
        "",
        " three \n",
    ]
    wikitext = {
        f"wikitext-103-raw-v1/{split}-00000-of-00001.parquet": parquet({"text": lines})
        for split in ("train", "validation", "test")
    }
    configs = "".join(
        f"  - split: {split}\n    path: wikitext-103-raw-v1/{split}-*\n" for split in ("train", "validation", "test")
    )
    card = f"---\nconfigs:\n- config_name: wikitext-103-raw-v1\n  data_files:\n{configs}---\n"
    hub.add("datasets", "Salesforce/wikitext", {"README.md": card.encode(), **wikitext})
    hub.add("datasets", "huggingface-course/codeparrot-ds-valid", {"valid.json": jsonl([{"content": "v = 1"}])})
    train = [{"content": f"t = {number}", "repo_name": "r"} for number in range(3)]
    hub.add("datasets", "huggingface-course/codeparrot-ds-train", {"train.json": jsonl(train)})
    hub.add("datasets", "some/rows", {"data.csv": b"body,n\n" + b"".join(b"row %d,1\n" % n for n in range(40))})
    splits = {
        f"{split}.parquet": parquet({"text": [f"{split} {n}" for n in range(9)]}) for split in ("train", "validation")
    }
    hub.add("datasets", "some/splits", splits)
    hub.add("datasets", "some/nulls", {"train.parquet": parquet({"text": ["one", None, "two", "", "three"]})})
    hub.add("datasets", "some/closed", {"data.csv": b"text\na\nb\n"}, gated=True)
    hub.add("datasets", "some/script", {"script.py": b"raise SystemExit('a script ran')\n"})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Everything read in one client process, whose imports take most of the time, and the bytes sent to resume."""
    home = tmp_path_factory.mktemp("home")
    code = PRELUDE + (
        'report("resumed", open_corpus("openwebtext"), skip=2 * 60 + 5)\n'
        "import huggingface_hub, urllib.request\n"
        'urllib.request.urlopen(huggingface_hub.constants.ENDPOINT + "/api/models/end/resumed").close()\n'
        'report("openwebtext", open_corpus("openwebtext"))\n'
        'report("at the end", open_corpus("openwebtext"), skip=179)\n'
        'report("limited", open_corpus("openwebtext", max_bytes=100), skip=2)\n'
        'for name in ("the-pile", "the-pile-filtered"):\n'
        "    report(name, HubCorpus(replace(KNOWN_CORPORA[name], compression=None)))\n"
        'report("filtered, resumed", HubCorpus(replace(KNOWN_CORPORA[name], compression=None)), skip=4)\n'
        'for name in ("openwebtext-tokenized", "wikitext", "codeparrot", "hub:some/nothing", "hub:some/closed",\n'
        '             "hub:some/script", "hub:some/rows", "hub:some/rows:fancy"):\n'
        "    report(name, open_corpus(name))\n"
        'report("column", open_corpus("hub:some/rows", field="body", validation_fraction=0.2))\n'
        "import ln_removal.data.hub_corpora\n"
        "ln_removal.data.hub_corpora.VALIDATION_DOCUMENTS = 3\n"
        "for skip in (0, 2):\n"
        '    report(f"nulls, from {skip}", open_corpus("hub:some/nulls"), skip=skip)\n'
        'report("both", open_corpus("hub:some/splits"))\n'
        'report("both, by share", open_corpus("hub:some/splits", validation_fraction=0.2))\n'
        "for skip in (2, 3, 5):\n"
        '    report(f"both, from {skip}", open_corpus("hub:some/splits"), skip=skip)\n'
    )
    with FakeHub() as hub:
        fill(hub)
        hub.add("models", "end/resumed", {})
        done = run_client(code, hub.endpoint, home)
        requests = hub.requests
    assert done.returncode == 0, done.stderr
    assert "a script ran" not in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    first = requests[: [path for _, path, _ in requests].index("/api/models/end/resumed")]
    sent = {f"{shard:04d}": sum(size for _, path, size in first if f"train/{shard:04d}" in path) for shard in range(3)}
    return {line["name"]: line for line in lines}, sent


def stream(results: Results, name: str) -> list[list[Any]]:
    assert "error" not in results[0][name], results[0][name]["error"]
    documents: list[list[Any]] = results[0][name]["documents"]
    return documents


@pytest.mark.parametrize("documents", [2001, 20_000])
def test_nanogpt_split_is_the_one_datasets_makes(documents: int) -> None:
    from datasets import Dataset

    parts = Dataset.from_dict({"index": list(range(documents))}).train_test_split(
        test_size=0.0005, seed=2357, shuffle=True
    )
    assert nanogpt_validation(documents) == set(parts["test"]["index"])
    assert len(parts["train"]) + len(nanogpt_validation(documents)) == documents


def test_nanogpt_split_of_the_whole_of_openwebtext() -> None:
    documents = KNOWN_CORPORA["openwebtext"].documents
    assert documents is not None
    validation = nanogpt_validation(documents)
    assert len(validation) == 4007  # as nanoGPT reports
    assert max(validation) < documents


def test_openwebtext_streams_the_parquet_branch_with_nanogpts_split(results: Results) -> None:
    documents = stream(results, "openwebtext")
    assert [text for text, _, _ in documents] == OPENWEBTEXT
    held_out = {index for index, (_, split, _) in enumerate(documents) if split == "validation"}
    assert held_out == nanogpt_validation(len(OPENWEBTEXT))
    assert {source for _, _, source in documents} == {"openwebtext"}


def test_resume_gives_the_rest_of_the_same_stream(results: Results) -> None:
    documents = stream(results, "openwebtext")
    assert stream(results, "resumed") == documents[125:]
    assert stream(results, "at the end") == documents[179:]
    filtered = stream(results, "the-pile-filtered")
    assert stream(results, "filtered, resumed") == filtered[4:]


def test_resume_reads_no_more_than_footers_of_the_files_behind_it(results: Results) -> None:
    sent = results[1]
    whole = DOCUMENTS_A_FILE * 20_000
    assert sent["0001"] < 0.1 * whole
    assert sent["0002"] > 0.5 * whole


def test_max_bytes_stops_the_stream(results: Results) -> None:
    train = [text for text, split, _ in stream(results, "openwebtext") if split == "train"]
    size = enough = 0
    while size < 100:
        size, enough = size + len(train[enough]), enough + 1
    limited = [text for text, split, _ in stream(results, "limited") if split == "train"]
    assert limited == train[2:enough]


def test_the_pile_holds_its_validation_split_out_and_filters_sets(results: Results) -> None:
    everything = stream(results, "the-pile")
    assert [split for _, split, _ in everything] == ["validation"] * 5 + ["train"] * 15
    filtered = stream(results, "the-pile-filtered")
    assert {text.split()[0] for text, _, _ in filtered} == {"Pile-CC", "Github"}
    assert [split for _, split, _ in filtered] == ["validation"] * 2 + ["train"] * 6


def test_pretokenised_rows_are_taken_as_they_are(results: Results) -> None:
    rows = stream(results, "openwebtext-tokenized")
    assert [tokens for tokens, _, _ in rows] == [[row] * 8 for row in range(50)]
    assert {split for _, split, _ in rows} == {"train", "validation"}


def test_wikitext_lines_become_articles(results: Results) -> None:
    documents = stream(results, "wikitext")
    assert len(documents) == 4
    assert documents[0] == [" = First = \n one \n = = Section = = \n two \n", "validation", "wikitext"]
    assert documents[3] == [" = Second = \n three \n", "train", "wikitext"]
    assert list(_articles([""])) == []


def test_codeparrot_joins_two_data_sets(results: Results) -> None:
    documents = stream(results, "codeparrot")
    assert documents[0] == ["v = 1", "validation", "codeparrot"]
    assert [text for text, split, _ in documents if split == "train"] == ["t = 0", "t = 1", "t = 2"]


def test_any_data_set_by_id_and_column(results: Results) -> None:
    documents = stream(results, "column")
    assert [text for text, _, _ in documents] == [f"row {number}" for number in range(40)]
    assert 1 <= sum(split == "validation" for _, split, _ in documents) <= 20


def test_rows_without_text_keep_their_place_and_give_nothing(results: Results) -> None:
    documents = stream(results, "nulls, from 0")
    assert [text for text, _, _ in documents] == ["one", [], "two", [], "three"], (
        "tokens stand for text: there are none"
    )
    assert stream(results, "nulls, from 2") == documents[2:]


def test_a_tokenizer_is_trained_on_the_rows_that_have_text() -> None:
    from ln_removal.pipelines.pretraining import _tokenizer_texts

    class Rows(HubCorpus):
        rows: list[Document | TokenDocument]

        def documents(self, skip: int = 0) -> Iterator[Document | TokenDocument]:
            yield from self.rows

    corpus = Rows(KNOWN_CORPORA["wikitext"])
    corpus.rows = [Document("one", "train", "a"), TokenDocument([], "train", "a"), Document("two", "train", "a")]
    assert list(_tokenizer_texts(corpus)) == ["one", "two"]
    corpus.rows.append(TokenDocument([5], "train", "a"))
    with pytest.raises(UserError, match="already tokenised"):
        list(_tokenizer_texts(corpus))


def test_a_data_sets_own_validation_split_is_held_out_up_to_a_limit(results: Results) -> None:
    documents = stream(results, "both")
    assert [text for text, split, _ in documents if split == "validation"] == [f"validation {n}" for n in range(3)]
    assert [text for text, split, _ in documents if split == "train"] == [f"train {n}" for n in range(9)]
    for skip in (2, 3, 5):
        assert stream(results, f"both, from {skip}") == documents[skip:]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hub:some/nothing", ["no data set 'some/nothing'", "hf auth login"]),
        ("hub:some/closed", ["some/closed is gated", "accept its terms at http://127.0.0.1"]),
        ("hub:some/script", ["some/script", "script"]),
        ("hub:some/rows", ["no text in the column 'text'", "found: body, n", "field"]),
        ("hub:some/rows:fancy", ["'fancy' not found", "hub:OWNER/NAME:CONFIG"]),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(results: Results, name: str, expected: list[str]) -> None:
    message = results[0][name]["error"]
    for part in expected:
        assert part in message
    assert "\n" not in message


def test_no_network_fails_fast_and_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done = run_client(PRELUDE + 'report("owt", open_corpus("openwebtext"))', endpoint, tmp_path)
    result = json.loads(done.stdout)
    assert "127.0.0.1" in result["error"] and "ln-prepare openwebtext" in result["error"]
    done = run_client(PRELUDE + 'report("owt", open_corpus("openwebtext"))', endpoint, tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in json.loads(done.stdout)["error"]


@pytest.mark.slow
def test_a_connection_lost_in_the_middle_says_how_to_go_on(tmp_path: Path) -> None:
    with FakeHub() as hub:
        files = {f"data/train-0000{shard}-of-00002.parquet": parquet({"text": [str(shard)] * 9}) for shard in (0, 1)}
        hub.add("datasets", "some/two", files)
        code = PRELUDE + (
            "import datasets, types\n"
            "import huggingface_hub.utils._http as http\n"
            "http.time = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)\n"
            "datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1\n"
            "datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0\n"
            'report("cut", open_corpus("hub:some/two"))\n'
        )
        hub.cut_path = "train-00001"
        done = run_client(code, hub.endpoint, tmp_path)
    assert "some/two" in json.loads(done.stdout)["error"], done.stderr


def test_hub_ids_and_options() -> None:
    source = hub_source("hub:owner/na.me-1:con_fig")
    assert source.parts[1].dataset == "owner/na.me-1"
    assert source.config == "con_fig"
    for wrong in ("hub:", "hub:name", "hub:a/b/c", "hub:a/b:c:d", "hub:a b/c"):
        with pytest.raises(UserError, match="hub:OWNER/NAME"):
            hub_source(wrong)
    identity = HubCorpus(KNOWN_CORPORA["the-pile-filtered"], max_bytes=7).identity()
    assert json.loads(json.dumps(identity))["max_bytes"] == 7
    assert identity != HubCorpus(KNOWN_CORPORA["the-pile"], max_bytes=7).identity()
    with pytest.raises(UserError, match="validation_fraction"):
        HubCorpus(KNOWN_CORPORA["pile-10k"], validation_fraction=2.0)
    for name in ("openwebtext", "the-pile", "wikitext", "codeparrot"):
        with pytest.raises(UserError, match="split of its own"):
            HubCorpus(KNOWN_CORPORA[name], validation_fraction=0.1)


def test_a_share_where_the_data_set_says_itself_what_is_held_out(results: Results) -> None:
    assert "split of its own" in results[0]["both, by share"]["error"]
