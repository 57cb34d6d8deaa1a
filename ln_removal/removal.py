"""The main job: take a GPT-2, freeze its LayerNorms one site after the other while fine-tuning, fold, export, score.

Everything lands in one directory:

    recipe.toml  metrics.jsonl  results.json  README.md  tokens/  state/  model/  stock/  control/{metrics.jsonl, state/, model/}
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.results import Results
    from ln_removal.evaluation.scoring import QuestionSet
    from ln_removal.recipe import Recipe
    from ln_removal.schedule import RemovalSchedule
    from ln_removal.training.loop import Removal, TrainResult

logger = logging.getLogger(__name__)

VERIFY_TOKENS = 4096
"""Held-out tokens on which the folded model is compared with the frozen one before anything is written."""


@dataclass(frozen=True)
class _Run:
    """What removal and control share."""

    recipe: Recipe
    out: Path
    data: TokenDataset
    accelerator: Accelerator
    resume: bool
    wandb_project: str | None


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
    progress: bool = True,
) -> Results:
    """Remove the LayerNorms of the recipe's model.

    Args:
        recipe: a removal recipe, as it comes from `load_recipe`; fitted to another depth with `recipe_scaling.with_layers`.
        out: the run's directory; new or empty, unless `resume`.
        tokens: a directory prepared by `ln-prepare`; default: prepare the recipe's corpus into `out/tokens`.
        control: also train the vanilla control on the same batches, for the gap.
        questions: `completions`, `hellaswag`, a file, or None for no questions; "auto" takes completions for a corpus of
            Python source, else HellaSwag from the Hub if it can be reached.
        resume: continue the run in `out`.
        device: "auto", "cpu" or "cuda".
        wandb_project: also log to this Weights & Biases project.
        progress: show progress bars.

    Returns:
        The scores, as written to `out/results.json`.

    Raises:
        UserError: anything that the user can mend; what was computed before stays in `out`.
    """
    from ln_removal.data.tokens import write_json_atomically
    from ln_removal.evaluation import results as results_file
    from ln_removal.evaluation.scoring import score
    from ln_removal.models import load_model
    from ln_removal.recipe import dump_toml
    from ln_removal.training.setup import build_accelerator, claim_run_directory

    began = time.perf_counter()
    out = Path(out)
    if recipe.schedule is None:
        raise UserError(f"recipe {recipe.name} has no [schedule]; it trains from scratch: run it with ln-pretrain")
    accelerator = build_accelerator(device)
    loaded = load_model(recipe.model)
    schedule = _fitting_schedule(recipe, loaded.model)
    asked = _question_set(questions, recipe)
    if accelerator.is_main_process:
        claim_run_directory(out, dump_toml(recipe), resume=resume)
    accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        data = _tokens(recipe, loaded.tokenizer, out, tokens)
    run = _Run(recipe, out, data, accelerator, resume, wandb_project)

    models = {"original": recipe.model, "ln_free": str(out / "model")}
    trained = _train_removal(run, loaded.model, loaded.tokenizer, schedule)
    del loaded
    if control:
        models["control"] = str(out / "control" / "model")
        _train_control(run)
    if not accelerator.is_main_process:
        return results_file.read(_wait_for_results(accelerator, out))
    results = score(
        {role: models[role] for role in ("original", "control", "ln_free") if role in models},
        data,
        data_name=f"{recipe.data.corpus}, validation split",
        context=recipe.data.context,
        max_tokens=recipe.data.validation_tokens,
        questions=asked,
        device=accelerator.device.type,
        progress=progress,
    )
    results = results.model_copy(update={"seconds": time.perf_counter() - began})
    results_file.write(results, out / "results.json")
    write_json_atomically(out / "training.json", trained.__dict__)
    from ln_removal.export.model_card import write_model_card

    write_model_card(out / "model", recipe, results)
    _wait_for_results(accelerator, out)
    return results


def _wait_for_results(accelerator: Accelerator, out: Path) -> Path:
    accelerator.wait_for_everyone()
    return out / "results.json"


def _fitting_schedule(recipe: Recipe, model: GPT2LMHeadModel) -> RemovalSchedule:
    """The schedule for this model's depth; checks what recipe and model must agree on."""
    from ln_removal.architectures import check_supported
    from ln_removal.schedule import expand

    check_supported(model)
    if recipe.data.context > model.config.n_positions:
        raise UserError(
            f"data.context is {recipe.data.context}, {recipe.model} has {model.config.n_positions} positions; lower it"
        )
    assert recipe.schedule is not None
    return expand(recipe.schedule, model.config.n_layer, recipe.training.steps)


def _question_set(questions: str | None, recipe: Recipe) -> QuestionSet | None:
    from ln_removal.evaluation.scoring import COMPLETIONS, HELLASWAG, load_question_set

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


def _tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, out: Path, directory: Path | str | None
) -> TokenDataset:
    """The given tokens, or the recipe's corpus prepared into the run's directory."""
    from ln_removal.data.open_corpus import open_corpus
    from ln_removal.data.prepare import prepare
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.scoring import check_same_tokenizer
    from ln_removal.models import tokenizer_fingerprint

    if directory is not None:
        data = TokenDataset.open(directory)
        check_same_tokenizer(tokenizer, recipe.model, data)
        return data
    corpus = open_corpus(recipe.data.corpus, max_bytes=recipe.data.max_bytes)
    return prepare(
        corpus,
        tokenizer,
        out / "tokens",
        tokenizer_name=recipe.data.tokenizer or recipe.model,
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        max_tokens=recipe.data.max_tokens,
    )


def _train_removal(
    run: _Run, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, schedule: RemovalSchedule
) -> TrainResult:
    """Train through the schedule, fold, verify, write `model/` and the other export formats."""
    from ln_removal.export.writing import write_exports
    from ln_removal.surgery import install
    from ln_removal.training.loop import Removal

    sites = install(model, eot_token_id=run.data.eot_token_id)
    result = _train(run, model, run.out, label="removal", removal=Removal(sites, schedule))
    if run.accelerator.is_main_process:
        validation = run.data.split("validation")
        # Scoring takes a split shorter than the context too, so this must.
        length = min(run.recipe.data.context, max(shard.tokens for shard in validation.shards))
        held_out = next(validation.windows(length, limit_tokens=VERIFY_TOKENS, batch=VERIFY_TOKENS))
        write_exports(model, tokenizer, run.out, held_out=held_out, export=run.recipe.export)
    return result


def _train_control(run: _Run) -> None:
    """The same fine-tuning on the same batches with every LayerNorm kept; written to `control/model`."""
    from ln_removal.export.writing import save_model
    from ln_removal.models import load_model

    loaded = load_model(run.recipe.model)
    _train(run, loaded.model, run.out / "control", label="control", removal=None)
    if run.accelerator.is_main_process:
        save_model(loaded.model, loaded.tokenizer, run.out / "control" / "model", dtype=run.recipe.export.dtype)


def _train(run: _Run, model: GPT2LMHeadModel, directory: Path, *, label: str, removal: Removal | None) -> TrainResult:
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
        resume=run.resume,
        wandb_project=run.wandb_project,
    )
