"""The table of the published comparison for a run: its figures, measured by the other analyses, beside the published ones.

"Transformers Don't Need LayerNorm at Inference Time" (Baroni et al., arXiv 2507.02559) compares GPT-2 with its LN-free versions.
The same quantities are taken here from `attribution`, `patching`, `heads`, `neurons` and `behaviour`, with the losses that the
removal of LayerNorm can harm. Nothing is measured in another way than these analyses do.

A change from the first model to the LN-free one is said to rise or fall if the two 95 % intervals do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ln_removal.errors import UserError
from ln_removal.evaluation.bootstrap import Interval
from ln_removal.evaluation.prompts import DOCUMENT_START, RANDOM_COPY
from ln_removal.interpret.attribution import DirectEffectsByModel, direct_effects_of_run, interval_json
from ln_removal.interpret.behaviour import BINS, PROMPTS, Behaviour, behaviour_of_run
from ln_removal.interpret.heads import SINK_THRESHOLD, TRIVIAL_QUERIES, HeadScores, Score, head_scores_of_run
from ln_removal.interpret.models import Documents, Models
from ln_removal.interpret.neurons import NeuronEffects, neuron_effects_of_run
from ln_removal.interpret.passes import ByModel
from ln_removal.interpret.patching import PatchingByModel, patching_of_run
from ln_removal.interpret.tasks import Task

Change = Literal["rises", "falls", "no clear change"]

ABLATED = 768
"""Neurons that are ablated: all of the last block of the embedded model, because few of them are entropy neurons."""

COPIES = 1
"""Copied sequences for the scores of heads that copy, which are not in the table."""

SINKS: dict[Score, str] = {
    "published_sink_rate": "sink rate, all queries",
    "later_sink_rate": f"sink rate, without queries 0 to {TRIVIAL_QUERIES - 1}",
    "sink_heads": f"heads with mean attention on position 0 above {SINK_THRESHOLD:g}",
}
"""The sink rate of the paper, the same without the queries that pass trivially, and that of Gu et al."""

LOSSES = {DOCUMENT_START: "document_start_loss", RANDOM_COPY: "random_copy_loss"}
"""The kinds of prompt whose loss is in the table, and their names in the JSON file."""

ENTROPY_NEURON = 0.5
"""A neuron of which more than this share of the change of the entropy goes through the norm is counted as an entropy neuron."""


@dataclass(frozen=True)
class Published:
    """What the paper says of a quantity.

    Attributes:
        model: that was measured; with `setting`, where it is another one than ours.
        values: by role; empty if only the change is reported.
        change: from the original to the LN-free model.
    """

    model: str
    change: Change
    values: Mapping[str, float] = field(default_factory=dict)
    setting: str = ""


PUBLISHED: dict[str, Published] = {
    "direct_effect_error": Published(
        "GPT-2 small",
        "falls",
        {"original": 49.1, "control": 57.9, "ln_free": 0.0},
        "the direction of the last input token, not of the next one",
    ),
    "attribution_patching_error": Published("GPT-2 small", "no clear change", setting="indirect objects (IOI)"),
    "published_sink_rate": Published("GPT-2", "falls", {"original": 55.3, "ln_free": 45.3}),
    "calibration_error": Published("GPT-2 medium", "rises", {"original": 0.019, "ln_free": 0.034}),
}
"""By the key of a row; in its unit."""


@dataclass(frozen=True)
class Row:
    """A quantity of the table.

    Attributes:
        key: its name in the JSON file.
        title: for people.
        unit: "per cent", "nats", or "" for a number between 0 and 1.
        digits: decimals that are shown.
        values: with 95 % intervals, by role.
        over: what the intervals are over, such as "documents".
        analysis: of ln-analyze, which shows more of it.
    """

    key: str
    title: str
    unit: str
    digits: int
    values: dict[str, Interval]
    over: str
    analysis: str

    @property
    def published(self) -> Published | None:
        """What the paper says of it."""
        return PUBLISHED.get(self.key)

    @property
    def change(self) -> Change | None:
        """From the first model to the LN-free one; None if there are not two models with a value."""
        first, last = next(iter(self.values.values())), self.values.get("ln_free")
        if last is None or len(self.values) < 2 or not np.isfinite([first.value, last.value]).all():
            return None
        if last.low > first.high:
            return "rises"
        return "falls" if last.high < first.low else "no clear change"

    @property
    def agrees(self) -> bool | None:
        """Whether the change is the published one; None if one of the two is unknown."""
        if self.published is None or self.change is None:
            return None
        return self.change == self.published.change

    def to_json(self) -> dict[str, Any]:
        """Values with intervals, and what was published."""
        published = self.published
        return {
            "quantity": self.title,
            "unit": self.unit or None,
            "intervals_over": self.over,
            "analysis": self.analysis,
            "models": {role: interval_json(one) for role, one in self.values.items()},
            "change": self.change,
            "published": published
            and {
                "model": published.model,
                "setting": published.setting or None,
                "models": dict(published.values),
                "change": published.change,
            },
            "agrees_with_published_change": self.agrees,
        }


@dataclass(frozen=True)
class Paper:
    """What the analyses found that the table shows.

    Attributes:
        direct: on heads, in the direction "centred".
        patching: by attribution, without the error budget.
    """

    direct: DirectEffectsByModel
    patching: PatchingByModel
    attention: ByModel[HeadScores]
    neurons: ByModel[NeuronEffects]
    behaviour: ByModel[Behaviour]

    @property
    def roles(self) -> list[str]:
        """The models that there are."""
        return list(self.direct.effects)

    @property
    def entropy_neurons(self) -> list[int]:
        """Those of the ablated neurons whose share in the first model is above ENTROPY_NEURON; none without norms."""
        first = self.neurons.results[self.roles[0]]
        return [
            int(neuron) for neuron, share in zip(first.ablated, first.mediated, strict=True) if share > ENTROPY_NEURON
        ]

    def rows(self) -> list[Row]:
        """The table."""
        documents, seed = self.direct.documents.unit, self.direct.documents.seed

        def row(
            key: str, title: str, unit: str, of: Callable[[str], Interval], over: str, analysis: str, digits: int = 1
        ) -> Row:
            return Row(key, title, unit, digits, {role: of(role) for role in self.roles}, over, analysis)

        def direct(role: str) -> Interval:
            return self.direct.effects[role]["centred"].only("head").error(seed=seed)

        def patching(role: str) -> Interval:
            return self.patching.found[role].error("atp", "resid_pre", seed=self.patching.seed)

        title = f"attribution patching error, residual stream, {self.patching.task.name}"
        found = [
            row("direct_effect_error", "direct effect error, heads, centred", "per cent", direct, documents, "dla"),
            row("attribution_patching_error", title, "per cent", patching, "prompts", "patching"),
        ]
        for score, title in SINKS.items():

            def sinks(role: str, score: Score = score) -> Interval:
                return _per_cent(self.attention.results[role].overall(score, seed=seed))

            found.append(row(score, title, "per cent", sinks, documents, "attention"))

        def calibration(role: str) -> Interval:
            return self.behaviour.results[role].calibration(False, seed=seed)

        title = f"expected calibration error, {BINS} bins"
        found.append(row("calibration_error", title, "", calibration, documents, "behaviour", 3))
        if chosen := self.entropy_neurons:
            title = f"share mediated by the norm, neuron{'s' if len(chosen) > 1 else ''} {', '.join(map(str, chosen))}"
            found.append(row("entropy_neurons_share", title, "", self._mediated, documents, "neurons", 3))
        for kind, key in LOSSES.items():
            if kind not in self.behaviour.results[self.roles[0]].kinds:
                continue  # the text has no such prompts
            for bos, words in ((True, "with BOS"), (False, "without BOS")):

                def loss(role: str, kind: str = kind, bos: bool = bos) -> Interval:
                    return self.behaviour.results[role].loss(kind, bos, seed=seed)

                name = f"{key}_{words.lower().replace(' ', '_')}"
                found.append(row(name, f"loss, {kind}, {words}", "nats", loss, "prompts", "behaviour", 3))
        return found

    def _mediated(self, role: str) -> Interval:
        """The share of the entropy neurons in sum."""
        one = self.neurons.results[role]
        some = np.isin(one.ablated, self.entropy_neurons)
        names = ("entropy_total", "entropy_frozen", "loss_total", "loss_frozen", "ablated")
        return replace(one, **{name: getattr(one, name)[some] for name in names}).overall_mediated(
            seed=self.neurons.documents.seed
        )

    def to_json(self) -> dict[str, Any]:
        """The rows by key, with what was read."""
        first = self.behaviour.results[self.roles[0]]
        return {
            "text": self.direct.documents.to_json(),
            "task": self.patching.task.to_json(),
            "prompts": {kind: len(counts) for kind, counts in first.scored.items()},
            "models": dict(self.direct.names),
            "neurons_ablated": len(self.neurons.results[self.roles[0]].ablated),
            "entropy_neurons": self.entropy_neurons,
            "rows": {row.key: row.to_json() for row in self.rows()},
        }


def paper_of_run(
    models: Models,
    documents: Documents,
    task: Task,
    *,
    prompts: int = PROMPTS,
    ablated: int = ABLATED,
    progress: bool = False,
) -> Paper:
    """Run the analyses of the table on the same documents.

    Args:
        models: from `load` of a run.
        documents: from `Models.documents` without BOS; with one in front they must fit into the context.
        task: whose prompts are patched; it needs corrupt twins.
        prompts: of each kind whose loss is taken, at most.
        ablated: how many neurons of the last block.
        progress: show a progress bar for each analysis.

    Raises:
        UserError: as the analyses.
    """
    if not task.paired:
        raise UserError(f"the prompts of {task.name} have no corrupt twins to patch into; choose another task")
    behaviour = behaviour_of_run(models, documents, [], prompts=prompts, progress=progress)
    neurons = neuron_effects_of_run(models, documents, ablated=ablated, progress=progress)
    return Paper(
        direct_effects_of_run(models, documents, ["centred"], progress=progress),
        patching_of_run(models, task, ["atp"], budget=False, seed=documents.seed, progress=progress),
        head_scores_of_run(models, documents, copies=COPIES, progress=progress),
        neurons,
        behaviour,
    )


def _per_cent(share: Interval) -> Interval:
    return Interval(100 * share.value, 100 * share.low, 100 * share.high)
