"""Train the arms of a sweep one after the other, on the same tokens, and keep the table of their perplexities up to date.

    OUT/grid.toml  table.json  table.md  tokens/  tokenizer/ (if the base recipe names none)
    OUT/ln-gelu-seed0/recipe.toml  metrics.jsonl  state/  model/  result.json

Each run is an ordinary pretraining run, whose directory has its own lock and recipe (files/run_directory.py). A run is over
once its result.json is there. --resume leaves out the runs that are over, and continues the others from their checkpoints. A
run that has diverged is over too, because the same seed would diverge again; remove its directory to train it once more.

The sweep's own directory is locked and claimed for one sweep's file. What a sweep leaves there is removed again if it fails
before it has tokens or a trained run.

With several ranks all of them go through the same runs, and only the main one writes.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.config.recipe import with_defaults
from ln_removal.config.sweep import Arm, Sweep, dump_sweep, slug_of
from ln_removal.data.tokens import INDEX, TokenDataset
from ln_removal.errors import DivergedError, UserError
from ln_removal.evaluation.scoring import device_name
from ln_removal.files.run_directory import (
    NOTHING_KEPT,
    check_free,
    clear,
    differences,
    has_own_tokens,
    has_trained,
    link_tokens,
    locked,
)
from ln_removal.files.signals import Interrupted
from ln_removal.pipelines.context import RunContext, run_context, with_tokenizer
from ln_removal.pipelines.pretraining import prepare_tokens, pretrain_in
from ln_removal.report.sweep_table import (
    LARGEST_CROSS_ENTROPY,
    RESULT_FILE,
    TABLE_JSON,
    TABLE_MARKDOWN,
    RunResult,
    SweepTable,
    build_table,
    read_result,
    seen_in_training,
    write_result,
    write_table,
)

if TYPE_CHECKING:
    from ln_removal.config.recipe import Recipe
    from ln_removal.training.metrics import Progress

SWEEP_FILE = "grid.toml"
"""The resolved sweep, with every value of every arm's recipe."""


@contextmanager
def sweep_directory(out: Path, sweep: Sweep, *, resume: bool, is_main: bool) -> Iterator[list[str]]:
    """Make `out` this sweep's directory, or check that it is; yields sentences about what is new in the sweep's file.

    Args:
        out: the sweep's directory.
        sweep: the resolved sweep.
        resume: `out` may hold this sweep already. A sweep in which no run has been trained yet takes the new file.
        is_main: False does nothing: of several ranks only the main one claims the directory.

    Raises:
        UserError: `out` cannot be written, another process is at work there, or it holds something already (without
            `resume`) or a sweep whose trained runs would not be the same.
        Interrupted: a signal has interrupted the block; the error says what is kept.
    """
    if not is_main:
        yield []
        return
    made = [path for path in (out, *out.parents) if not path.exists()]
    with locked(out, resume=resume, record=SWEEP_FILE):
        is_new = not check_free(out, resume=resume, record=SWEEP_FILE)
        news = [] if is_new else _check_same(out, sweep)
        temporary = out / f".{SWEEP_FILE}.tmp"
        temporary.write_text(dump_sweep(sweep), encoding="utf-8")
        os.replace(temporary, out / SWEEP_FILE)
        try:
            yield news
        except BaseException as error:
            is_kept = not is_new or _is_worth_keeping(out)
            over = len(list(out.glob(f"*-seed*/{RESULT_FILE}")))
            if not is_kept:
                clear(out, made, records=(SWEEP_FILE, f".{SWEEP_FILE}.tmp", TABLE_JSON, TABLE_MARKDOWN))
            if isinstance(error, KeyboardInterrupt):
                raise _interrupted(
                    error, is_kept=is_kept, over=f"{over} of {len(sweep.order())} runs are over"
                ) from None
            raise


def has_begun(out: Path, name: str) -> bool:
    """Whether a run of the sweep in `out` has a checkpoint or is over, so that its recipe may no longer change."""
    return has_trained(out / name) or (out / name / RESULT_FILE).is_file()


def _check_same(out: Path, sweep: Sweep) -> list[str]:
    """Sentences about what is new in the file. Raises UserError if a run that has begun would not be the same."""
    advice = "resume it with the file and options it was begun with, or choose another --out"
    try:
        old = tomllib.loads((out / SWEEP_FILE).read_text(encoding="utf-8"))
        before, seeds, baseline = dict(old["arms"]), list(old["seeds"]), old["baseline"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / SWEEP_FILE} is damaged ({error}); choose another --out") from error
    now = tomllib.loads(dump_sweep(sweep))["arms"]
    begun = [(name, seed) for name in before for seed in seeds if has_begun(out, f"{slug_of(name)}-seed{seed}")]
    faults = []
    for name in dict.fromkeys(name for name, _ in begun):
        if name not in now:
            faults.append(f"it has the arm {name!r}, which the file lacks")
        elif changed := differences(before[name], now[name], with_defaults):
            faults.append(f"arm {name!r}: {changed}")
    lost = sorted({seed for _, seed in begun} - set(sweep.seeds))
    faults += [f"it has runs with seed {seed}, which the file lacks" for seed in lost]
    if faults:
        raise UserError(f"{out} was begun with another grid: {'; '.join(faults)}; {advice}")
    news = [f"added: arm {name}" for name in now if name not in before]
    news += [f"added: seed {seed}" for seed in sweep.seeds if seed not in seeds]
    if baseline != sweep.baseline:
        news.append(f"the baseline was {baseline}, now {sweep.baseline}")
    return news


def _is_worth_keeping(out: Path) -> bool:
    """Whether there are runs, or tokens that are whole or can be completed."""
    return has_own_tokens(out) or any(path.is_dir() for path in out.glob("*-seed*"))


def _interrupted(error: KeyboardInterrupt, *, is_kept: bool, over: str) -> Interrupted:
    """The error to raise after a signal: it says what the run has saved, and how far the sweep is."""
    stopped = error if isinstance(error, Interrupted) else Interrupted()
    if is_kept:  # the sweep goes on, even if the run that was stopped has to begin again
        own = [stopped.kept] if stopped.kept and stopped.resume else []
        stopped.kept, stopped.resume = "; ".join([*own, over]), True
    elif not stopped.kept:
        stopped.kept, stopped.resume = NOTHING_KEPT, False
    return stopped


def run_sweep(
    sweep: Sweep,
    out: Path | str,
    *,
    tokens: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
    wandb_project: str | None = None,
    progress: Progress = True,
) -> SweepTable:
    """Train every arm with every seed, seed by seed, and write table.json and table.md into `out` after each run.

    Args:
        sweep: the resolved sweep, see `config.sweep.load_sweep`.
        out: its directory.
        tokens: prepared tokens for all runs; default: prepare the recipes' corpus once, into `out/tokens`.
        resume: go on with the sweep in `out`. The file may have new arms or seeds, and another baseline.
        device: "auto", "cpu" or "cuda".
        wandb_project: also log to this Weights & Biases project, each run for itself.
        progress: show progress bars; "lines" prints a line now and then instead.

    Raises:
        UserError: `out` is in use or holds another sweep, or a run raises one. A run that diverges raises none: its divergence
            is its result.
    """
    context = run_context(
        out, tokens=tokens, resume=resume, device=device, wandb_project=wandb_project, progress=progress
    )
    with sweep_directory(context.out, sweep, resume=resume, is_main=context.is_main) as news:
        for line in news:
            _say(context, line)
        with context.accelerator.main_process_first():
            data, tokenizer = _tokens(context, sweep)
        sha256 = fingerprint(data)
        results = _results(sweep, context.out)
        _check_same_tokens(results.values(), sha256, context.out)
        context.accelerator.wait_for_everyone()  # every rank reads the results before the main one adds to them
        table = _tabulate(context, sweep, results)
        for arm, seed in _announced(context, sweep, results):
            directory = context.out / sweep.directory_name(arm, seed)
            recipe = sweep.recipe_of(arm, seed)
            recipe = with_tokenizer(recipe, tokenizer) if tokenizer else recipe
            known = {"arm": arm.name, "seed": seed, "tokens_sha256": sha256}
            result = _train(replace(context, out=directory, given=data, resume=True), recipe, known)
            results[arm.name, seed] = result
            if context.is_main:
                write_result(directory, result)
            table = _tabulate(context, sweep, results)
            figure = "diverged" if result.perplexity is None else f"perplexity {result.perplexity:.3f}"
            _say(context, f"{arm.name}, seed {seed}: {figure}")
    return table


def _announced(
    context: RunContext, sweep: Sweep, results: Mapping[tuple[str, int], RunResult]
) -> Iterator[tuple[Arm, int]]:
    """The runs that are not over, in order. Before each it prints how far the sweep is and how long the rest may take."""
    runs = sweep.order()
    left = [(arm, seed) for arm, seed in runs if (arm.name, seed) not in results]
    over = len(results)
    if over:
        _say(context, f"{over} of {len(runs)} runs are over already")
    began = time.monotonic()
    for number, (arm, seed) in enumerate(left):
        remaining = ""
        if number > 0:
            seconds = (time.monotonic() - began) / number * (len(left) - number)
            remaining = f"; about {max(1, round(seconds / 60))} min left"
        _say(context, f"run {over + number + 1} of {len(runs)}: {arm.name}, seed {seed}{remaining}")
        yield arm, seed


def _tabulate(context: RunContext, sweep: Sweep, results: Mapping[tuple[str, int], RunResult]) -> SweepTable:
    """The table of the results so far, which is also written into the sweep's directory."""
    table = build_table(sweep, results)
    if context.is_main:
        write_table(table, context.out)
    return table


def _train(context: RunContext, recipe: Recipe, known: Mapping[str, Any]) -> RunResult:
    """Train one run, from its newest checkpoint if it has begun. `known` are the entries of its result that are known before."""
    # Free the memory of the run before, and its compiled code: every arm compiles graphs of its own, and few graphs are kept.
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    gc.collect()
    known = {**known, "device": device_name(context.accelerator.device.type)}
    try:
        done = pretrain_in(context, recipe)
    except DivergedError as error:
        seen = seen_in_training(context.out)
        return RunResult(status="diverged", message=" ".join(str(error).split()), seen=seen, **known)
    timed: dict[str, Any] = {
        "tokens": done.training.tokens,
        "seconds": done.training.seconds,
        "skipped_steps": done.training.skipped_steps,
        "seen": seen_in_training(context.out),
    }
    if not done.cross_entropy < LARGEST_CROSS_ENTROPY:  # NaN is not below it either
        message = f"validation cross-entropy {done.cross_entropy} after the last step"
        return RunResult(status="diverged", message=message, **known, **timed)
    assert math.isfinite(done.cross_entropy)
    return RunResult(
        status="finished",
        cross_entropy=done.cross_entropy,
        bits_per_byte=done.bits_per_byte,
        **known,
        **timed,
    )


def _tokens(context: RunContext, sweep: Sweep) -> tuple[TokenDataset, str]:
    """The tokens of all runs, and the tokenizer that the recipes have to name; "" if theirs is right."""
    begun = any(has_begun(context.out, sweep.directory_name(arm, seed)) for arm, seed in sweep.order())
    own = context.out / "tokens"
    if context.given is not None:
        if begun and own.resolve() != context.given.directory.resolve():
            raise UserError(
                f"{context.out} was begun with the tokens in {own.resolve()}; leave --tokens out, or choose another --out"
            )
        link_tokens(context.out, context.given.directory)
        return context.given, ""
    recipe = sweep.arms[0].recipe.model_copy(update={"name": sweep.name})
    # A sweep that has begun goes on with its tokens, even if the corpus has changed or is gone.
    if not (begun and (own / INDEX).is_file()):
        prepare_tokens(context, recipe)
    return TokenDataset.open(own), "" if recipe.data.tokenizer else str((context.out / "tokenizer").resolve())


def fingerprint(data: TokenDataset) -> str:
    """SHA-256 over the checksums of the shards: the same for the same text and tokenizer, wherever the tokens lie."""
    shards = sorted((shard.split, shard.file, shard.sha256) for shard in data.index.shards)
    return hashlib.sha256(repr(shards).encode()).hexdigest()


def _check_same_tokens(results: Iterable[RunResult], sha256: str, out: Path) -> None:
    """Raises UserError if the runs that are over were trained on other tokens, such as when these were prepared again."""
    other = next((result for result in results if result.tokens_sha256 not in ("", sha256)), None)
    if other is not None:
        raise UserError(
            f"the tokens in {out / 'tokens'} are not those that {other.arm}, seed {other.seed}, was trained on: the corpus has "
            "changed; restore them, or begin the grid again with another --out"
        )


def _results(sweep: Sweep, out: Path) -> dict[tuple[str, int], RunResult]:
    """The results of the runs that are over, by arm and seed."""
    found = {(arm.name, seed): read_result(out / sweep.directory_name(arm, seed)) for arm, seed in sweep.order()}
    return {run: result for run, result in found.items() if result is not None}


def _say(context: RunContext, line: str) -> None:
    """Print a line on standard error, once for all ranks, unless nothing is to be shown."""
    if context.progress and context.is_main:
        print(line, file=sys.stderr, flush=True)
