"""Remove the norms of a language model: freeze them site by site while fine-tuning, then fold, export and score.

Everything is written into one directory:

    recipe.toml  identity.json  metrics.jsonl  training.json  results.json  tokens/  state/  model/  stock/
    control/{metrics.jsonl, state/, model/}
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.config.presets import check_is_removal, is_borrowed
from ln_removal.data.corpora import GENERATED
from ln_removal.data.open_corpus import Writer, open_corpus
from ln_removal.data.tokens import TokenDataset, ids_sha256
from ln_removal.errors import UserError
from ln_removal.evaluation import results as results_file
from ln_removal.evaluation import scoring
from ln_removal.evaluation.hellaswag import COMPLETIONS, HELLASWAG, load_question_set, question_set_name
from ln_removal.evaluation.loss import loss_by_windows
from ln_removal.evaluation.scoring import ScoringInputs, ScoringOptions
from ln_removal.export.write import DIRECTORIES, check_savable, save_model, write_exports
from ln_removal.files.atomic import write_json_atomically
from ln_removal.files.metrics_log import METRICS_FILE, WINDOWS, last_logged, metrics_rows
from ln_removal.files.run_directory import has_trained
from ln_removal.models.checks import first_token
from ln_removal.models.families import is_norm_free
from ln_removal.models.layout import check_supported, is_disarmed
from ln_removal.models.loading import load_model, load_tokenizer, tokenizer_fingerprint, trainable_positions
from ln_removal.norms.schedule import expand
from ln_removal.norms.surgery import install
from ln_removal.pipelines.context import RunContext, run_context
from ln_removal.pipelines.cpu_time import warn_of_days
from ln_removal.report.model_card import write_model_card
from ln_removal.report.page import REPORT_FILE, write_report
from ln_removal.training.checkpoint import checkpoints
from ln_removal.training.divergence import WaitingSchedule
from ln_removal.training.loop import TrainResult, train
from ln_removal.training.loss import as_teacher
from ln_removal.training.low_rank import adapt, merge
from ln_removal.training.session import Removal, Session, sampler_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ln_removal.config.recipe import ExportSpec, Recipe
    from ln_removal.evaluation.hellaswag import QuestionSet
    from ln_removal.evaluation.results import Results
    from ln_removal.norms.schedule import RemovalSchedule
    from ln_removal.training.metrics import Progress

logger = logging.getLogger(__name__)

VERIFY_TOKENS = 4096
"""The folded model is compared with the frozen one on this many held-out tokens before anything is written."""

CHEAP_TOKENS = 1_000_000
"""Fewer tokens than this are prepared again in a moment."""


CLEARLY_WORSE = 0.1
"""Nats per token by which the loss on one kind of windows has to be above that on the other for a warning."""


@dataclass(frozen=True)
class Inputs:
    """What a removal starts from: the original model, the tokens, and the schedule for the model's depth."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TokenDataset
    schedule: RemovalSchedule | WaitingSchedule


def remove(
    recipe: Recipe,
    out: Path | str,
    *,
    tokens: Path | str | None = None,
    control: bool = False,
    questions: Path | str | None = "auto",
    resume: bool = False,
    device: str = "auto",
    wandb_project: str | None = None,
    progress: Progress = True,
) -> Results:
    """Remove the norms of the recipe's model; returns the scores, as written to `out/results.json`.

    Args:
        recipe: a removal recipe, as it comes from `load_recipe`; fitted to another depth with `presets.with_layers`.
        out: the run's directory; new or empty, unless `resume`.
        tokens: a directory prepared by `ln-prepare`; default: prepare the recipe's corpus into `out/tokens`.
        control: also train the vanilla control on the same batches, for the gap.
        questions: as of `hellaswag.load_question_set`, or None for no questions; "auto" takes completions for a corpus of
            Python source, else HellaSwag from the Hub if it can be reached.
        resume: continue the run in `out`; one that is complete returns its results at once.
        device: "auto", "cpu" or "cuda".
        wandb_project: also log to this Weights & Biases project.
        progress: show progress bars; "lines" prints a line now and then instead.

    Raises:
        UserError: anything that the user can correct. What has been trained stays in `out`; if nothing has, `out` is left as
            it was found.
    """
    began = time.perf_counter()
    check_is_removal(recipe)
    context = run_context(
        out, tokens=tokens, resume=resume, device=device, wandb_project=wandb_project, progress=progress
    )
    recipe, identity = context.identified(context.recipe_of(recipe))
    out = context.out
    with context.claim(recipe):
        context.accelerator.wait_for_everyone()
        if resume and (finished := _finished(recipe.export, out, control=control, questions=questions)):
            write_pages(context, recipe, finished, model=identity.reference if identity else None, missing=True)
            return finished
        located = context.record(recipe, identity)
        asked = _question_set(questions, recipe.data.corpus)
        inputs = prepare(context, located, control=control)
        data = inputs.data
        if not (resume and _is_exported(out, recipe.export)):
            with removal_session(context, recipe, inputs) as session:
                check_windows(session, recipe, data)
                trained = train(session)
            export(context, recipe, inputs, trained)
            del session
        del inputs  # what follows needs the memory
        if control:
            train_control(context, recipe, data, model=located.model)
        if context.is_main:
            scores = score(context, located.model, recipe, data, asked, seconds_before=time.perf_counter() - began)
            write_pages(context, recipe, scores, model=located.model)
        context.accelerator.wait_for_everyone()
        return results_file.read(out / "results.json")


def _finished(spec: ExportSpec, out: Path, *, control: bool, questions: Path | str | None) -> Results | None:
    """The results of a run that is complete, else None."""
    has_control = _is_model(out / "control" / "model")
    if not _is_exported(out, spec) or (control and not has_control):
        return None
    try:
        results = results_file.read(out / "results.json")
    except UserError:  # missing or damaged: measure again
        return None
    if (results.models.control is not None) != has_control:
        return None
    if questions not in (None, "auto") and results.settings.question_set != question_set_name(questions):
        return None
    return results


def _is_exported(out: Path, spec: ExportSpec) -> bool:
    """Whether the run's last checkpoint was folded and written in every form; each directory appears whole."""
    return all(_is_model(out / DIRECTORIES[form]) for form in spec.formats)


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _question_set(questions: Path | str | None, corpus: str) -> QuestionSet | None:
    if questions is None:
        return None
    if questions != "auto":
        return load_question_set(questions)
    if corpus == "python-source":
        return load_question_set(COMPLETIONS)
    try:
        return load_question_set(HELLASWAG)
    except UserError as error:
        logger.warning("HellaSwag is left out: %s", error)
        return None


# ---------------------------------------------------------------------------------------------------------- the inputs


def prepare(context: RunContext, recipe: Recipe, *, control: bool = False) -> Inputs:
    """Load the model, fit the schedule to it, and open or prepare the tokens. First it warns of a run that would take days here.

    Raises:
        UserError: recipe, model and tokens do not go together.
    """
    warn_of_days(context, recipe, control=control)
    loaded = load_model(recipe.model)
    schedule = _fitting_schedule(recipe, loaded.model)
    check_savable(loaded.model, loaded.tokenizer, recipe.export.formats, dtype=recipe.export.dtype)
    with context.accelerator.main_process_first():  # what the main process makes, the other ranks find
        if context.given is None:
            data = _own_tokens(context, recipe, loaded.tokenizer)
        else:
            data = context.given
            scoring.check_same_tokenizer(loaded.tokenizer, recipe.model, data)
            _check_enough(recipe, data)
            context.link_given_tokens()
    return Inputs(loaded.model, loaded.tokenizer, data, schedule)


def _fitting_schedule(recipe: Recipe, model: PreTrainedModel) -> RemovalSchedule | WaitingSchedule:
    """The schedule for this model's depth; checks what recipe and model must agree on."""
    if is_norm_free(model.config) or is_disarmed(model.config):
        raise UserError(f"{recipe.model} is LN-free already; give a model that still has its norms")
    assert recipe.schedule is not None
    check_supported(model, keep=recipe.schedule.keep)
    if recipe.data.context > (positions := trainable_positions(model.config)):
        raise UserError(f"data.context is {recipe.data.context}, {recipe.model} has {positions} positions; lower it")
    schedule = expand(recipe.schedule, model.config.num_hidden_layers, recipe.training.steps)
    return schedule if recipe.schedule.on_spike == "ignore" else WaitingSchedule(schedule)


def _own_tokens(context: RunContext, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> TokenDataset:
    """The recipe's corpus, prepared in the run's directory. A resumed run finds it there."""
    place = context.out / "tokens"
    was_there = place.is_dir()
    if was_there and has_trained(context.out):  # it goes on with its tokens, even if the corpus has changed or is gone
        data = TokenDataset.open(place)
        scoring.check_same_tokenizer(tokenizer, recipe.model, data)
        return data
    named = recipe.data.tokenizer
    if named and not _are_same(load_tokenizer(named), tokenizer):
        raise UserError(f"data.tokenizer is {named}, another tokenizer than that of {recipe.model}; leave it out")
    spec = recipe.data
    if spec.corpus == GENERATED:  # written for this run: not more than it trains on
        most = min(recipe.tokens, spec.max_tokens or recipe.tokens)
        spec = spec.model_copy(update={"max_tokens": most})
    corpus = open_corpus(
        spec.corpus,
        writer=Writer(recipe.model, spec.max_tokens, context.accelerator.device.type),
        max_bytes=spec.max_bytes,
        validation_fraction=spec.validation_share,
    )
    data = context.prepare_tokens(corpus, tokenizer, spec, name=named or recipe.model)
    try:
        _check_enough(recipe, data)
    except UserError:
        if not was_there and data.split("train").tokens < CHEAP_TOKENS:
            shutil.rmtree(place)  # so that the same --out can be used with another corpus
        raise
    return data


def _are_same(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return tokenizer_fingerprint(one) == tokenizer_fingerprint(other) or ids_sha256(one) == ids_sha256(other)


def _check_enough(recipe: Recipe, data: TokenDataset) -> None:
    """Raises UserError when there are too few tokens to train on or to score."""
    sampler_of(recipe, data)
    if max((shard.tokens for shard in data.split("validation").shards), default=0) < 2:
        raise UserError(
            f"the validation split of {data.corpus_name} has no two tokens in a row to score; add text to it"
        )


# --------------------------------------------------------------------------------------------------- training, exporting


@contextmanager
def removal_session(context: RunContext, recipe: Recipe, inputs: Inputs) -> Iterator[Session]:
    """The training through the schedule; installs freezable norms in the model and keeps a copy of it as the teacher."""
    spec = recipe.training
    teacher = as_teacher(copy.deepcopy(inputs.model), spec.precision) if spec.distillation > 0 else None
    assert recipe.schedule is not None
    sites = install(
        inputs.model,
        eot_token_id=inputs.data.eot_token_id,
        bos_token_id=first_token(inputs.tokenizer, inputs.model.config),
        **recipe.freezing,
    )
    if spec.lora_rank is not None:
        adapt(inputs.model, spec.lora_rank)
    with context.session(
        inputs.model,
        recipe,
        inputs.data,
        label="removal",
        removal=Removal(sites, inputs.schedule),
        teacher=teacher,
        tokenizer=inputs.tokenizer,
    ) as session:
        if is_borrowed(recipe) and not context.resume:
            session.tracker.say(recipe.description)
        yield session


def check_windows(session: Session, recipe: Recipe, data: TokenDataset) -> None:
    """Before the first step: warn when the original reads the kind of windows that the recipe did not choose clearly better.

    Both losses are of the same tokens; they are logged too.
    """
    if not session.accelerator.is_main_process or (session.resume and checkpoints(session.state_directory)):
        return
    context, precision, model = recipe.data.context, recipe.training.precision, session.objective.model
    found = None
    for split in ("validation", "train"):
        found = found or loss_by_windows(model, data.split(split), context=context, precision=precision)
    if found is None:
        return
    metrics = session.state_directory.with_name(METRICS_FILE)
    if not any(row["kind"] == WINDOWS for row in metrics_rows(metrics)):  # killed before its first checkpoint
        session.tracker.log(WINDOWS, 0, asdict(found))
    surplus, other = found.stream - found.document, "document"
    if recipe.data.windows == "document":
        surplus, other = -surplus, "stream"
    if surplus > CLEARLY_WORSE and surplus > 2 * found.standard_error:
        session.tracker.say(
            f"warning: the original has a loss of {found.document:.2f} nats on documents that are read from their start, and of "
            f"{found.stream:.2f} on the same text in the middle of a stream; this recipe trains on the worse of the two, so set "
            f'data.windows = "{other}" if the model was trained that way'
        )


def export(context: RunContext, recipe: Recipe, inputs: Inputs, trained: TrainResult) -> None:
    """Fold the trained model, verify it on held-out text, and write training.json and every export format.

    Raises:
        ExportError: the folded model does not compute what the frozen one does.
        UserError: a directory cannot be written.
    """
    if not context.is_main:
        return
    report = context.out / "training.json"
    if trained.last_loss is not None:
        write_json_atomically(report, asdict(trained))
    elif not report.exists():  # killed after the last step: nothing was left to train in this session
        write_json_atomically(report, asdict(trained) | last_logged(context.out / METRICS_FILE))
    validation = inputs.data.split("validation")
    # Scoring accepts a split that is shorter than the context, so this must too.
    length = min(recipe.data.context, max(shard.tokens for shard in validation.shards))
    held_out = None
    if recipe.data.windows == "document":
        count = min(validation.documents, max(1, VERIFY_TOKENS // length))
        held_out = validation.beginnings(count, length)
    if held_out is None:
        held_out = next(validation.windows(length, limit_tokens=VERIFY_TOKENS, batch=VERIFY_TOKENS))
    merge(inputs.model)
    write_exports(inputs.model, inputs.tokenizer, context.out, held_out=held_out, export=recipe.export)


def train_control(context: RunContext, recipe: Recipe, data: TokenDataset, *, model: str | None = None) -> None:
    """Make the same fine-tuning on the same batches with every norm kept, and write `control/model`, unless it is there.

    Args:
        model: where the original is, as `load_model` takes it. Default: what the recipe names.

    Raises:
        UserError: as `remove`.
    """
    directory = context.out / "control"
    if context.resume and _is_model(directory / "model"):
        return
    loaded = load_model(model or recipe.model)
    if recipe.training.lora_rank is not None:
        adapt(loaded.model, recipe.training.lora_rank)
    with context.session(
        loaded.model, recipe, data, label="control", directory=directory, tokenizer=loaded.tokenizer
    ) as session:
        train(session)
    if context.is_main:
        merge(loaded.model)
        save_model(loaded.model, loaded.tokenizer, directory / "model", dtype=recipe.export.dtype)


# ------------------------------------------------------------------------------------------------------------- scoring


def score(
    context: RunContext,
    original: str,
    recipe: Recipe,
    data: TokenDataset,
    questions: QuestionSet | None,
    *,
    seconds_before: float,
) -> Results:
    """Score original, control and LN-free on the same tokens and questions, and write results.json."""
    out, spec = context.out, recipe.data
    models = {"original": original}
    if _is_model(out / "control" / "model"):
        models["control"] = str(out / "control" / "model")
    models["ln_free"] = str(out / "model")
    data_sets = {f"{spec.corpus}, validation split": data}
    results = scoring.score(
        ScoringInputs(
            models, data_sets, spec.context, spec.validation_tokens, spec.windows, names={"original": recipe.model}
        ),
        ScoringOptions(questions=questions, device=context.accelerator.device.type, progress=context.progress is True),
        seconds_before=seconds_before,
    )
    results_file.write(results, out / "results.json")
    return results


def write_pages(
    context: RunContext, recipe: Recipe, results: Results, *, model: str | None, missing: bool = False
) -> None:
    """Write the model card and the report; with `missing`, only those that are not there yet. `model`: see `model_card`."""
    out = context.out
    if not context.is_main:
        return
    if not (missing and (out / "model" / "README.md").exists()):
        write_model_card(out / "model", recipe, results, model=model)
    if not (missing and (out / REPORT_FILE).exists()):
        write_report(out)
