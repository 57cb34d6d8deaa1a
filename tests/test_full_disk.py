"""A full disk: the last good state stays whole, the message says what is needed and what is free, and room is all it takes.

On a file system of a few megabytes of its own where the test may mount one, and with errors put in everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_model import write_corpus, write_model, write_tokenizer
from tiny_training import TinyRun, tiny_model, tiny_spec, weights_sha256
from typer.testing import CliRunner

from ln_removal.data import prepare as prepare_module
from ln_removal.data.corpora import Document
from ln_removal.errors import UserError
from ln_removal.export.write import save_model
from ln_removal.files import atomic
from ln_removal.files.atomic import check_room_for_run, readable
from ln_removal.training import checkpoint as state_module
from ln_removal.training.checkpoint import checkpoints, load_newest

MB = 1 << 20
Usage = namedtuple("Usage", "total used free")


class SmallDisk:
    """A tmpfs of a given size."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, size: int) -> None:
        self.path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount here")
        if done.returncode:
            pytest.skip(f"may not mount: {done.stderr.strip()}")

    def enlarge(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)

    def fill(self, leave: int) -> Path:
        """Write a file that leaves so many bytes; delete it to have the room back."""
        filler = self.path / "filler"
        free = shutil.disk_usage(self.path).free
        filler.write_bytes(bytes(max(0, free - leave)))
        return filler


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk.path)], capture_output=True, check=False)  # maps of tokens may be open


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing past `size` bytes fails, as on a full disk (Python ignores the signal that comes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def says_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: Usage(10 * free + 1, 9 * free + 1, free))


def no_foresight(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another process took the room after it was looked for."""
    from ln_removal.export import write

    for module in (state_module, write):
        monkeypatch.setattr(module, "check_room", lambda path, needed: None)


def hidden(directory: Path) -> list[Path]:
    return list(directory.glob("**/.*"))


# ---------------------------------------------------------------------------------------------------------- a checkpoint


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_checkpoint_on_a_full_disk(
    tmp_path: Path, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, foreseen: bool
) -> None:
    small_disk.mount(4 * MB)
    spec = tiny_spec(evaluate_every=12)
    undisturbed = TinyRun(tmp_path / "elsewhere" / "run", spec=spec)
    undisturbed.train(evaluate=dict)
    if not foreseen:
        no_foresight(monkeypatch)
    run = TinyRun(small_disk.path / "run", spec=spec)
    fillers: list[Path] = []

    def fill() -> dict[str, float]:
        fillers.append(small_disk.fill(leave=100_000))
        return {}

    with pytest.raises(UserError) as caught:
        run.train(evaluate=fill)
    message = str(caught.value)
    assert f"cannot write the checkpoint {run.state}/step-000015: " in message
    assert ("No space left on the disk" if foreseen else "No space left on device") in message
    assert (
        ": it needs " not in message and "; it needs " in message and " kB are free; free some space, then" in message
    )
    assert message.endswith(f"then continue from {run.state}/step-000010 with --resume") and "\n" not in message
    assert [step for step, _ in checkpoints(run.state)] == [5, 10] and not hidden(run.directory)
    assert [row["step"] for row in run.metrics()] == list(range(15)), "the metrics are as far as the disk allowed"
    fillers[0].unlink()
    resumed = TinyRun(run.directory, spec=spec, seed=1)
    resumed.train(evaluate=dict, resume=True)
    assert weights_sha256(resumed.model) == weights_sha256(undisturbed.model)
    assert resumed.losses() == undisturbed.losses()


def test_metrics_on_a_full_disk(tmp_path: Path, small_disk: SmallDisk) -> None:
    small_disk.mount(4 * MB)
    undisturbed = TinyRun(tmp_path / "elsewhere" / "run", spec=tiny_spec(evaluate_every=11))
    undisturbed.train(evaluate=dict)
    run = TinyRun(small_disk.path / "run", spec=undisturbed.spec)
    fillers: list[Path] = []

    def fill() -> dict[str, str]:
        fillers.append(small_disk.fill(leave=0))
        return {"more than fits into what the file has": 5000 * "x"}

    with pytest.raises(OSError, match="No space left") as caught:
        run.train(evaluate=fill)
    assert caught.value.errno == errno.ENOSPC
    assert [step for step, _ in checkpoints(run.state)] == [5, 10]
    fillers[0].unlink()
    resumed = TinyRun(run.directory, spec=run.spec, seed=1)
    resumed.train(evaluate=dict, resume=True)
    assert resumed.losses() == undisturbed.losses()
    assert weights_sha256(resumed.model) == weights_sha256(undisturbed.model)


def test_what_a_command_says_of_a_full_disk_where_nothing_else_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer

    from ln_removal.cli import console
    from ln_removal.cli.console import guard

    # What a command of another test in this process has noted as typed.
    monkeypatch.setattr(console, "_typed", [])
    monkeypatch.setattr(console, "_program", [])

    def remove(resume: bool = False) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/metrics.jsonl")

    with pytest.raises(typer.Exit) as caught:
        guard(remove)(resume=False)
    assert caught.value.exit_code == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "error: run/metrics.jsonl: No space left on device; what was saved before is intact: free some space, then type: ln-remove"
    )
    assert told.endswith(" --resume\n")


def test_a_disk_that_is_full_of_other_things_when_the_file_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems tell only then."""
    run = TinyRun(tmp_path / "run", spec=tiny_spec(evaluate_every=12))

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def fill() -> dict[str, float]:
        monkeypatch.setattr(state_module, "sync", full)
        return {}

    with pytest.raises(UserError, match=r"step-000015: .*step-000010"):
        run.train(evaluate=fill)
    state, faults = load_newest(run.state, TinyRun(tmp_path / "fresh").model, None)
    assert state is not None and state.step == 10 and faults == [] and not hidden(run.state)


# ---------------------------------------------------------------------------------------------------- before the training


GB = 10**9


@pytest.mark.parametrize(
    ("free", "kept", "warns"), [(40 * GB, 0, False), (7 * GB, 0, True), (5 * GB, 3 * GB, False), (4 * GB, 3 * GB, True)]
)
def test_a_disk_that_will_be_full_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, kept: int, warns: bool
) -> None:
    if kept:
        (tmp_path / "state" / "step-000010").mkdir(parents=True)
        with (tmp_path / "state" / "step-000010" / "model.safetensors").open("wb") as file:
            file.truncate(kept)
    says_free(monkeypatch, free)
    # Three checkpoints of 2 GB and 2 GB of models.
    told = check_room_for_run(tmp_path, checkpoint=2 * GB, keep=2, exports=2 * GB)
    assert (told is not None) == warns
    if told is not None:
        wanted = readable(8 * GB - kept) if kept else "8.0 GB"
        assert f"3 checkpoints and the exported models need {wanted}, {readable(free)} are free" in told
        assert "\n" not in told


def test_a_disk_without_room_for_one_checkpoint(tmp_path: Path, small_disk: SmallDisk) -> None:
    from ln_removal.cli.remove import app

    small_disk.mount(MB // 2)
    model = write_model(tmp_path / "model")
    write_corpus(tmp_path / "corpus")
    tokens = str(tmp_path / "tokens")
    assert prepare_command(str(tmp_path / "corpus"), "--tokenizer", str(model), "--out", tokens).exit_code == 0
    sets = ("training.tokens_per_step=128", "data.context=32", "data.weights={}", "training.compile=false")
    given = ["--model", str(model), "--recipe", "tiny", "--tokens", tokens, "--out", str(small_disk.path / "run")]
    given += ["--steps", "10", "--questions", "none", *(part for each in sets for part in ("--set", each))]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 2
    told = f"error: the disk of {small_disk.path}/run is too full to train: a checkpoint needs "
    assert found.stderr.splitlines()[-1].startswith(told)
    assert found.stderr.endswith("kB are free; free some space or choose another --out\n")
    assert list(small_disk.path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- an export


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("foreseen", [True, False])
@pytest.mark.parametrize("existed", [True, False])
def test_an_export_on_a_full_disk(
    small_disk: SmallDisk, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, foreseen: bool, existed: bool
) -> None:
    small_disk.mount(8 * MB)
    target = small_disk.path / "model"
    if existed:
        save_model(tiny_model(), tokenizer, target)
    before = contents(small_disk.path)
    filler = small_disk.fill(leave=60_000)
    if not foreseen:
        no_foresight(monkeypatch)
    with pytest.raises(UserError, match=r"model: .* 4\.\d MB, \d+ kB"):
        save_model(tiny_model(seed=1), tokenizer, target)
    filler.unlink()
    assert contents(small_disk.path) == before, "the model that was there, or nothing"
    assert list(small_disk.path.iterdir()) == ([target] if existed else [])
    save_model(tiny_model(seed=1), tokenizer, target)
    assert contents(small_disk.path) != before


@pytest.mark.parametrize("existed", [True, False])
def test_an_export_whose_write_fails_midway(tmp_path: Path, tokenizer: Any, existed: bool) -> None:
    target = tmp_path / "out" / "model"
    if existed:
        save_model(tiny_model(), tokenizer, target)
    before = contents(tmp_path)
    with largest_file(50_000), pytest.raises(UserError, match="model: "):
        save_model(tiny_model(seed=1), tokenizer, target)
    assert contents(tmp_path) == before and not hidden(tmp_path)


# --------------------------------------------------------------------------------------------------------- a preparation


class Lines:
    """A corpus of about a megabyte of tokens."""

    name = "lines"

    def documents(self, skip: int = 0) -> Iterator[Document]:
        for number in range(skip, 400):
            text = "".join(f"def name_{number}_{line}(x):\n    return x * {line * 7919}\n" for line in range(30))
            yield Document(text, "validation" if number % 20 == 1 else "train", "one")

    def identity(self) -> dict[str, object]:
        return {"name": self.name}


def prepare_lines(out: Path, tokenizer: Any, **options: Any) -> Any:
    return prepare_module.prepare(
        Lines(), tokenizer, out, tokenizer_name="test", tokenizer_sha256="a" * 64, checkpoint_tokens=40_000, **options
    )


def prepare_command(*given: str) -> Any:
    from ln_removal.cli.prepare import app

    return CliRunner().invoke(app, given)


@pytest.fixture
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_DOCUMENTS", 16)


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.bin")}


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("max_tokens", [None, 10_000_000])
def test_a_preparation_on_a_full_disk(
    tmp_path: Path, small_disk: SmallDisk, tokenizer: Any, max_tokens: int | None
) -> None:
    prepare_lines(tmp_path / "undisturbed", tokenizer, max_tokens=max_tokens)
    small_disk.mount(MB // 2)
    out = small_disk.path / "tokens"
    with pytest.raises(UserError) as caught:
        prepare_lines(out, tokenizer, max_tokens=max_tokens)
    message = str(caught.value)
    assert message.startswith(f"the disk of {out} is full: ") and "\n" not in message
    needed = " of training tokens do not fit, and what the rest of the corpus needs is not known, "
    if max_tokens is not None:
        needed = "10,000,000 training tokens need 20.0 MB, "
    assert needed in message
    assert " are free; free some space, then the same command goes on from the last point saved" in message
    assert json.loads((out / "progress.json").read_text())["consumed"] > 0 and not (out / "index.json").exists()
    small_disk.enlarge(8 * MB)
    prepare_lines(out, tokenizer, max_tokens=max_tokens).verify()
    assert shards(out) == shards(tmp_path / "undisturbed")


@pytest.mark.usefixtures("_small_batches")
def test_a_preparation_whose_write_fails_midway(tmp_path: Path, tokenizer: Any) -> None:
    prepare_lines(tmp_path / "undisturbed", tokenizer)
    out = tmp_path / "tokens"
    with largest_file(300_000), pytest.raises(UserError, match="tokens"):
        prepare_lines(out, tokenizer)
    prepare_lines(out, tokenizer).verify()
    assert shards(out) == shards(tmp_path / "undisturbed")


def test_a_preparation_that_saved_nothing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    write_corpus(tmp_path / "corpus")
    with largest_file(5_000):
        found = prepare_command("corpus", "--tokenizer", "tokenizer", "--out", "tokens")
    assert found.exit_code == 2 and found.stdout == ""
    assert found.stderr.startswith("error: the disk of tokens is full: ") and found.stderr.count("\n") == 1
    assert "; free some space, then start again, or choose another --out" in found.stderr
    assert not (tmp_path / "tokens").exists()


# ---------------------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (52_300, "52 kB"),
        (8 * MB, "8.4 MB"),
        (1.5e9, "1.5 GB"),
        (3e12, "3,000.0 GB"),
    ],
)
def test_sizes_in_words(size: float, words: str) -> None:
    assert readable(size) == words


def test_where_nothing_is_yet_the_disk_of_the_nearest_parent_counts(tmp_path: Path) -> None:
    free = atomic.free_bytes(tmp_path / "not" / "made" / "yet")
    assert free is not None and free > 0
