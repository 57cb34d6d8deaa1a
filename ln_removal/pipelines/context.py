"""The run context: what removal, its control, pretraining and the runs of a sweep have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from ln_removal.config.recipe import Recipe, dump_toml, with_defaults
from ln_removal.data.prepare import prepare, prepare_bar
from ln_removal.data.tokens import TokenDataset, given_tokens
from ln_removal.evaluation.loss import cross_entropy
from ln_removal.files.metrics_log import METRICS_FILE
from ln_removal.files.run_directory import link_tokens, run_directory
from ln_removal.models.identity import Identity, Kind, identity_for, record
from ln_removal.models.loading import tokenizer_fingerprint
from ln_removal.training.metrics import Progress, Tracker
from ln_removal.training.session import Removal, Session, open_session
from ln_removal.training.setup import build_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ln_removal.config.recipe import DataSpec
    from ln_removal.data.corpora import Corpus


@dataclass(frozen=True)
class RunContext:
    """Where and how a recipe is run.

    Attributes:
        out: the run's directory.
        accelerator: device and ranks.
        given: the tokens that the user named, now or when the run was begun; None when the run prepares its own.
        resume: continue the run in `out`.
        wandb_project: also log to this Weights & Biases project.
        progress: how progress is shown.
    """

    out: Path
    accelerator: Accelerator
    given: TokenDataset | None = None
    resume: bool = False
    wandb_project: str | None = None
    progress: Progress = True

    @property
    def is_main(self) -> bool:
        """Whether this process is the one, of several ranks, that writes and speaks."""
        return self.accelerator.is_main_process

    def recipe_of(self, recipe: Recipe) -> Recipe:
        """The recipe with the corpus that is really trained on, so that recipe.toml and the results name it."""
        if self.given is None:
            return recipe
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"corpus": self.given.corpus_name})})

    def identified(self, recipe: Recipe) -> tuple[Recipe, Identity | None]:
        """What the run is made from: the model of a removal, or the tokenizer that a pretraining recipe names.

        The main process finds it for all ranks, before the directory is claimed, which may have the name of a Hub id.

        Returns:
            The recipe with the name that the run was begun by, and the identity; None if there is nothing to find, or an older
            version has trained the run.

        Raises:
            UserError: there is no such model.
        """
        name, kind = _made_from(recipe)
        found = [identity_for(name, self.out, kind, resume=self.resume) if self.is_main and name else None]
        broadcast_object_list(found)
        identity = found[0]
        return (recipe if identity is None else _made_from_another(recipe, identity.name)), identity

    def record(self, recipe: Recipe, identity: Identity | None) -> Recipe:
        """Compare the model with the one that the run was begun with, or write down what it is; see `identity.record`.

        Returns:
            The recipe with the place of the model, or of the tokenizer, in place of its name: it means the same everywhere.
        """
        kind = _made_from(recipe)[1]
        found = [record(identity, self.out, kind) if identity is not None and self.is_main else None]
        broadcast_object_list(found)
        return recipe if found[0] is None else _made_from_another(recipe, found[0].reference)

    def claim(self, recipe: Recipe) -> AbstractContextManager[None]:
        """Make `out` the directory of this run, or check that it is; see `run_directory`."""
        return run_directory(
            self.out, dump_toml(recipe), with_defaults=with_defaults, resume=self.resume, is_main=self.is_main
        )

    def link_given_tokens(self) -> None:
        """Let the run's directory point to the given tokens."""
        if self.given is not None and self.is_main:
            link_tokens(self.out, self.given.directory)

    def prepare_tokens(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, *, name: str
    ) -> TokenDataset:
        """Prepare a corpus into `out/tokens`, or find it prepared there. `name` is that of the tokenizer.

        Raises:
            UserError: as `prepare`.
        """
        with prepare_bar(corpus.name, total=spec.max_tokens, enabled=self.progress is True) as show:
            return prepare(
                corpus,
                tokenizer,
                self.out / "tokens",
                tokenizer_name=name,
                tokenizer_sha256=tokenizer_fingerprint(tokenizer),
                max_tokens=spec.max_tokens,
                progress=show,
            )

    def session(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        data: TokenDataset,
        *,
        label: str,
        directory: Path | None = None,
        removal: Removal | None = None,
        teacher: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> AbstractContextManager[Session]:
        """A training in `directory`, by default the run's own.

        `label` names it on its progress bar and in wandb; the other arguments are those of `open_session`.
        """
        directory = directory or self.out
        tracker = Tracker(
            directory / METRICS_FILE,
            total_steps=recipe.training.steps,
            label=label,
            enabled=self.is_main,
            progress=self.progress,
            wandb_project=self.wandb_project,
            config=recipe.model_dump(),
        )
        return open_session(
            model,
            recipe,
            data,
            directory,
            accelerator=self.accelerator,
            tracker=tracker,
            evaluate=_evaluation(model, recipe, data),
            removal=removal,
            teacher=teacher,
            tokenizer=tokenizer,
            resume=self.resume,
        )


def run_context(
    out: Path | str,
    *,
    tokens: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
    wandb_project: str | None = None,
    progress: Progress = True,
) -> RunContext:
    """The context of a command, from its options.

    Raises:
        UserError: the device or the tokens are not there.
    """
    out = Path(out)
    accelerator = build_accelerator(device)
    return RunContext(out, accelerator, given_tokens(out, tokens), resume, wandb_project, progress)


def _made_from(recipe: Recipe) -> tuple[str, Kind]:
    return (recipe.model, "model") if recipe.architecture is None else (recipe.data.tokenizer, "tokenizer")


def _made_from_another(recipe: Recipe, name: str) -> Recipe:
    """The recipe with another name of its model, or of its tokenizer where it trains from scratch."""
    return recipe.model_copy(update={"model": name}) if recipe.architecture is None else with_tokenizer(recipe, name)


def with_tokenizer(recipe: Recipe, tokenizer: str) -> Recipe:
    """The recipe with another name in data.tokenizer."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": tokenizer})})


def _evaluation(model: PreTrainedModel, recipe: Recipe, data: TokenDataset) -> Callable[[], dict[str, float]]:
    """Measures `model` on as much of the validation split as the recipe evaluates while it trains."""
    spec, validation = recipe.training, data.split("validation")

    def evaluate() -> dict[str, float]:
        loss = cross_entropy(
            model,
            validation,
            context=recipe.data.context,
            windows=recipe.data.windows,
            max_tokens=spec.evaluation_tokens,
            precision=spec.precision,
        )
        return {"cross_entropy": loss.cross_entropy}

    return evaluate
