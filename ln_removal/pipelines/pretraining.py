"""Pretrain a GPT-2, a Pythia, a Llama or a Qwen2: prepare tokenizer and tokens, build the model, train it, write and measure it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import set_seed

from ln_removal.config.presets import check_is_pretraining
from ln_removal.data.corpora import Corpus, Document
from ln_removal.data.encoder import train_code_tokenizer
from ln_removal.data.open_corpus import open_corpus
from ln_removal.data.tokens import INDEX, TokenDataset
from ln_removal.errors import UserError
from ln_removal.evaluation.loss import LossResult, cross_entropy
from ln_removal.evaluation.scoring import check_same_tokenizer
from ln_removal.export.write import check_savable, save_model
from ln_removal.files.run_directory import has_trained
from ln_removal.models.loading import load_model, load_tokenizer
from ln_removal.models.norm_choice import build_model
from ln_removal.pipelines.context import RunContext, run_context, with_tokenizer
from ln_removal.pipelines.cpu_time import warn_of_days
from ln_removal.report.base_model_card import write_base_model_card
from ln_removal.training.loop import TrainResult, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from ln_removal.config.recipe import Recipe
    from ln_removal.training.metrics import Progress

TOKENIZER_BYTES_PER_SOURCE = 15_000_000
"""How much text of each source of the corpus a tokenizer is trained on."""


@dataclass(frozen=True)
class PretrainResult:
    """The directory of the model, the result of its training, and its loss on the whole validation split.

    `cross_entropy` is in nats per token. `bits_per_byte` is None if the tokens do not say how many bytes they were.
    """

    model: Path
    training: TrainResult
    cross_entropy: float
    bits_per_byte: float | None


def pretrain(
    recipe: Recipe,
    out: Path | str,
    *,
    tokens: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
    wandb_project: str | None = None,
    progress: Progress = True,
) -> PretrainResult:
    """Train the recipe's [architecture] from scratch and write it to `out/model`.

    Args:
        recipe: a pretraining recipe.
        out: the run's directory: recipe.toml, metrics.jsonl, tokenizer/, tokens/, state/, model/.
        tokens: a directory prepared by `ln-prepare`, with the tokenizer that the recipe names in data.tokenizer (or, when
            it names none, the one they were made with); default: prepare the recipe's corpus into `out/tokens`.
        resume: continue the run in `out`.
        device: "auto", "cpu" or "cuda".
        wandb_project: also log to this Weights & Biases project.
        progress: show progress bars; "lines" prints a line now and then instead.

    Raises:
        UserError: not a pretraining recipe, or anything the corpus, the directory or the device gets wrong.
    """
    check_is_pretraining(recipe)
    context = run_context(
        out, tokens=tokens, resume=resume, device=device, wandb_project=wandb_project, progress=progress
    )
    return pretrain_in(context, recipe)


def pretrain_in(context: RunContext, recipe: Recipe) -> PretrainResult:
    """As `pretrain`, in a context that exists already."""
    recipe, identity = context.identified(context.recipe_of(recipe))
    architecture = recipe.architecture
    assert architecture is not None
    with context.claim(recipe):
        located = context.record(recipe, identity)
        warn_of_days(context, recipe)
        tokenizer, data = _prepare(context, located)
        set_seed(recipe.seed)
        model = build_model(architecture, eot_token_id=data.eot_token_id)
        check_savable(model, tokenizer)
        with context.session(model, recipe, data, label=recipe.name) as session:
            trained = train(session)
        if context.is_main:
            final = _export(context, recipe, model, tokenizer, data)
        else:
            final = cross_entropy(
                model,
                data.split("validation"),
                context=recipe.data.context,
                windows=recipe.data.windows,
                precision=recipe.training.precision,
            )
        return PretrainResult(context.out / "model", trained, final.cross_entropy, final.bits_per_byte)


def _prepare(context: RunContext, recipe: Recipe) -> tuple[PreTrainedTokenizerFast, TokenDataset]:
    """The tokenizer and the tokens, given or prepared."""
    assert recipe.architecture is not None
    with context.accelerator.main_process_first():  # what the main process makes, the other ranks find
        if context.given is None:
            tokenizer, data = prepare_tokens(context, recipe)
        else:
            tokenizer, data = _tokenizer_of(context.given, recipe), context.given
            context.link_given_tokens()
        if data.vocab_size > recipe.architecture.vocab_size:
            raise UserError(
                f"the tokenizer has {data.vocab_size} entries, architecture.vocab_size is "
                f"{recipe.architecture.vocab_size}; raise it, or choose another tokenizer"
            )
    return tokenizer, data


def _export(
    context: RunContext,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: TokenDataset,
) -> LossResult:
    """Write the model and its card; returns its loss on the whole validation split.

    The loss is measured on what was written, in float32, as ln-evaluate measures it.
    """
    directory = context.out / "model"
    save_model(model, tokenizer, directory, dtype=recipe.export.dtype)
    written = load_model(str(directory), device=context.accelerator.device.type).model
    final = cross_entropy(written, data.split("validation"), context=recipe.data.context, windows=recipe.data.windows)
    write_base_model_card(
        directory,
        recipe,
        cross_entropy=final.cross_entropy,
        bits_per_byte=final.bits_per_byte,
        validation_tokens=final.tokens,
    )
    return final


def _tokenizer(recipe: Recipe, corpus: Corpus, directory: Path) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer, or one trained on the corpus. That is trained once: a resumed run finds it in `directory`."""
    assert recipe.architecture is not None
    if recipe.data.tokenizer:
        return load_tokenizer(recipe.data.tokenizer)
    if not (directory / "tokenizer.json").exists():
        trained = train_code_tokenizer(
            _tokenizer_texts(corpus), recipe.architecture.vocab_size, model_max_length=recipe.architecture.n_positions
        )
        unfinished = directory.with_name(f".{directory.name}.tmp")
        trained.save_pretrained(unfinished)
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.replace(directory)
    return load_tokenizer(str(directory))


def _tokenizer_texts(corpus: Corpus) -> Iterator[str]:
    taken: dict[str, int] = {}
    for document in corpus.documents():
        if not isinstance(document, Document):
            if not document.tokens:  # a row without text
                continue
            raise UserError(f"{corpus.name} is already tokenised; name its tokenizer in data.tokenizer")
        if document.split == "train" and taken.get(document.source, 0) < TOKENIZER_BYTES_PER_SOURCE:
            taken[document.source] = taken.get(document.source, 0) + len(document.text)
            yield document.text


def prepare_tokens(context: RunContext, recipe: Recipe) -> tuple[PreTrainedTokenizerFast, TokenDataset]:
    """The tokenizer and the tokens, made in the context's directory (`tokenizer` and `tokens`) or found there.

    Raises:
        UserError: as `open_corpus`, `load_tokenizer` and `prepare`.
    """
    spec, place = recipe.data, context.out / "tokens"
    if context.resume and has_trained(context.out) and (place / INDEX).is_file():
        data = TokenDataset.open(place)  # it goes on with its tokens, even if the corpus has changed or is gone
        own = context.out / "tokenizer"
        return _tokenizer_of(data, recipe if spec.tokenizer else with_tokenizer(recipe, str(own))), data
    corpus = open_corpus(spec.corpus, max_bytes=spec.max_bytes, validation_fraction=spec.validation_share)
    tokenizer = _tokenizer(recipe, corpus, context.out / "tokenizer")
    name = recipe.data.tokenizer or recipe.name
    return tokenizer, context.prepare_tokens(corpus, tokenizer, spec, name=name)


def _tokenizer_of(data: TokenDataset, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer that made the given tokens: the one that the recipe names, or else the one that the tokens name."""
    name = recipe.data.tokenizer or data.tokenizer["name"]
    try:
        tokenizer = load_tokenizer(name)
    except UserError as error:
        raise UserError(
            f"{error}; it made the tokens in {data.directory}: set data.tokenizer to where it is"
        ) from error
    check_same_tokenizer(tokenizer, name, data)
    return tokenizer
