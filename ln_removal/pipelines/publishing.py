"""Publish a run or an exported model: its models, scores, report and plots, with a card for the repository."""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from ln_removal.errors import UserError
from ln_removal.evaluation import results as results_file
from ln_removal.evaluation.scoring import recipe_of, run_of
from ln_removal.export.hub import Files, HubTarget, Published, publish
from ln_removal.files.hub import first_answer
from ln_removal.files.run_directory import RECIPE_FILE
from ln_removal.models.families import family_of
from ln_removal.models.identity import model_of_run
from ln_removal.models.loading import load_config
from ln_removal.report.model_card import (
    REPOSITORIES,
    UNKNOWN_LICENSE,
    converted_model_card,
    hub_id,
    is_public_corpus,
    is_public_data,
    model_card,
)
from ln_removal.report.page import render_page
from ln_removal.report.run_record import read_run

if TYPE_CHECKING:
    from ln_removal.report.model_card import Form

logger = logging.getLogger(__name__)

LEFT_OUT = ("README.md", ".*", "*.tmp")


def publish_run(run: Path | str, target: HubTarget, *, progress: bool = False) -> Published:
    """Publish what a finished run has exported: its LN-free model, the stock form of it, scores, plots and a card.

    Raises:
        UserError: the run has no model yet, or publishing failed; the message says how to publish later.
    """
    run = Path(run)
    files = run_files(run, target)
    try:
        return publish(files, target, message=f"LN-free model of {run.name or run.resolve().name}", progress=progress)
    except UserError as error:
        again = f"ln-export {shlex.quote(str(run))} {target.options}"
        raise UserError(f"{error}; everything is in {run}, publish it with: {again}") from None


def publish_export(
    directory: Path | str, source: str | Path, target: HubTarget, *, form: Form, progress: bool = False
) -> Published:
    """Publish a model that `ln-export` has written, with the scores of the run that it comes from, if there is one.

    Args:
        directory: the exported model.
        source: what it was exported from: a run, a model's directory or a Hub id.
        target: the repository.
        form: the format of the exported model.
        progress: show progress bars.

    Raises:
        UserError: publishing failed; the exported model stays.
    """
    files = export_files(Path(directory), str(source), target, form=form)
    try:
        return publish(files, target, message=f"{form} form of {Path(source).name}", progress=progress)
    except UserError as error:
        raise UserError(
            f"{error}; the exported model is in {directory}; to publish it later, give the same command another --out"
        ) from None


def run_files(run: Path, target: HubTarget) -> Files:
    """All files of a run that are published, with a card for the repository.

    Raises:
        UserError: it is no run of ln-remove, or has not exported its model yet.
    """
    if not (run / RECIPE_FILE).is_file():
        raise UserError(
            f"{run} is no run of ln-remove, whose model could be published as it is; pass --out to export it"
        )
    if recipe_of(run).schedule is None:
        raise UserError(
            f"{run} is a run of ln-pretrain; only what ln-remove has made LN-free can be published: name such a run"
        )
    if not (run / "model" / "config.json").is_file():
        raise UserError(f"{run} has no exported model yet; continue it with ln-remove --out {run} --resume")
    has_stock = "stock" in recipe_of(run).export.formats and (run / "stock" / "config.json").is_file()
    files = {**_model_files(run / "model"), **(_model_files(run / "stock", prefix="stock/") if has_stock else {})}
    return files | _beside(run) | {"README.md": _card(files, str(run), run, target, form="normfree")}


def export_files(directory: Path, source: str, target: HubTarget, *, form: Form) -> Files:
    """The files of an exported model and a card, with scores and plots if the model comes from a run.

    Raises:
        UserError: it comes from a run of ln-pretrain, which has no card of a removal.
    """
    run = run_of(Path(source))
    if run is not None and recipe_of(run).schedule is None:
        raise UserError(
            f"{source} is of a run of ln-pretrain, and cards are for what ln-remove has made LN-free; the exported model is "
            f"in {directory}: upload it with `hf upload {target.repo_id} {directory}`"
        )
    files = _model_files(directory)
    beside = {} if run is None else _beside(run)
    return files | beside | {"README.md": _card(files, source, run, target, form=form)}


def _model_files(directory: Path, *, prefix: str = "") -> dict[str, Path | bytes]:
    """The files of a saved model. Its card is left out, because the repository gets another one."""
    return {
        prefix + path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in LEFT_OUT)
    }


def _beside(run: Path) -> dict[str, Path | bytes]:
    """Scores, report and plots of a run, as far as there are any.

    Text from data that is not public is not published: samples and continuations are then left out of scores and report. The
    report is rendered again, because the one on disk may be older than the scores.
    """
    files: dict[str, Path | bytes] = {
        f"plots/{path.name}": path
        for path in sorted((run / "plots").glob("*"))
        if path.suffix in (".png", ".svg", ".pdf")
    }
    if not (run / "results.json").is_file():
        return files
    record = read_run(run)
    found = record.results
    names = [found.settings.data, *(data.data for data in found.by_data)]
    if is_public_corpus(recipe_of(run).data.corpus) and all(map(is_public_data, names)):
        files["results.json"] = run / "results.json"
    else:
        by_data = tuple(data.model_copy(update={"worst": ()}) for data in found.by_data)
        found = found.model_copy(update={"by_data": by_data, "continuations": (), "odd_text": ()})
        files["results.json"] = json.dumps(found.model_dump(), indent=1).encode()
    files["report.html"] = render_page(replace(record, results=found)).encode("utf-8", errors="replace")
    return files


def _card(files: Files, source: str, run: Path | None, target: HubTarget, *, form: Form) -> bytes:
    has_code = any(fnmatch(path, "model*.py") for path in files)
    config = files["config.json"]
    assert isinstance(config, Path), config
    family = family_of(load_config(config.parent))
    if run is None:
        card = converted_model_card(
            source,
            family=family,
            repo_id=target.repo_id,
            form=form,
            has_code=has_code,
            license_id=_hub_license(source),
        )
        return card.encode()
    recipe = recipe_of(run)
    results = results_file.read(run / "results.json") if (run / "results.json").is_file() else None
    try:
        model, license_id = model_of_run(run, recipe.model), None
    except UserError as error:  # the run's own files are complete without it
        logger.warning("the card names no license: %s", error)
        model, license_id = str(run.resolve()), UNKNOWN_LICENSE
    card = model_card(
        recipe,
        results,
        family=family,
        model=model,
        repo_id=target.repo_id,
        form=form,
        has_stock="stock/config.json" in files,
        has_code=has_code,
        license_id=license_id or _hub_license(model),
    )
    return card.encode()


def _hub_license(model: str) -> str | None:
    """The license that the card of a Hub model names; None if it is no Hub model or the Hub does not answer."""
    repo_id = hub_id(model)
    if repo_id is None or repo_id in REPOSITORIES.values():
        return None
    try:
        card = first_answer(lambda: HfApi().model_info(repo_id)).card_data
    except Exception:  # noqa: BLE001 (a card without this line is no reason not to publish)
        return None
    named = None if card is None else card.get("license")
    return named if isinstance(named, str) else None
