"""The directory of a grid: locked, claimed for one grid file, and given back when nothing came of it.

It holds the directories of the runs, each with a lock and a recipe of its own (run_directory.py).
"""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ln_removal.errors import UserError
from ln_removal.pretraining.grid_file import Grid, dump_grid, slug_of
from ln_removal.pretraining.grid_table import RESULT_FILE, TABLE_JSON, TABLE_MARKDOWN
from ln_removal.run_directory import LOCK_FILE, check_free, differences, has_trained, locked
from ln_removal.toml_writer import write_toml
from ln_removal.training.interruption import Interrupted

GRID_FILE = "grid.toml"
"""The resolved grid, with every value of every arm's recipe."""


@contextmanager
def grid_directory(out: Path, grid: Grid, *, resume: bool, is_main: bool) -> Iterator[list[str]]:
    """Make `out` this grid's directory, or check that it is the grid to resume; gives what is new in its file, in words.

    As with a run, what a grid leaves that fails before it has tokens or a trained run is removed again.

    Args:
        out: the grid's directory.
        grid: the resolved grid.
        resume: `out` may hold this grid already. One of which no run has been trained yet takes the new file.
        is_main: False does nothing: of several ranks only the main one claims.

    Raises:
        UserError: `out` cannot be written, another process is at work there, or it holds something already (without
            `resume`) or a grid whose trained runs would not be the same.
        Interrupted: the block was, by a signal; says what is kept.
    """
    if not is_main:
        yield []
        return
    made = [path for path in (out, *out.parents) if not path.exists()]
    with locked(out, resume=resume, record=GRID_FILE):
        is_new = not check_free(out, resume=resume, record=GRID_FILE)
        news = [] if is_new else _check_same(out, grid)
        temporary = out / f".{GRID_FILE}.tmp"
        temporary.write_text(dump_grid(grid), encoding="utf-8")
        os.replace(temporary, out / GRID_FILE)
        try:
            yield news
        except BaseException as error:
            is_kept = not is_new or _is_worth_keeping(out)
            over = len(list(out.glob(f"*-seed*/{RESULT_FILE}")))
            if not is_kept:
                _clear(out, made)
            if isinstance(error, KeyboardInterrupt):
                raise _interrupted(
                    error, is_kept=is_kept, over=f"{over} of {len(grid.order())} runs are over"
                ) from None
            raise


def has_begun(out: Path, name: str) -> bool:
    """Whether a run of the grid in `out` has a checkpoint or is over, so that it can only go on as it was."""
    return has_trained(out / name) or (out / name / RESULT_FILE).is_file()


def _check_same(out: Path, grid: Grid) -> list[str]:
    """What the file has new or no longer; UserError where a run that has been begun would not be the same."""
    advice = "resume it with the file and options it was begun with, or choose another --out"
    try:
        old = tomllib.loads((out / GRID_FILE).read_text(encoding="utf-8"))
        before, seeds, baseline = dict(old["arms"]), list(old["seeds"]), old["baseline"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / GRID_FILE} is damaged ({error}); choose another --out") from error
    now = tomllib.loads(dump_grid(grid))["arms"]
    begun = [(name, seed) for name in before for seed in seeds if has_begun(out, f"{slug_of(name)}-seed{seed}")]
    faults = []
    for name in dict.fromkeys(name for name, _ in begun):
        if name not in now:
            faults.append(f"it has the arm {name!r}, which the file lacks")
        elif changed := differences(write_toml(before[name]).encode(), write_toml(now[name])):
            faults.append(f"arm {name!r}: {changed}")
    lost = sorted({seed for _, seed in begun} - set(grid.seeds))
    faults += [f"it has runs with seed {seed}, which the file lacks" for seed in lost]
    if faults:
        raise UserError(f"{out} was begun with another grid: {'; '.join(faults)}; {advice}")
    news = [f"added: arm {name}" for name in now if name not in before]
    news += [f"added: seed {seed}" for seed in grid.seeds if seed not in seeds]
    if baseline != grid.baseline:
        news.append(f"the baseline was {baseline}, now {grid.baseline}")
    return news


def _is_worth_keeping(out: Path) -> bool:
    """Whether there are runs, or tokens that are whole or can be completed."""
    tokens = out / "tokens"
    prepared = not tokens.is_symlink() and any((tokens / name).is_file() for name in ("index.json", "progress.json"))
    return prepared or any(path.is_dir() for path in out.glob("*-seed*"))


def _clear(out: Path, made: list[Path]) -> None:
    for name in (GRID_FILE, f".{GRID_FILE}.tmp", TABLE_JSON, TABLE_MARKDOWN, LOCK_FILE):
        (out / name).unlink(missing_ok=True)
    if (out / "tokens").is_symlink():
        (out / "tokens").unlink()
    for name in ("tokens", "tokenizer", ".tokenizer.tmp"):
        shutil.rmtree(out / name, ignore_errors=True)
    for path in made:
        try:
            path.rmdir()
        except OSError:  # something else is in it
            return


def _interrupted(error: KeyboardInterrupt, *, is_kept: bool, over: str) -> Interrupted:
    """What was stopped from outside: what the run said of itself, and how far the grid is."""
    stopped = error if isinstance(error, Interrupted) else Interrupted()
    if is_kept:  # the grid goes on even where the run that was stopped has to begin again
        own = [stopped.kept] if stopped.kept and stopped.resume else []
        stopped.kept, stopped.resume = "; ".join([*own, over]), True
    elif not stopped.kept:
        stopped.kept, stopped.resume = "nothing was trained or prepared yet, so nothing is kept", False
    return stopped
