"""How much space is free, and what to say when that is too little. Sizes are in bytes."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

from ln_removal.errors import UserError

FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG")}
"""Error numbers of a write for which there was no room: on the disk, in the user's quota, in the largest file allowed."""

_SYSTEM_ERROR = re.compile(r"os error (\d+)")


def free_bytes(path: Path) -> int | None:
    """What this user may still write on the disk that holds `path`, or will hold it once it is made; None if it does not say."""
    for place in (path, *path.absolute().parents):
        if place.exists():
            usage = shutil.disk_usage(place)
            return usage.free if usage.total else None
    raise AssertionError("the root directory exists")


def check_room(path: Path, needed: int) -> None:
    """Find out before writing `path` that it does not fit.

    Raises:
        OSError: ENOSPC, which is what writing it would have ended in.
    """
    free = free_bytes(path)
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, "No space left on the disk", str(path))


def is_full(error: Exception) -> bool:
    """Whether a write failed for want of room. safetensors names the error number of the system in its message only."""
    if isinstance(error, OSError):
        return error.errno in FULL
    found = _SYSTEM_ERROR.search(str(error))
    return found is not None and int(found[1]) in FULL


def shortage(path: Path, needed: int) -> str:
    """In words, for the end of a message: what `path` needs and what is free."""
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
