"""Directories that are there whole or not at all: written under a temporary name, synced, then put in the old one's place.

While `step-000120` is written it is called `.step-000120.tmp`; the directory it replaces is called `.step-000120.old` for the
moment between two renames. A process that was killed can leave either; `clean_leftovers` puts that right.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(final: Path) -> Iterator[Path]:
    """Yield an empty directory to write into, which becomes `final` when the block ends well.

    When the block raises, what it wrote is deleted and `final`, if there was one, is as it was.

    Raises:
        OSError: the disk is full, or `final` cannot be written.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        _put_in_place(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clean_leftovers(parent: Path) -> None:
    """Delete what a killed process left half-written in `parent`, and give a replaced directory its name back.

    Only for a directory that no other process writes to.
    """
    for old in parent.glob(".*.old"):
        final = parent / old.name.removeprefix(".").removesuffix(".old")
        if old.is_dir() and not final.exists():
            os.replace(old, final)
        elif old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
    for leftover in parent.glob(".*.tmp"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise  # some file systems cannot sync the names in a directory
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    replaces = final.is_dir() and not final.is_symlink()
    if replaces:
        os.replace(final, old)
    try:
        os.replace(temporary, final)
    except BaseException:
        if replaces:
            os.replace(old, final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
