"""What must stay on the user's machine: text that is not public when a run is published, secrets when something fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished_run import make_run
from report_run import results as full_results

from ln_removal.evaluation import results as results_file
from ln_removal.evaluation.results import Results
from ln_removal.export.hub import HubTarget
from ln_removal.files.hub import one_line
from ln_removal.pipelines.publishing import run_files

SECRET = "text nobody may see"
TOKEN = "hf_PlantedTokenThatMustNotShowAnywhere"


def published(run: Path) -> dict[str, bytes]:
    files = run_files(run, HubTarget("alice/x"))
    return {path: content.read_bytes() if isinstance(content, Path) else content for path, content in files.items()}


def run_on(place: Path, *, corpus: str, data: str) -> Path:
    """A run of `corpus` whose results, with the secret wherever text can stand, were measured on `data`."""
    run = make_run(place / "run", corpus=corpus)
    found = full_results(text=SECRET)
    scored = found.by_data[0].model_copy(update={"data": data})
    models = found.models.model_copy(update={"original": "gpt2"})
    settings = found.settings.model_copy(update={"data": data, "question_set": "letters.jsonl"})
    found = found.model_copy(update={"by_data": (scored,), "models": models, "settings": settings})
    results_file.write(found, run / "results.json")
    (run / "report.html").write_text(f"<p>an older report, with {SECRET}</p>", encoding="utf-8")
    return run


def test_text_of_a_public_corpus_is_published(tmp_path: Path) -> None:
    run = run_on(tmp_path, corpus="openwebtext", data="openwebtext, validation split")
    files = published(run)
    assert files["results.json"] == (run / "results.json").read_bytes()
    assert SECRET.encode() in files["report.html"] and b"an older report" not in files["report.html"]


@pytest.mark.parametrize(
    ("corpus", "data"),
    [
        ("./letters", "./letters, validation split"),
        ("openwebtext", "letters.txt"),
        ("openwebtext", "hub:alice/diary, held out"),
    ],
)
def test_text_that_is_not_public_stays_here(tmp_path: Path, corpus: str, data: str) -> None:
    run = run_on(tmp_path, corpus=corpus, data=data)
    files = published(run)
    assert [path for path, content in files.items() if SECRET.encode() in content] == []
    kept, whole = Results.model_validate_json(files["results.json"]), results_file.read(run / "results.json")
    assert kept.cross_entropy == whole.cross_entropy and kept.by_data[0].by_position == whole.by_data[0].by_position
    assert b"Loss by position" in files["report.html"] and b"Worst samples" not in files["report.html"]
    assert SECRET in json.dumps(whole.model_dump()), "the run's own files are left as they are"


@pytest.mark.parametrize(
    "message",
    [
        f"the server did not like {TOKEN}",
        f"Illegal header value b'Bearer {TOKEN}\\x07'",
        f"{'x' * 290} {TOKEN}",  # cut in the middle of the token
        "503 for url 'https://s3.example/repo/file?X-Amz-Signature=PlantedToken&X-Amz-Expires=900'",
    ],
)
def test_messages_hold_no_secrets(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\x07" if "Illegal" in message else TOKEN)
    shown = one_line(RuntimeError(message))
    assert "Planted" not in shown and "hf_P" not in shown
    assert len(shown) <= 300 and shown.startswith(message[:10])
