"""Publish an LN-free model on the Hugging Face Hub, in one commit: a repository shows all of it or nothing.

Large files are uploaded before the commit and belong to no revision until then. What a cut connection interrupts is tried
again, a bounded number of times; files that arrived are not sent twice.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.errors import UserError
from ln_removal.export.hub_target import HubTarget, tagged_commit
from ln_removal.hub_access import is_passing, one_line, publish_error

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

    from ln_removal.export.model_card import Form

Files = Mapping[str, Path | bytes]
"""What goes up, by its path in the repository."""

WAITS = (3.0, 10.0, 30.0)
"""Seconds between attempts. The client has tried each request several times itself before one of ours counts as failed."""

OURS = ("*.safetensors", "*.safetensors.index.json", "stock/*", "plots/*")
"""Files of an earlier publication that would contradict a new one, and are removed with it if it has no such file."""

LEFT_OUT = ("README.md", ".*", "*.tmp")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """Where the model is now; `is_new` is False when the repository held exactly this already."""

    url: str
    commit: str
    is_new: bool

    @property
    def line(self) -> str:
        """What a command prints."""
        return f"published: {self.url}   commit {self.commit[:7]}" + ("" if self.is_new else " (it was there already)")


def publish_run(run: Path, target: HubTarget, *, progress: bool = False) -> Published:
    """Publish what a finished run has exported: its LN-free model, its stock form, scores, plots and card.

    Raises:
        UserError: the run has no model yet, or publishing failed; the message says how to publish later.
    """
    files = run_files(run, target)
    try:
        return publish(files, target, message=f"LN-free model of {run.name or run.resolve().name}", progress=progress)
    except UserError as error:
        again = f"ln-export {shlex.quote(str(run))} {target.options}"
        raise UserError(f"{error}; everything is in {run}, publish it with: {again}") from None


def publish_export(directory: Path, source: str, target: HubTarget, *, form: Form, progress: bool = False) -> Published:
    """Publish a model that `ln-export` has written, with the scores of the run it comes from, if it does.

    Args:
        directory: what was written.
        source: what it was exported from: a run, a model's directory or a Hub id.
        target: the repository.
        form: the format written.
        progress: show progress bars.

    Raises:
        UserError: publishing failed; the exported model stays.
    """
    files = export_files(directory, source, target, form=form)
    try:
        return publish(files, target, message=f"{form} form of {Path(source).name}", progress=progress)
    except UserError as error:
        raise UserError(
            f"{error}; the exported model is in {directory}; to publish it later, give the same command another --out"
        ) from None


def run_files(run: Path, target: HubTarget) -> Files:
    """Everything of a run that is published, with a card for the repository.

    Raises:
        UserError: it is no run of ln-remove, or has not exported its model yet.
    """
    from ln_removal.evaluation.run_models import recipe_of
    from ln_removal.run_directory import RECIPE_FILE

    if not (run / RECIPE_FILE).is_file():
        raise UserError(
            f"{run} is no run of ln-remove, whose model could be published as it is; pass --out to export it"
        )
    if recipe_of(run).schedule is None:
        raise UserError(f"{run} is a run of ln-pretrain; only what ln-remove has made LN-free can be published")
    if not (run / "model" / "config.json").is_file():
        raise UserError(f"{run} has no exported model yet; continue it with ln-remove --out {run} --resume")
    has_stock = "stock" in recipe_of(run).export.formats and (run / "stock" / "config.json").is_file()
    files = {**_model_files(run / "model"), **(_model_files(run / "stock", prefix="stock/") if has_stock else {})}
    return files | _beside(run) | {"README.md": _card(files, str(run), run, target, form="normfree")}


def export_files(directory: Path, source: str, target: HubTarget, *, form: Form) -> Files:
    """An exported model, and the scores, plots and card of the run it comes from, if it comes from one."""
    from ln_removal.evaluation.run_models import run_of

    run = run_of(Path(source))
    files = _model_files(directory)
    beside = {} if run is None else _beside(run)
    return files | beside | {"README.md": _card(files, source, run, target, form=form)}


def publish(files: Files, target: HubTarget, *, message: str, progress: bool = False) -> Published:
    """Make the repository if needed, and commit the files to it at once.

    Args:
        files: by path in the repository.
        target: the repository, its visibility if it is new, and a tag.
        message: of the commit.
        progress: show the client's progress bars.

    Raises:
        UserError: the Hub refused, or could not be reached after several attempts; the repository is as it was before.
    """
    waits = iter(WAITS)
    attempt = 1
    with _quiet_client(progress):
        while True:
            try:
                return _attempt(files, target, message, over_http=attempt > 1)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 (the client raises what its transports raise)
                wait = next(waits, None) if is_passing(error) else None
                if wait is None:
                    raise publish_error(error, target.repo_id, attempts=attempt) from None
                attempt += 1
                logger.warning("publishing was interrupted (%s); trying again in %.0f seconds", one_line(error), wait)
                time.sleep(wait)


def _attempt(files: Files, target: HubTarget, message: str, *, over_http: bool) -> Published:
    from huggingface_hub import CommitOperationDelete, HfApi

    api = HfApi()
    _make_repository(api, target)
    before = api.model_info(target.repo_id)
    there = {sibling.rfilename for sibling in before.siblings or ()}
    stale = [path for path in sorted(there - set(files)) if _is_ours(path)]
    with _additions(files, over_http=over_http) as additions:
        done = api.create_commit(
            target.repo_id,
            [*additions, *(CommitOperationDelete(path_in_repo=path) for path in stale)],
            commit_message=message,
            parent_commit=before.sha,  # somebody else's commit in between is told, not overwritten
        )
    if missing := sorted(set(files) - set(api.list_repo_files(target.repo_id, revision=done.oid))):
        raise UserError(
            f"{target.repo_id} leaves out {missing[0]} of what is published, probably by its .gitignore; remove that file "
            "from the repository"
        )
    if target.tag is not None:
        _tag(api, target, done.oid)
    return Published(f"{api.endpoint}/{target.repo_id}", done.oid, is_new=done.oid != before.sha)


def _is_ours(path: str) -> bool:
    """Whether `OURS` names it; fnmatch's * also matches the slash of a user's own folders."""
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in OURS)


def _make_repository(api: HfApi, target: HubTarget) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        private = api.model_info(target.repo_id).private
    except RepositoryNotFoundError:
        api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        return
    if target.private and not private:
        raise UserError(f"{target.repo_id} exists and is public; leave out --private, or choose another name")


def _tag(api: HfApi, target: HubTarget, commit: str) -> None:
    assert target.tag is not None
    taken = tagged_commit(api, target)
    if taken is None:
        api.create_tag(target.repo_id, tag=target.tag, revision=commit)
    elif taken != commit:
        raise UserError(
            f"{target.repo_id} was published as {commit[:7]}, but its tag {target.tag} is on {taken[:7]} already; choose another "
            "--tag"
        )


@contextmanager
def _additions(files: Files, *, over_http: bool) -> Iterator[list[CommitOperationAdd]]:
    """The operations of the commit.

    Given a path, the client uses Xet storage where it can. Where that does not answer (a mirror without it, a firewall),
    it gets open files, which it uploads over plain HTTP.
    """
    from huggingface_hub import CommitOperationAdd

    with ExitStack() as opened:
        yield [
            CommitOperationAdd(
                path_in_repo=path,
                path_or_fileobj=opened.enter_context(content.open("rb"))
                if over_http and isinstance(content, Path)
                else content,
            )
            for path, content in sorted(files.items())
        ]


def _model_files(directory: Path, *, prefix: str = "") -> dict[str, Path | bytes]:
    """The files of a saved model; its card is left out, because a repository gets one of its own."""
    return {
        prefix + path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in LEFT_OUT)
    }


def _beside(run: Path) -> dict[str, Path | bytes]:
    """Scores, report and plots of a run, as far as it has them.

    Text of data that is not public stays here: where there is any, samples and continuations are left out of both. The
    report is written anew, because the one on disk may be older than the scores.
    """
    from ln_removal.evaluation.run_models import recipe_of
    from ln_removal.export.card_metadata import is_public_corpus, is_public_data
    from ln_removal.report.page import render_page
    from ln_removal.report.run_record import read_run

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
    from ln_removal.evaluation import results as results_file
    from ln_removal.evaluation.run_models import recipe_of
    from ln_removal.export.model_card import converted_model_card, model_card

    has_code = any(fnmatch(path, "model*.py") for path in files)
    if run is None:
        card = converted_model_card(
            source, repo_id=target.repo_id, form=form, has_code=has_code, license_id=_hub_license(source)
        )
        return card.encode()
    recipe = recipe_of(run)
    results = results_file.read(run / "results.json") if (run / "results.json").is_file() else None
    card = model_card(
        recipe,
        results,
        repo_id=target.repo_id,
        form=form,
        has_stock="stock/config.json" in files,
        has_code=has_code,
        license_id=_hub_license(recipe.model),
    )
    return card.encode()


def _hub_license(model: str) -> str | None:
    """The license that a Hub model's own card names; None when it is no Hub model or cannot be asked."""
    from huggingface_hub import HfApi

    from ln_removal.export.card_metadata import LICENSES, hub_id
    from ln_removal.hub_access import first_answer

    repo_id = hub_id(model)
    if model in LICENSES or repo_id is None:
        return None
    try:
        card = first_answer(lambda: HfApi().model_info(repo_id)).card_data
    except Exception:  # noqa: BLE001 (a card without this line is no reason not to publish)
        return None
    named = None if card is None else card.get("license")
    return named if isinstance(named, str) else None


@contextmanager
def _quiet_client(progress: bool) -> Iterator[None]:
    """No messages of the client, which name upload addresses with their signatures; progress bars when asked for."""
    import warnings

    import huggingface_hub.utils
    from huggingface_hub.utils import logging as client_logging

    bars: Any = huggingface_hub.utils
    verbosity, hide = client_logging.get_verbosity(), not progress and not bars.are_progress_bars_disabled()
    client_logging.set_verbosity(logging.CRITICAL)
    if hide:
        bars.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        client_logging.set_verbosity(verbosity)
        if hide:
            bars.enable_progress_bars()
