"""The main job: take a GPT-2, freeze its LayerNorms one site after the other while fine-tuning, fold, export, score.

Everything lands in one directory:

    recipe.toml  metrics.jsonl  training.json  results.json  tokens/  state/  model/  stock/
    control/{metrics.jsonl, state/, model/}
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

    from ln_removal.config.recipe import Recipe
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.hellaswag import QuestionSet
    from ln_removal.evaluation.results import Results
    from ln_removal.norms.schedule import RemovalSchedule
    from ln_removal.training.divergence import SpikeSchedule
    from ln_removal.training.loop import Removal, TrainResult
    from ln_removal.training.metrics import Progress

logger = logging.getLogger(__name__)

VERIFY_TOKENS = 4096
"""Held-out tokens on which the folded model is compared with the frozen one before anything is written."""

CHEAP_TOKENS = 1_000_000
"""Tokens so few that preparing them again costs nothing."""


@dataclass(frozen=True)
class _Run:
    """What removal and control share."""

    recipe: Recipe
    out: Path
    data: TokenDataset
    accelerator: Accelerator
    resume: bool
    wandb_project: str | None
    progress: Progress


def remove(
    recipe: Recipe,
    out: Path | str,
    *,
    tokens: Path | str | None = None,
    control: bool = False,
    questions: str | None = "auto",
    resume: bool = False,
    device: str = "auto",
    wandb_project: str | None = None,
    progress: Progress = True,
) -> Results:
    """Remove the LayerNorms of the recipe's model.

    Args:
        recipe: a removal recipe, as it comes from `load_recipe`; fitted to another depth with `presets.with_layers`.
        out: the run's directory; new or empty, unless `resume`.
        tokens: a directory prepared by `ln-prepare`; default: prepare the recipe's corpus into `out/tokens`.
        control: also train the vanilla control on the same batches, for the gap.
        questions: `completions`, `hellaswag`, a file, or None for no questions; "auto" takes completions for a corpus of
            Python source, else HellaSwag from the Hub if it can be reached.
        resume: continue the run in `out`; one that is complete returns its results at once.
        device: "auto", "cpu" or "cuda".
        wandb_project: also log to this Weights & Biases project.
        progress: show progress bars; "lines" prints a line now and then instead.

    Returns:
        The scores, as written to `out/results.json`.

    Raises:
        UserError: anything that the user can mend. What was trained before stays in `out`; when nothing was, `out` is
            left as it was found.
    """
    from ln_removal.config.presets import check_is_removal
    from ln_removal.config.recipe import dump_toml, with_defaults
    from ln_removal.data.tokens import given_tokens
    from ln_removal.evaluation import results as results_file
    from ln_removal.files.run_directory import link_tokens, run_directory
    from ln_removal.models.loading import load_model
    from ln_removal.training.ranks import watched_ranks
    from ln_removal.training.setup import build_accelerator

    began = time.perf_counter()
    out = Path(out)
    check_is_removal(recipe)
    accelerator = build_accelerator(device)
    given = given_tokens(out, tokens)
    if given is not None:  # so that recipe and results name what is trained on
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"corpus": given.corpus_name})})
    place = run_directory(
        out, dump_toml(recipe), with_defaults=with_defaults, resume=resume, is_main=accelerator.is_main_process
    )
    with watched_ranks(accelerator), place:
        accelerator.wait_for_everyone()
        if resume and (finished := _finished(recipe, out, control=control, questions=questions)):
            if accelerator.is_main_process:
                _write_pages(recipe, out, finished, missing=True)
            return finished
        asked = _question_set(questions, recipe)
        loaded = load_model(recipe.model)
        schedule = _fitting_schedule(recipe, loaded.model)
        with accelerator.main_process_first():
            if given is None:
                data = _prepared_tokens(recipe, loaded.tokenizer, out, progress=progress is True)
            else:
                data = given
                _check_given_tokens(recipe, loaded.tokenizer, data)
                if accelerator.is_main_process:
                    link_tokens(out, data.directory)
        run = _Run(recipe, out, data, accelerator, resume, wandb_project, progress)
        _train_removal(run, loaded.model, loaded.tokenizer, schedule)
        del loaded
        if control:
            _train_control(run)
        if accelerator.is_main_process:
            _score(run, asked, seconds_before=time.perf_counter() - began)
        accelerator.wait_for_everyone()
        return results_file.read(out / "results.json")


def _score(run: _Run, questions: QuestionSet | None, *, seconds_before: float) -> None:
    """Score original, control and LN-free; writes results.json and the model card."""
    from ln_removal.evaluation import results as results_file
    from ln_removal.evaluation.scoring import ScoringInputs, ScoringOptions, score

    recipe, out = run.recipe, run.out
    models = {"original": recipe.model}
    if _is_model(out / "control" / "model"):
        models["control"] = str(out / "control" / "model")
    models["ln_free"] = str(out / "model")
    data_sets = {f"{recipe.data.corpus}, validation split": run.data}
    results = score(
        ScoringInputs(models, data_sets, recipe.data.context, recipe.data.validation_tokens),
        ScoringOptions(questions=questions, device=run.accelerator.device.type, progress=run.progress is True),
        seconds_before=seconds_before,
    )
    results_file.write(results, out / "results.json")
    _write_pages(recipe, out, results)


def _write_pages(recipe: Recipe, out: Path, results: Results, *, missing: bool = False) -> None:
    """Write the model card and the report; with `missing`, only what a run killed after its results left unwritten."""
    from ln_removal.report.model_card import write_model_card
    from ln_removal.report.page import REPORT_FILE, write_report

    if not (missing and (out / "model" / "README.md").exists()):
        write_model_card(out / "model", recipe, results)
    if not (missing and (out / REPORT_FILE).exists()):
        write_report(out)


def _finished(recipe: Recipe, out: Path, *, control: bool, questions: str | None) -> Results | None:
    """The results of a run that has nothing left to do, or None."""
    from ln_removal.evaluation import results as results_file
    from ln_removal.evaluation.hellaswag import question_set_name

    has_control = _is_model(out / "control" / "model")
    if not _is_exported(out, recipe) or (control and not has_control):
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


def _is_exported(out: Path, recipe: Recipe) -> bool:
    """Whether the run's last checkpoint was folded and written in every form; each directory appears whole."""
    from ln_removal.export.write import DIRECTORIES

    return all(_is_model(out / DIRECTORIES[form]) for form in recipe.export.formats)


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _fitting_schedule(recipe: Recipe, model: GPT2LMHeadModel) -> RemovalSchedule | SpikeSchedule:
    """The schedule for this model's depth; checks what recipe and model must agree on."""
    from ln_removal.models.layout import check_supported, is_disarmed
    from ln_removal.norms.schedule import expand
    from ln_removal.training.divergence import SpikeSchedule

    if model.config.model_type == "normfree_gpt2" or is_disarmed(model.config):
        raise UserError(f"{recipe.model} is LN-free already; give a GPT-2 that still has its LayerNorms")
    check_supported(model)
    if recipe.data.context > model.config.n_positions:
        raise UserError(
            f"data.context is {recipe.data.context}, {recipe.model} has {model.config.n_positions} positions; lower it"
        )
    assert recipe.schedule is not None
    schedule = expand(recipe.schedule, model.config.n_layer, recipe.training.steps)
    return schedule if recipe.schedule.on_spike == "ignore" else SpikeSchedule(schedule)


def _question_set(questions: str | None, recipe: Recipe) -> QuestionSet | None:
    from ln_removal.evaluation.hellaswag import COMPLETIONS, HELLASWAG, load_question_set

    if questions is None:
        return None
    if questions != "auto":
        return load_question_set(questions)
    if recipe.data.corpus == "python-source":
        return load_question_set(COMPLETIONS)
    try:
        return load_question_set(HELLASWAG)
    except UserError as error:
        logger.warning("HellaSwag is left out: %s", error)
        return None


def _check_given_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: TokenDataset) -> None:
    from ln_removal.evaluation.scoring import check_same_tokenizer

    check_same_tokenizer(tokenizer, recipe.model, data)
    _check_enough(recipe, data)


def _prepared_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, out: Path, *, progress: bool) -> TokenDataset:
    """The recipe's corpus, prepared into the run's directory (once: a resumed run finds it there)."""
    from ln_removal.data.open_corpus import open_corpus
    from ln_removal.data.prepare import prepare, prepare_bar
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.scoring import check_same_tokenizer
    from ln_removal.files.run_directory import has_trained
    from ln_removal.models.loading import load_tokenizer, tokenizer_fingerprint

    place = out / "tokens"
    was_there = place.is_dir()
    if was_there and has_trained(out):  # the run goes on with them, whatever has become of the corpus
        data = TokenDataset.open(place)
        check_same_tokenizer(tokenizer, recipe.model, data)
        return data
    fingerprint = tokenizer_fingerprint(tokenizer)
    named = recipe.data.tokenizer
    if named and tokenizer_fingerprint(load_tokenizer(named)) != fingerprint:
        raise UserError(f"data.tokenizer is {named}, another tokenizer than that of {recipe.model}; leave it out")
    corpus = open_corpus(recipe.data.corpus, max_bytes=recipe.data.max_bytes)
    with prepare_bar(corpus.name, total=recipe.data.max_tokens, enabled=progress) as show:
        data = prepare(
            corpus,
            tokenizer,
            place,
            tokenizer_name=named or recipe.model,
            tokenizer_sha256=fingerprint,
            max_tokens=recipe.data.max_tokens,
            progress=show,
        )
    try:
        _check_enough(recipe, data)
    except UserError:
        if not was_there and data.split("train").tokens < CHEAP_TOKENS:
            shutil.rmtree(place)  # made again in a moment, from the corpus that is meant
        raise
    return data


def _check_enough(recipe: Recipe, data: TokenDataset) -> None:
    """Raises UserError when there are too few tokens to train on or to score."""
    from ln_removal.training.session import sampler_of

    sampler_of(recipe, data)
    if max((shard.tokens for shard in data.split("validation").shards), default=0) < 2:
        raise UserError(
            f"the validation split of {data.corpus_name} has no two tokens in a row to score; add text to it"
        )


def _train_removal(
    run: _Run,
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    schedule: RemovalSchedule | SpikeSchedule,
) -> None:
    """Train through the schedule, fold, verify, write `model/` and the other export formats; nothing if that is done."""
    from ln_removal.export.write import write_exports
    from ln_removal.files.atomic import write_json_atomically
    from ln_removal.files.metrics_log import last_logged
    from ln_removal.norms.surgery import install
    from ln_removal.training.loop import Removal
    from ln_removal.training.loss import as_teacher

    if run.resume and _is_exported(run.out, run.recipe):
        return
    spec = run.recipe.training
    teacher = as_teacher(copy.deepcopy(model), spec.precision) if spec.distillation > 0 else None
    sites = install(model, eot_token_id=run.data.eot_token_id)
    result = _train(run, model, tokenizer, run.out, label="removal", removal=Removal(sites, schedule), teacher=teacher)
    if run.accelerator.is_main_process:
        report = run.out / "training.json"
        if result.last_loss is not None:
            write_json_atomically(report, asdict(result))
        elif not report.exists():  # killed after the last step: nothing was left to train in this session
            write_json_atomically(report, asdict(result) | last_logged(run.out / "metrics.jsonl"))
        validation = run.data.split("validation")
        # Scoring takes a split shorter than the context too, so this must.
        length = min(run.recipe.data.context, max(shard.tokens for shard in validation.shards))
        held_out = next(validation.windows(length, limit_tokens=VERIFY_TOKENS, batch=VERIFY_TOKENS))
        write_exports(model, tokenizer, run.out, held_out=held_out, export=run.recipe.export)


def _train_control(run: _Run) -> None:
    """The same fine-tuning on the same batches with every LayerNorm kept; written to `control/model`, if not there yet."""
    from ln_removal.export.write import save_model
    from ln_removal.models.loading import load_model

    if run.resume and _is_model(run.out / "control" / "model"):
        return
    loaded = load_model(run.recipe.model)
    _train(run, loaded.model, loaded.tokenizer, run.out / "control", label="control", removal=None)
    if run.accelerator.is_main_process:
        save_model(loaded.model, loaded.tokenizer, run.out / "control" / "model", dtype=run.recipe.export.dtype)


def train_vanilla_control(
    recipe: Recipe, out: Path, *, data: TokenDataset, accelerator: Accelerator, progress: Progress = True
) -> None:
    """Train only the control of a removal recipe, into `out/control`: what several removals are compared with.

    Raises:
        UserError: as `remove`.
    """
    _train_control(_Run(recipe, out, data, accelerator, resume=False, wandb_project=None, progress=progress))


def _train(
    run: _Run,
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    label: str,
    removal: Removal | None,
    teacher: GPT2LMHeadModel | None = None,
) -> TrainResult:
    from ln_removal.evaluation.loss import cross_entropy
    from ln_removal.training.session import train_model

    spec = run.recipe.training
    validation = run.data.split("validation")

    def evaluate() -> dict[str, float]:
        loss = cross_entropy(
            model,
            validation,
            context=run.recipe.data.context,
            max_tokens=spec.evaluation_tokens,
            precision=spec.precision,
        )
        return {"cross_entropy": loss.cross_entropy}

    return train_model(
        model,
        run.recipe,
        run.data,
        directory,
        accelerator=run.accelerator,
        label=label,
        evaluate=evaluate,
        removal=removal,
        teacher=teacher,
        tokenizer=tokenizer,
        resume=run.resume,
        wandb_project=run.wandb_project,
        progress=run.progress,
    )
