"""The three models of a run with the same hooks, and held-out documents to analyse them on.

    models = ln_removal.interpret.load("checkpoints/demo", dtype=torch.float64)
    documents = models.documents(32, length=128, prepend_bos=False)
    for role, bridge in models.items():
        logits, cache = bridge.run_with_cache(documents.inputs(bridge))

Shape legend: N documents, T tokens in each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.errors import UserError
from ln_removal.files.run_directory import RECIPE_FILE
from ln_removal.models.families import family_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ln_removal.data.tokens import TokenDataset, Tokens, TokenSplit

ROLES = ("original", "control", "ln_free")
"""The models of a run, in the order of every table and figure."""

TITLES = {"original": "original", "control": "control", "ln_free": "LN-free"}
"""What tables and figures call them."""

SHORTEST_LENGTH = 8
"""Tokens below which text is too short for an analysis of its positions."""

FEW_DOCUMENTS = 20
"""With fewer long documents than this, documents are cut into windows, because intervals over a handful say little."""


@dataclass(frozen=True)
class Documents:
    """Held-out text for an analysis; every analysis draws its intervals over these units.

    Attributes:
        tokens: (N, T) token ids, int64. With a BOS, it is one of the T tokens, the first.
        prepend_bos: whether the end-of-text token, which TransformerLens calls BOS, stands in front of each.
        unit: "documents", from the first token of each; or "windows", pieces of the documents where these are few.
        corpus: where the text comes from.
        seed: of the draw.
    """

    tokens: Tokens
    prepend_bos: bool
    unit: str
    corpus: str
    seed: int

    def inputs(self, bridge: TransformerBridge) -> Tensor:
        """(N, T) on the device of a model."""
        import torch

        return torch.from_numpy(self.tokens).to(next(bridge.parameters()).device)

    def to_json(self) -> dict[str, Any]:
        """What was analysed, without the token ids."""
        count, length = self.tokens.shape
        return {
            "corpus": self.corpus,
            self.unit: count,
            "tokens_each": length,
            "prepend_bos": self.prepend_bos,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Models:
    """Original, control and LN-free model in TransformerLens, on one device and in one dtype; None where there is none.

    Attributes:
        names: what each was loaded from, by role.
        tokenizer: of all of them; None if `load` was given models without one.
        data: the tokens of the run; None without a run.
    """

    original: TransformerBridge | None
    control: TransformerBridge | None
    ln_free: TransformerBridge | None
    names: Mapping[str, str]
    tokenizer: PreTrainedTokenizerBase | None = None
    data: TokenDataset | None = None

    def items(self) -> list[tuple[str, TransformerBridge]]:
        """(role, bridge) of each model that there is, in the order of ROLES."""
        return [(role, bridge) for role in ROLES if (bridge := getattr(self, role)) is not None]

    @property
    def any(self) -> TransformerBridge:
        """One of the models, for what they have in common: number of layers and heads, width, vocabulary."""
        return self.items()[-1][1]

    def documents(
        self, count: int = 32, *, length: int = 128, prepend_bos: bool, seed: int = 0, split: str = "validation"
    ) -> Documents:
        """Draw documents of the run's tokens that were held out of training.

        Args:
            count: of documents. Fewer come back where the text is short.
            length: tokens of each, from its beginning, with the BOS; at most the context of the models.
            prepend_bos: put the end-of-text token in front, as TransformerLens does by default.
            seed: decides which documents are drawn.
            split: "validation", or "train".

        Raises:
            UserError: there are no tokens, or all documents are too short.
        """
        if self.data is None:
            raise UserError(
                "there are no tokens to draw documents from; load the models of a run, or pass tokens to load"
            )
        if count < 1 or length < SHORTEST_LENGTH:
            raise UserError(
                f"found {count} documents of {length} tokens; ask for at least 1 of at least {SHORTEST_LENGTH} tokens"
            )
        context = int(self.any.cfg.n_ctx)
        if length > context:
            raise UserError(f"documents of {length} tokens are longer than the {context} positions of the models")
        held_out = self.data.split(split)  # type: ignore[arg-type]
        taken = length - prepend_bos
        rows, unit = _drawn(held_out, count, taken, np.random.default_rng(seed))
        if prepend_bos:
            rows = np.insert(rows, 0, self.data.eot_token_id, axis=1)
        return Documents(rows, prepend_bos, unit, f"{self.data.corpus_name}, {split} split", seed)


def load(
    run_or_models: str | Path | Mapping[str, str | Path | PreTrainedModel],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    tokens: Path | str | None = None,
    process_weights: bool = False,
) -> Models:
    """Load the models of a run, or any models, into TransformerLens with the same hooks.

    Args:
        run_or_models: the directory of a run of ln-remove (or ln-pretrain, whose model is the original); or models by role
            ("original", "control", "ln_free"): names as for `models.loading.load_model`, or models in memory.
        device: where to put the weights.
        dtype: of weights and activations; float32 by default. Nothing is computed in less: the identities of the LN-free
            model hold to 1e-10 in float64.
        tokens: a directory of ln-prepare to draw documents from; by default the run's own.
        process_weights: apply TransformerLens' defaults (fold the norms, centre what is written and the unembedding). They
            keep the probabilities and move the logits.

    Raises:
        UserError: the run has no model yet, a model does not load or is of another architecture, or another tokenizer made the
            tokens.
    """
    import torch

    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.scoring import check_same_tokenizer
    from ln_removal.models.bridge import as_bridge
    from ln_removal.models.loading import load_config, load_model

    sources, own_tokens = _sources(run_or_models)
    directory = own_tokens if tokens is None else Path(tokens)
    data = None if directory is None else TokenDataset.open(directory)
    bridges: dict[str, TransformerBridge] = {}
    tokenizer: PreTrainedTokenizerBase | None = None
    for role, source in sources.items():
        model: Any = source
        in_memory = not isinstance(source, (str, Path))
        check_analysed(source.config if in_memory else load_config(source), f"the {role} model")
        if not in_memory:
            loaded = load_model(str(source), device=device, dtype=dtype or torch.float32)
            model, tokenizer = loaded.model, loaded.tokenizer
            if data is not None:
                check_same_tokenizer(tokenizer, str(source), data)
        elif dtype is not None and source.dtype != dtype:
            raise UserError(
                f"the {role} model is {source.dtype}, not {dtype}; pass model.to(dtype), or leave dtype out"
            )
        bridges[role] = as_bridge(model, tokenizer)
        if process_weights:
            bridges[role].enable_compatibility_mode(disable_warnings=True)
    return Models(
        bridges.get("original"),
        bridges.get("control"),
        bridges.get("ln_free"),
        {role: str(one) if isinstance(one, (str, Path)) else type(one).__name__ for role, one in sources.items()},
        tokenizer,
        data,
    )


def check_analysed(config: PretrainedConfig, name: str) -> None:
    """Make sure that a model is one that the analyses are made for.

    Raises:
        UserError: it is of another family than GPT-2; the message says what there is for it.
    """
    family = family_of(config)
    if family.model_type != "gpt2":
        raise UserError(
            f"{name} is a {family.title}, and these analyses are of GPT-2; ln_removal.to_bridge(model) puts a {family.title} into "
            "TransformerLens, and ln-analyze entropy takes one"
        )


def load_untrained(directory: str | Path, *, dtype: torch.dtype | None = None) -> Models:
    """The embedded model, and the same model with all of its norms made constant in one step, without training.

    For trying an analysis before there is a run. What is exact without norms is exact here, too, but the LN-free model predicts
    badly: nothing has taught it to do without its norms.

    Args:
        directory: where to write the tokens of held-out modules of the standard library.
        dtype: as for `load`.
    """
    import torch

    from ln_removal.data.open_corpus import held_out_tokens
    from ln_removal.models.loading import load_model
    from ln_removal.models.norm_free import from_folded
    from ln_removal.norms.surgery import fold, install

    loaded = load_model("tiny")
    data = held_out_tokens("python-source", loaded.tokenizer, Path(directory), tokenizer_name="tiny", max_tokens=50_000)
    model = loaded.model.train()
    sites = install(model, eot_token_id=data.eot_token_id)
    with torch.no_grad():
        model(torch.from_numpy(next(data.split("validation").windows(128, batch=32))))  # gathers standard deviations
    sites.update_running(momentum=0.0)
    for site in sites.sites:
        sites.set_mix(site, 1.0)
    for special in ("eot", "first"):
        sites.set_special(special, 1.0)
    free = from_folded(model.config, fold(model)).to(dtype or torch.float32)
    return load({"original": "tiny", "ln_free": free}, dtype=dtype, tokens=directory)


def _sources(given: Any) -> tuple[dict[str, Any], Path | None]:
    """The models by role, in the order of ROLES, and the directory of the tokens that a run was trained on."""
    from ln_removal.evaluation.scoring import models_of_run

    if isinstance(given, Mapping):
        unknown = [role for role in given if role not in ROLES]
        if unknown or not given:
            raise UserError(
                f"models are given by role: {', '.join(ROLES)}; found {', '.join(map(str, given)) or 'none'}"
            )
        return {role: given[role] for role in ROLES if role in given}, None
    run = Path(given)
    if not (run / RECIPE_FILE).is_file():
        found = "is not the directory of a run" if run.exists() else "does not exist"
        raise UserError(
            f"{run} {found} (there is no {RECIPE_FILE}); give a run, the directory that ln-remove --out named"
        )
    found_models = models_of_run(run)
    tokens = run / "tokens"
    return {role: found_models[role] for role in ROLES if role in found_models}, tokens if tokens.is_dir() else None


def _drawn(split: TokenSplit, count: int, length: int, random: np.random.Generator) -> tuple[Tokens, str]:
    """At most `count` rows of `length` tokens of one document each, and what they are: "documents" or "windows"."""
    places = list(_places(split, length, whole=True))
    unit = "documents"
    if len(places) < min(count, FEW_DOCUMENTS):
        places, unit = list(_places(split, length, whole=False)), "windows"
    if not places:
        raise UserError(
            f"the {split.name} split of {split.tokens} tokens has no document of {length} tokens; ask for shorter ones, or "
            "prepare more text"
        )
    chosen = sorted(random.permutation(len(places))[:count].tolist())
    return np.stack([split.read(shard, start, length) for shard, start in (places[index] for index in chosen)]), unit


def _places(split: TokenSplit, length: int, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Shard and start of the beginning of each document, or of every piece of it, of `length` tokens; no end-of-text token."""
    for shard, data in enumerate(split.maps):
        for start, tokens in zip(split.document_starts[shard], split.document_lengths[shard], strict=True):
            stop = int(start) + int(tokens)
            stop -= int(data[stop - 1] == split.eot_token_id)
            for place in range(int(start), stop - length + 1, length):
                yield shard, place
                if whole:
                    break
