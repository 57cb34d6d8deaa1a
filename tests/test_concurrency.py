"""Two processes on one directory: the second is refused and changes nothing; a lock ends with its process, killed or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result
from small_model import write_corpus, write_tokenizer
from typer.testing import CliRunner

from ln_removal.errors import UserError
from ln_removal.files.run_directory import LOCK_FILE, run_directory

RECIPE = 'name = "mine"\n'

# A process that claims a run's directory, says so, and stays in it.
CLAIM = """
import sys, time
from pathlib import Path
from ln_removal.files.run_directory import run_directory
with run_directory(Path(sys.argv[1]), {recipe!r}, with_defaults=dict, resume={resume}):
    (Path(sys.argv[1]) / "metrics.jsonl").write_text("a step")
    print("in", flush=True)
    time.sleep(600)
""".strip()

# A process that prepares a corpus which does not come to an end; its workers run too.
PREPARE = """
import sys, time
from pathlib import Path
from ln_removal.data import encoder
from ln_removal.data.corpora import LocalFiles
from ln_removal.data.prepare import prepare
from ln_removal.models.loading import load_tokenizer, tokenizer_fingerprint

encoder.BYTES_ALONE = 0
class Stuck(LocalFiles):
    def documents(self, skip=0):
        yield from super().documents(skip)
        print("in", flush=True)
        time.sleep(600)

loaded = load_tokenizer("tokenizer")
prepare(Stuck("texts"), loaded, "tokens", tokenizer_name="tokenizer", tokenizer_sha256=tokenizer_fingerprint(loaded), workers=2)
"""


@contextmanager
def process(code: str, *arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is killed at the end; entered when it has printed its first line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    started = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        assert line == "in\n", started.communicate()[1]
        yield started
    finally:
        started.kill()
        started.communicate()


def kill(started: subprocess.Popen[str]) -> None:
    started.send_signal(signal.SIGKILL)
    started.wait(timeout=30)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def claim(out: Path, *, resume: bool, recipe: str = RECIPE) -> None:
    with run_directory(out, recipe, with_defaults=dict, resume=resume):
        pass


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("resume", [False, True])
def test_the_second_run_on_a_directory_is_refused(tmp_path: Path, resume: bool) -> None:
    out = tmp_path / "run"
    with process(CLAIM.format(recipe=RECIPE, resume=False), str(out), cwd=tmp_path):
        before = contents(out)
        with pytest.raises(UserError, match="another process"):
            claim(out, resume=resume)
        with pytest.raises(UserError, match="another process"):
            claim(out, resume=resume, recipe='name = "other"\n')
        assert contents(out) == before


def test_a_killed_run_leaves_no_stale_lock(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with process(CLAIM.format(recipe=RECIPE, resume=False), str(out), cwd=tmp_path) as first:
        kill(first)
    assert (out / LOCK_FILE).exists()
    with pytest.raises(UserError, match="--resume"):
        claim(out, resume=False)
    second = process(CLAIM.format(recipe=RECIPE, resume=True), str(out), cwd=tmp_path)
    with second, pytest.raises(UserError, match="another process"):
        claim(out, resume=True)
    claim(out, resume=True)


def test_of_many_that_start_together_one_gets_in(tmp_path: Path) -> None:
    code = CLAIM.format(recipe=RECIPE, resume=True).replace("time.sleep(600)", "sys.stdin.read()")
    start = [sys.executable, "-c", f"import sys; sys.stdin.readline()\n{code}", str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(start, cwd=Path(__file__).parent.parent, text=True, **pipes) for _ in range(6)]
    try:
        for each in started:  # all are running Python by then, and wait for a line
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        deadline = time.monotonic() + 60
        while sum(each.poll() is None for each in started) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        (winner,) = [each for each in started if each.poll() is None]
        outputs = [each.communicate() for each in started if each is not winner]
        assert all("another process is at work" in errors for _, errors in outputs), outputs
        assert winner.communicate("")[0] == "in\n" and winner.returncode == 0
    finally:
        for each in started:
            each.kill()
            each.wait()


def test_a_lock_is_put_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError):
            claim(tmp_path / "texts", resume=resume)
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["a.txt"]


# ---------------------------------------------------------------------------------------------------------- ln-prepare


def ln_prepare(*arguments: str) -> Result:
    from ln_removal.cli.prepare import app

    return CliRunner().invoke(app, [*arguments, "--tokenizer", "tokenizer"])


def test_two_preparations_of_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    write_corpus(tmp_path / "texts", documents=8)
    write_corpus(tmp_path / "others", documents=4)
    with process(PREPARE, cwd=tmp_path) as first:
        before = contents(tmp_path / "tokens")
        for corpus in ("texts", "others"):
            second = ln_prepare(corpus, "--out", "tokens")
            assert (second.exit_code, second.stdout) == (2, "")
            assert second.stderr == "error: another process is preparing tokens; wait for it, or choose another --out\n"
        assert contents(tmp_path / "tokens") == before
        kill(first)  # its encoding processes are left behind, and must not keep the lock
        third = ln_prepare("texts", "--out", "tokens")
        assert third.exit_code == 0, third.output
    ln_prepare("texts", "--out", "undisturbed")
    whole, fresh = (
        {Path(path).name: data for path, data in contents(tmp_path / name).items() if path.endswith(".bin")}
        for name in ("tokens", "undisturbed")
    )
    assert whole == fresh and len(whole) == 2


# ------------------------------------------------------------------------------------------------------- whole commands
