"""Pretrain a GPT-2 from a recipe: tokenizer, tokens, model, training, Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.data.corpora import Corpus, Document
from ln_removal.data.tokenizer_training import train_code_tokenizer
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.loss import LossResult
    from ln_removal.recipe import ArchitectureSpec, Recipe
    from ln_removal.training.loop import TrainResult

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
) -> PretrainResult:
    """Train the recipe's [architecture] from scratch and write it to `out/model`.

    Args:
        recipe: a pretraining recipe.
        out: the run's directory: recipe.toml, metrics.jsonl, tokenizer/, tokens/, state/, model/.
        tokens: a directory prepared by `ln-prepare`; default: prepare the recipe's corpus into `out/tokens`.
        resume: continue the run in `out`.
        device: "auto", "cpu" or "cuda".
        wandb_project: also log to this Weights & Biases project.

    Raises:
        UserError: not a pretraining recipe, or anything the corpus, the directory or the device gets wrong.
    """
    from accelerate.utils import set_seed

    from ln_removal.data.open_corpus import open_corpus
    from ln_removal.evaluation.loss import cross_entropy
    from ln_removal.export.writing import save_model
    from ln_removal.recipe import dump_toml
    from ln_removal.training.session import train_model
    from ln_removal.training.setup import build_accelerator, claim_run_directory

    out = Path(out)
    spec = recipe.training
    if recipe.architecture is None:
        raise UserError(f"recipe {recipe.name} has no [architecture]; it removes LayerNorm: run it with ln-remove")
    accelerator = build_accelerator(device)
    corpus = open_corpus(recipe.data.corpus, max_bytes=recipe.data.max_bytes)
    with accelerator.main_process_first():  # what the main process makes, the other ranks find
        if accelerator.is_main_process:
            claim_run_directory(out, dump_toml(recipe), resume=resume)
        tokenizer = _tokenizer(recipe, corpus, out / "tokenizer")
        data = _tokens(recipe, corpus, tokenizer, out, tokens)

    set_seed(recipe.seed)
    model = build_gpt2(recipe.architecture, eot_token_id=data.eot_token_id)
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
    )
    final = score()
    directory = out / "model"
    if accelerator.is_main_process:
        save_model(model, tokenizer, directory, dtype=recipe.export.dtype)
    return PretrainResult(directory, result, final.cross_entropy, final.bits_per_byte)


def build_gpt2(architecture: ArchitectureSpec, *, eot_token_id: int) -> GPT2LMHeadModel:
    """A freshly initialised GPT-2 (Hugging Face's initialisation) without dropout, on the CPU, in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=architecture.vocab_size,
        n_positions=architecture.n_positions,
        n_embd=architecture.n_embd,
        n_layer=architecture.n_layer,
        n_head=architecture.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eot_token_id,
        eos_token_id=eot_token_id,
    )
    return GPT2LMHeadModel(config)


def _tokenizer(recipe: Recipe, corpus: Corpus, directory: Path) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer, or one trained on the corpus (once: a resumed run finds it in `directory`)."""
    from ln_removal.models import load_tokenizer

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


def _tokens(
    recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, out: Path, directory: Path | str | None
) -> TokenDataset:
    """The given tokens, or the corpus prepared into the run's directory; small enough for the model's vocabulary."""
    from ln_removal.data.prepare import prepare
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.scoring import check_same_tokenizer
    from ln_removal.models import tokenizer_fingerprint

    assert recipe.architecture is not None
    name = recipe.data.tokenizer or recipe.name
    if directory is not None:
        data = TokenDataset.open(directory)
        check_same_tokenizer(tokenizer, name, data)
    else:
        data = prepare(
            corpus,
            tokenizer,
            out / "tokens",
            tokenizer_name=name,
            tokenizer_sha256=tokenizer_fingerprint(tokenizer),
            max_tokens=recipe.data.max_tokens,
        )
    if data.vocab_size > recipe.architecture.vocab_size:
        raise UserError(
            f"the tokenizer has {data.vocab_size} entries, architecture.vocab_size is {recipe.architecture.vocab_size}; raise it, "
            "or choose another tokenizer"
        )
    return data
