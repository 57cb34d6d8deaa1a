"""The directory of a run: it is locked and claimed before anything is written, and cleared when the run left nothing to keep.

A resumed run reaches the same numbers at the same steps as one that was never stopped, so its recipe may not change. Only
after a run went back to a checkpoint may it go on with a lower learning rate, a lower minimum of it or a tighter clip. The
change is written into recipe.toml and noted in metrics.jsonl.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ln_removal.errors import UserError
from ln_removal.files.atomic import clean_leftovers
from ln_removal.files.metrics_log import METRICS_FILE, RECIPE_CHANGE, ROLLBACK, WANDB_FILE, last_row, note_change
from ln_removal.files.signals import Interrupted

RECIPE_FILE = "recipe.toml"

IDENTITY_FILE = "identity.json"
"""Which model a run is made from; see models/identity.py."""

NOTHING_KEPT = "nothing was trained or prepared yet, so nothing is kept"

LOCK_FILE = ".lock"
"""The file that is locked while a process works on the run. The lock ends with the process, even when it is killed."""

WithDefaults = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Writes out the defaults of a recipe, or of another record, that was read from TOML: `config.recipe.with_defaults`."""

_DIFFERENCES_SHOWN = 4

logger = logging.getLogger(__name__)

MAY_BE_LOWERED = ("training.learning_rate", "training.minimum_learning_rate", "training.clip")
"""Keys of a recipe whose values may be lowered after a run went back to a checkpoint."""

DECIDE_NOTHING = ("name", "description")
"""Keys of a recipe that only say what it is called and what it is for: a run may be resumed under others."""


@contextmanager
def run_directory(
    out: Path, recipe_toml: str, *, with_defaults: WithDefaults, resume: bool, is_main: bool = True
) -> Iterator[None]:
    """Make `out` this run's directory and write its recipe there, or check that it is the run to resume.

    When the block fails before the first training step was logged, what it left is removed again, so that the same
    --out can be used once the mistake is corrected. Where there are prepared tokens, whole or resumable, the run stays as
    it is, for --resume.

    Args:
        out: the run's directory.
        recipe_toml: the resolved recipe.
        with_defaults: so that a key which an older version did not write counts as its default.
        resume: `out` may hold this run already. One that has not been trained yet takes the new recipe.
        is_main: False does nothing: of several ranks only the main one claims.

    Raises:
        UserError: `out` cannot be written, another process is at work there, or it holds something already (without
            `resume`) or a run of another recipe.
        Interrupted: the block was, by a signal; says what is kept.
    """
    if not is_main:
        yield
        return
    made = [path for path in (out, *out.parents) if not path.exists()]
    with locked(out, resume=resume):
        is_new, claimed = not (out / RECIPE_FILE).exists(), False
        try:
            _claim(out, recipe_toml, with_defaults, resume=resume)
            claimed = True
            _clean_leftovers(out)
            yield
        except BaseException as error:
            is_kept = not is_new or not (_is_only_claimed(out) or (claimed and not _is_worth_keeping(out)))
            if not is_kept:
                clear(out, made, records=(RECIPE_FILE, f".{RECIPE_FILE}.tmp", IDENTITY_FILE, METRICS_FILE, WANDB_FILE))
            if isinstance(error, KeyboardInterrupt):
                raise _interrupted(error, out, is_kept=is_kept) from None
            raise


def has_trained(out: Path) -> bool:
    """Whether a run has been trained at least up to its first checkpoint."""
    return (out / "model").is_dir() or any((out / "state").glob("step-*"))


def link_tokens(out: Path, directory: Path) -> None:
    """Make `out/tokens` a link to the given tokens, so that resuming and ln-evaluate find them.

    Raises:
        UserError: the run was trained on other tokens, or the link cannot be made.
    """
    link, target = out / "tokens", directory.resolve()
    if link.exists() and link.resolve() == target:
        return
    if link.is_symlink() and not has_trained(out):
        link.unlink()
    elif link.is_symlink() or link.exists():
        raise UserError(f"{out} has its own tokens, in {link.resolve()}; leave --tokens out, or choose another --out")
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError as error:
        raise UserError(f"cannot write {link}: {error.strerror or error}; choose another --out") from error


@contextmanager
def locked(out: Path, *, resume: bool, record: str = RECIPE_FILE) -> Iterator[None]:
    """Keep other processes out of the directory of a run, or of a sweep, which is made if it is not there.

    Args:
        out: the directory.
        resume: it may hold a run, or a sweep, already.
        record: the file that shows that it does.

    Raises:
        UserError: `out` cannot be written, another process is at work there, or it holds something already (without
            `resume`, or something else).
    """
    # No fallback to a file whose mere existence is the lock: such a file outlives a killed process.
    lock = FileLock(out / LOCK_FILE, blocking=False, fallback_to_soft=False)
    try:
        if not (out / LOCK_FILE).exists():  # a lock is only put where a run may be
            check_free(out, resume=resume, record=record)
            out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is at work on the run in {out}; wait for it or stop it, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise _unwritable(out, error) from error
        logger.warning("the file system of %s has no locks; make sure that no other process uses this directory", out)
    try:
        yield
    finally:
        lock.release()


def check_free(out: Path, *, resume: bool, record: str = RECIPE_FILE) -> bool:
    """Whether `out` holds a run, or a sweep, to resume; UserError where it holds anything else, or where `resume` is false."""
    own = {LOCK_FILE, f".{record}.tmp"}  # what a process leaves that is killed before it has written the record
    used = out.is_dir() and any(path.name not in own for path in out.iterdir())
    file = out / record
    if used and not resume:
        if file.exists():
            raise UserError(f"{out} already holds a run; continue it with --resume, or choose another --out")
        raise UserError(f"{out} already holds files that are not a run of ln-removal; choose another --out")
    if used and not file.exists():
        raise UserError(f"{out} holds no {record}, so there is no run to resume; choose another --out")
    return used


def _claim(out: Path, recipe_toml: str, with_defaults: WithDefaults, *, resume: bool) -> None:
    file = out / RECIPE_FILE
    try:
        used = check_free(out, resume=resume)
        if used:
            changed, lowered = _compare(out, recipe_toml, with_defaults)
            if changed and has_trained(out) and not lowered:
                raise UserError(
                    f"{out} was begun with another recipe: {changed}; resume it with the recipe and options it was begun "
                    "with, or choose another --out"
                )
            if not changed:
                return
            note_change(out / METRICS_FILE, changed)
            if not lowered:
                shutil.rmtree(out / "tokenizer", ignore_errors=True)  # trained by the recipe that is now replaced
        out.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{RECIPE_FILE}.tmp")
        temporary.write_text(recipe_toml, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise _unwritable(out, error) from error


def _compare(out: Path, recipe_toml: str, with_defaults: WithDefaults) -> tuple[str, bool]:
    """How the recipe in `out` differs from the new one, in words, and whether the run may go on with the new one."""
    try:
        before = tomllib.loads((out / RECIPE_FILE).read_bytes().decode())
    except ValueError as error:
        return f"its {RECIPE_FILE} is damaged ({error})", False
    now = tomllib.loads(recipe_toml)
    return differences(before, now, with_defaults), may_go_on_with(out / METRICS_FILE, before, now, with_defaults)


def _clean_leftovers(out: Path) -> None:
    """Delete what a killed process left under temporary names in a run's directory, which is locked by this one."""
    for place in (out, out / "control"):
        for name in ("", "state", "model", "stock"):
            directory = place / name
            if directory.is_dir() and not directory.is_symlink():
                clean_leftovers(directory)
                for leftover in directory.glob("*.tmp"):
                    leftover.unlink(missing_ok=True)


def _interrupted(error: KeyboardInterrupt, out: Path, *, is_kept: bool) -> Interrupted:
    """The interruption to raise, which says what of the run is kept."""
    stopped = error if isinstance(error, Interrupted) else Interrupted()
    stopped.resume = is_kept
    if not stopped.kept:
        stopped.kept = _kept(out) if is_kept else NOTHING_KEPT
    return stopped


def _kept(out: Path) -> str:
    kept = [str(out / "tokens")] if has_own_tokens(out) else []
    for place in (out, out / "control"):
        if (place / "model").is_dir():
            kept.append(str(place / "model"))
        else:
            kept += [str(path) for path in sorted((place / "state").glob("step-*"))[-1:]]
    if not kept:
        return f"there is no checkpoint in {out} yet"
    return f"{' and '.join(kept)} {'is' if len(kept) == 1 else 'are'} kept"


def _unwritable(out: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {out}: {error.strerror or error}; choose another --out")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], with_defaults: WithDefaults) -> str:
    """What differs between two recipes as nested dictionaries, in words; empty when nothing does.

    A key that `before` lacks because the version that wrote it did not know it counts as its default. A name or a description
    decides nothing, so another one is no difference.
    """
    words = [
        f"{key} was {'unset' if old is None else old}, now {'unset' if new is None else new}"
        for key, (old, new) in _changes(before, now, with_defaults).items()
    ]
    more = len(words) - _DIFFERENCES_SHOWN
    return ", ".join(words[:_DIFFERENCES_SHOWN]) + (f", and {more} more" if more > 0 else "")


def may_go_on_with(
    metrics: Path, before: Mapping[str, Any], now: Mapping[str, Any], with_defaults: WithDefaults
) -> bool:
    """Whether the run whose metrics.jsonl this is has just gone back, and `now` only lowers what may be lowered."""
    if last_row(metrics).get("kind") not in (ROLLBACK, RECIPE_CHANGE):
        return False
    return all(
        key in MAY_BE_LOWERED and (new or 0) <= (old or 0)
        for key, (old, new) in _changes(before, now, with_defaults).items()
    )


def _changes(
    before: Mapping[str, Any], now: Mapping[str, Any], with_defaults: WithDefaults
) -> dict[str, tuple[Any, Any]]:
    """The old and the new value of every dotted key that differs and decides something; None where one is unset."""
    old, new = (_flat(with_defaults(recipe)) for recipe in (before, now))
    keys = [key for key in {**old, **new} if key not in DECIDE_NOTHING and old.get(key) != new.get(key)]
    return {key: (old.get(key), new.get(key)) for key in keys}


def _flat(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _is_only_claimed(out: Path) -> bool:
    """Whether there is nothing in a directory but what claiming it leaves."""
    return {path.name for path in out.iterdir()} <= {LOCK_FILE, RECIPE_FILE, f".{RECIPE_FILE}.tmp", IDENTITY_FILE}


def _is_worth_keeping(out: Path) -> bool:
    metrics = out / METRICS_FILE
    logged = metrics.is_file() and metrics.stat().st_size > 0
    return logged or has_trained(out) or has_own_tokens(out)


def has_own_tokens(out: Path) -> bool:
    """Whether a run, or a sweep, has prepared tokens of its own that are whole or can be completed."""
    tokens = out / "tokens"
    return not tokens.is_symlink() and any((tokens / name).is_file() for name in ("index.json", "progress.json"))


def clear(out: Path, made: Iterable[Path], *, records: Iterable[str]) -> None:
    """Remove what an unsuccessful run, or sweep, left in a directory that was empty before it.

    That is its lock, its tokens, its tokenizer and its checkpoints, the files named by `records`, and those of the directories
    in `made` (innermost first) that are empty then.
    """
    for name in (*records, LOCK_FILE):
        (out / name).unlink(missing_ok=True)
    for name in ("tokens", "tokenizer", ".tokenizer.tmp", "state"):
        path = out / name
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in made:
        try:
            path.rmdir()
        except OSError:  # something else is in it
            return
