"""Directories that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ln_removal.files import atomic
from ln_removal.files.atomic import clean_leftovers, written_whole


class Killed(BaseException):
    """Stands for kill -9: nothing is tidied after it."""


def write(final: Path, text: str) -> None:
    with written_whole(final) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text(text)


def tree(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_it_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write(tmp_path / "deep" / "model", text)
        assert tree(tmp_path) == {"deep/model/sub/file": text}


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    def fail() -> None:
        with written_whole(tmp_path / "model") as directory:
            (directory / "file").write_text("half")
            raise OSError("the disk is full")

    for before in ({}, {"model/sub/file": "one"}):
        if before:
            write(tmp_path / "model", "one")
        with pytest.raises(OSError, match="full"):
            fail()
        assert tree(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == (["model"] if before else [])


def killed_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> Callable[[], None]:
    """Let the module's `os` or `shutil` function `name` kill the process at that call; nothing is deleted after it."""
    module = atomic.shutil if name == "rmtree" else atomic.os
    real, calls, dead = getattr(module, name), [0], [False]

    def kill(*args: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] >= call:
            dead[0] = True
            raise Killed
        return real(*args, **options)

    rmtree = atomic.shutil.rmtree
    monkeypatch.setattr(module, name, kill)
    if name != "rmtree":
        monkeypatch.setattr(
            atomic.shutil, "rmtree", lambda *args, **options: None if dead[0] else rmtree(*args, **options)
        )
    return monkeypatch.undo


# The renames are those of the old directory aside, of the new one, and none after it.
@pytest.mark.parametrize(("name", "call"), [("replace", 1), ("replace", 2), ("fsync", 1), ("fsync", 4), ("rmtree", 3)])
def test_killed_anywhere_one_whole_directory_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    write(tmp_path / "model", "one")
    revive = killed_at(monkeypatch, name, call)
    with pytest.raises(Killed):
        write(tmp_path / "model", "two")
    revive()
    clean_leftovers(tmp_path)
    assert tree(tmp_path) in ({"model/sub/file": "one"}, {"model/sub/file": "two"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_between_the_renames_the_old_one_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "step-000010", "old")
    (tmp_path / "step-000010").rename(tmp_path / ".step-000010.old")
    (tmp_path / ".step-000010.tmp").mkdir()
    (tmp_path / ".recipe.toml.tmp").write_text("half")
    clean_leftovers(tmp_path)
    assert tree(tmp_path) == {"step-000010/sub/file": "old"}


def test_nothing_of_others_is_touched(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".lock").write_text("")
    (tmp_path / "notes.tmp").write_text("mine")
    before = sorted(tmp_path.iterdir())
    clean_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
