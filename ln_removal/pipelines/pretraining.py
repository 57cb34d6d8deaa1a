"""Pretrain a GPT-2 or a Pythia from a recipe: tokenizer, tokens, model, training, Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.config.presets import check_is_pretraining
from ln_removal.data.corpora import Corpus, Document
from ln_removal.data.encoder import train_code_tokenizer
from ln_removal.errors import UserError
from ln_removal.models.loading import SIZES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from ln_removal.config.recipe import ArchitectureSpec, Recipe
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.loss import LossResult
    from ln_removal.training.loop import TrainResult
    from ln_removal.training.metrics import Progress

CHOICES = {"block_norm", "final_norm", "biases", "activation", "negative_slope", "slopes"}
"""Entries of [architecture] that go into the configuration of a `revival_models` class as they are."""

TOKENIZER_BYTES_PER_SOURCE = 15_000_000
"""Text from each source of the corpus that the tokenizer is trained on."""


@dataclass(frozen=True)
class PretrainResult:
    """Where the model lies and what the training and its last evaluation measured."""

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
    from accelerate.utils import set_seed

    from ln_removal.config.recipe import dump_toml, with_defaults
    from ln_removal.data.tokens import given_tokens
    from ln_removal.evaluation.loss import cross_entropy
    from ln_removal.export.write import save_model
    from ln_removal.files.run_directory import link_tokens, run_directory
    from ln_removal.models.loading import load_model
    from ln_removal.report.base_model_card import write_base_model_card
    from ln_removal.training.session import train_model
    from ln_removal.training.setup import build_accelerator

    out = Path(out)
    spec = recipe.training
    check_is_pretraining(recipe)
    architecture = recipe.architecture
    assert architecture is not None
    accelerator = build_accelerator(device)
    given = given_tokens(out, tokens)
    if given is not None:  # so that the recipe names what is trained on
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"corpus": given.corpus_name})})
    place = run_directory(
        out, dump_toml(recipe), with_defaults=with_defaults, resume=resume, is_main=accelerator.is_main_process
    )
    with place:
        with accelerator.main_process_first():  # what the main process makes, the other ranks find
            if given is None:
                tokenizer, data = prepare_tokens(recipe, out, progress=progress is True)
            else:
                tokenizer, data = _tokenizer_of(given, recipe), given
                if accelerator.is_main_process:
                    link_tokens(out, data.directory)
            _check_vocabulary(architecture, data)

        set_seed(recipe.seed)
        model = build_model(architecture, eot_token_id=data.eot_token_id)
        validation = data.split("validation")

        def score(max_tokens: int | None = None) -> LossResult:
            return cross_entropy(
                model, validation, context=recipe.data.context, max_tokens=max_tokens, precision=spec.precision
            )

        result = train_model(
            model,
            recipe,
            data,
            out,
            accelerator=accelerator,
            label=recipe.name,
            evaluate=lambda: {"cross_entropy": score(spec.evaluation_tokens).cross_entropy},
            resume=resume,
            wandb_project=wandb_project,
            progress=progress,
        )
        directory = out / "model"
        if not accelerator.is_main_process:
            final = score()
            return PretrainResult(directory, result, final.cross_entropy, final.bits_per_byte)
        save_model(model, tokenizer, directory, dtype=recipe.export.dtype)
        # What is reported is measured on what was written, in float32, as ln-evaluate would.
        written = load_model(str(directory), device=accelerator.device.type).model
        final = cross_entropy(written, validation, context=recipe.data.context)
        write_base_model_card(
            directory,
            recipe,
            cross_entropy=final.cross_entropy,
            bits_per_byte=final.bits_per_byte,
            validation_tokens=final.tokens,
        )
        return PretrainResult(directory, result, final.cross_entropy, final.bits_per_byte)


def build_model(architecture: ArchitectureSpec, *, eot_token_id: int) -> PreTrainedModel:
    """A freshly initialised model (by its class: transformers' way, or see `revival_models`) without dropout, on the CPU, in float32.

    transformers' own class where it has the architecture, else one of `revival_models`. Models of one shape that are
    built from the same random state begin with the same matrices if they have the same `biases`, whatever else they choose.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    from ln_removal.models import norm_choice as revival

    entries: dict[str, Any] = {
        "vocab_size": architecture.vocab_size,
        "bos_token_id": eot_token_id,
        "eos_token_id": eot_token_id,
    }
    if architecture.family == "gpt2":
        entries |= architecture.model_dump(include={"n_positions", "n_embd", "n_layer", "n_head"})
        entries |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        entries |= {theirs: getattr(architecture, ours) for ours, theirs in SIZES.items()}
        entries |= {"intermediate_size": 4 * architecture.n_embd}
    if not architecture.is_plain:
        entries |= architecture.model_dump(include=CHOICES)
    elif architecture.activation == "relu":
        entries["activation_function" if architecture.family == "gpt2" else "hidden_act"] = "relu"
    config_class, model_class = {
        ("gpt2", True): (GPT2Config, GPT2LMHeadModel),
        ("gpt2", False): (revival.RevivalGPT2Config, revival.RevivalGPT2LMHeadModel),
        ("pythia", True): (GPTNeoXConfig, GPTNeoXForCausalLM),
        ("pythia", False): (revival.RevivalGPTNeoXConfig, revival.RevivalGPTNeoXForCausalLM),
    }[architecture.family, architecture.is_plain]
    return model_class(config_class(**entries))


def _tokenizer(recipe: Recipe, corpus: Corpus, directory: Path) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer, or one trained on the corpus (once: a resumed run finds it in `directory`)."""
    from ln_removal.models.loading import load_tokenizer

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
            raise UserError(f"{corpus.name} is already tokenised; name its tokenizer in data.tokenizer")
        if document.split == "train" and taken.get(document.source, 0) < TOKENIZER_BYTES_PER_SOURCE:
            taken[document.source] = taken.get(document.source, 0) + len(document.text)
            yield document.text


def prepare_tokens(recipe: Recipe, out: Path, *, progress: bool) -> tuple[PreTrainedTokenizerFast, TokenDataset]:
    """The tokenizer and the corpus, prepared into `out/tokenizer` and `out/tokens`, or found there.

    Raises:
        UserError: as `open_corpus`, `load_tokenizer` and `prepare`.
    """
    from ln_removal.data.open_corpus import open_corpus
    from ln_removal.data.prepare import prepare, prepare_bar
    from ln_removal.models.loading import tokenizer_fingerprint

    corpus = open_corpus(recipe.data.corpus, max_bytes=recipe.data.max_bytes)
    tokenizer = _tokenizer(recipe, corpus, out / "tokenizer")
    with prepare_bar(corpus.name, total=recipe.data.max_tokens, enabled=progress) as show:
        data = prepare(
            corpus,
            tokenizer,
            out / "tokens",
            tokenizer_name=recipe.data.tokenizer or recipe.name,
            tokenizer_sha256=tokenizer_fingerprint(tokenizer),
            max_tokens=recipe.data.max_tokens,
            progress=show,
        )
    return tokenizer, data


def _tokenizer_of(data: TokenDataset, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer that made the given tokens: the recipe's, or else the one they name."""
    from ln_removal.evaluation.scoring import check_same_tokenizer
    from ln_removal.models.loading import load_tokenizer

    name = recipe.data.tokenizer or data.tokenizer["name"]
    try:
        tokenizer = load_tokenizer(name)
    except UserError as error:
        raise UserError(
            f"{error}; it made the tokens in {data.directory}: set data.tokenizer to where it is"
        ) from error
    check_same_tokenizer(tokenizer, name, data)
    return tokenizer


def _check_vocabulary(architecture: ArchitectureSpec, data: TokenDataset) -> None:
    if data.vocab_size > architecture.vocab_size:
        raise UserError(
            f"the tokenizer has {data.vocab_size} entries, architecture.vocab_size is {architecture.vocab_size}; raise it, "
            "or choose another tokenizer"
        )
