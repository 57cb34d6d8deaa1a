"""Write files and directories whole or not at all, and say how much room the disk has for them.

A directory is written under a temporary name, synced, and then put in the old one's place. While `step-000120` is written
it is called `.step-000120.tmp`; the directory it replaces is called `.step-000120.old` for the moment between two renames.
A process that was killed can leave either one behind; `clean_leftovers` removes or restores it. Sizes are in bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ln_removal.errors import UserError

FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG")}
"""Error numbers of a write for which there was no room: on the disk, in the user's quota, in the largest file allowed."""

_SYSTEM_ERROR = re.compile(r"os error (\d+)")


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


def free_bytes(path: Path) -> int | None:
    """What this user may still write on the disk that holds `path` or will hold it; None where the disk does not say."""
    for place in (path, *path.absolute().parents):
        if place.exists():
            usage = shutil.disk_usage(place)
            return usage.free if usage.total else None
    raise AssertionError("the root directory exists")


def check_room(path: Path, needed: int) -> None:
    """Check, before `path` is written, that it fits on the disk.

    Raises:
        OSError: it does not fit (ENOSPC, as writing it would raise).
    """
    free = free_bytes(path)
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, "No space left on the disk", str(path))


def is_full(error: Exception) -> bool:
    """Whether a write failed because the disk is full; safetensors gives the system's error number only in its message."""
    if isinstance(error, OSError):
        return error.errno in FULL
    found = _SYSTEM_ERROR.search(str(error))
    return found is not None and int(found[1]) in FULL


def shortage(path: Path, needed: int) -> str:
    """The end of a message: how much room `path` needs and how much is free."""
    free = free_bytes(path)
    return f"it needs {readable(needed)}" + ("" if free is None else f", {readable(free)} are free")


def check_room_for_run(directory: Path, *, checkpoint: int, keep: int, exports: int) -> str | None:
    """Whether the disk can hold what a training is going to write.

    Args:
        directory: of the run; what its state/ holds already counts as room.
        checkpoint: bytes of one.
        keep: checkpoints that stay; one more is written before the oldest is deleted.
        exports: bytes of the models written at the end.

    Returns:
        A warning, or None when everything fits.

    Raises:
        UserError: not even one checkpoint fits.
    """
    free = free_bytes(directory)
    if free is None:
        return None
    if free < checkpoint:
        raise UserError(
            f"the disk of {directory} is too full to train: a checkpoint needs {readable(checkpoint)}, {readable(free)} are "
            "free; free some space or choose another --out"
        )
    saved = sum(path.stat().st_size for path in directory.glob("state/step-*/*") if path.is_file())
    wanted = (keep + 1) * checkpoint + exports
    if free + saved >= wanted:
        return None
    return (
        f"warning: the disk of {directory} may be full before the training ends: {keep + 1} checkpoints and the exported models "
        f"need {readable(wanted - saved)}, {readable(free)} are free; free some space now, or lower training.keep_checkpoints"
    )


def readable(count: float) -> str:
    """A size in the unit that keeps the number short (powers of 1,000)."""
    for unit, digits in (("bytes", 0), ("kB", 0), ("MB", 1)):
        if count < 1000:
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def write_json_atomically(path: Path, value: Any) -> None:
    """Write JSON so that a reader, or a crash, sees the old file or the new one and nothing between."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def checksum(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
