"""The training loop: resuming, bad steps, ranks and micro-batches, what it logs, and that it does not wait."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Commands
from safetensors.torch import load_file
from tiny_training import LAYERS, SEQUENCES, STEPS, FaultyObjective, Stop, TinyRun, tiny_model, tiny_schedule, tiny_spec
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ln_removal.errors import UserError
from ln_removal.files.metrics_log import truncate_metrics
from ln_removal.training import loop
from ln_removal.training.checkpoint import checkpoints, load_newest
from ln_removal.training.metrics import Tracker
from ln_removal.training.optimizers import learning_rate_at

TERMS = {"auxiliary_weight": 0.1, "distillation": 0.5}
"""Every term that a removal can add to its loss."""

WITHOUT_SPEED = ("step", "loss", "gradient_norm", "learning_rate")


def assert_same_metrics(run: TinyRun, reference: TinyRun, tolerance: float = 1e-6) -> None:
    """Every step once and in order, with the same figures; the same events; the same evaluations."""
    rows, expected = run.metrics(), reference.metrics()
    assert [row["step"] for row in rows] == list(range(run.spec.steps))
    for row, other in zip(rows, expected, strict=True):
        assert [row[key] for key in WITHOUT_SPEED] == pytest.approx(
            [other[key] for key in WITHOUT_SPEED], abs=tolerance
        )
    assert run.metrics("event") == reference.metrics("event")
    assert run.metrics("evaluation") == reference.metrics("evaluation")


def assert_same_weights(model: torch.nn.Module, reference: torch.nn.Module, tolerance: float = 1e-6) -> None:
    for (name, found), expected in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_tiny_removal_learns_and_ends_frozen(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run")
    result = run.train()
    assert run.sites is not None and run.sites.all_frozen() and run.sites.special_dropped()
    assert run.losses()[-1] < run.losses()[0] - 1
    assert result.last_loss == run.losses()[-1]
    assert result.tokens == STEPS * run.spec.tokens_per_step
    assert result.skipped_steps == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path, optimizer: str) -> None:
    # Stopped two steps after a checkpoint that lies between two log steps and in the middle of a taper.
    spec = tiny_spec(optimizer=optimizer, evaluate_every=5, auxiliary_weight=0.1)
    assert any(0 < value < 1 for value in tiny_schedule().freeze_values(14).values())
    whole = TinyRun(tmp_path / "whole", spec=spec)
    whole.train(evaluate=lambda: {"score": 1.0})
    stopped = TinyRun(tmp_path / "stopped", spec=spec, objective=FaultyObjective)
    stopped.objective.stop_at = 17
    with pytest.raises(Stop):
        stopped.train(evaluate=lambda: {"score": 1.0})
    resumed = TinyRun(tmp_path / "stopped", spec=spec, seed=1)
    result = resumed.train(evaluate=lambda: {"score": 1.0}, resume=True)
    assert_same_metrics(resumed, whole)
    assert_same_weights(resumed.model, whole.model)
    assert [row["step"] for row in resumed.metrics("evaluation")] == [5, 10, 15, 20, 24]
    assert result.tokens == STEPS * spec.tokens_per_step


def test_resuming_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run")
    first = run.train()
    before = run.metrics()
    again = TinyRun(tmp_path / "run", seed=1)
    second = again.train(resume=True)
    assert again.metrics() == before
    assert_same_weights(again.model, run.model)
    assert (second.tokens, second.seconds, second.last_loss) == (
        first.tokens,
        pytest.approx(first.seconds, abs=1.0),
        None,
    )


def test_resume_passes_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    whole = TinyRun(tmp_path / "whole")
    whole.train()
    stopped = TinyRun(tmp_path / "run", objective=FaultyObjective)
    stopped.objective.stop_at = 17
    with pytest.raises(Stop):
        stopped.train()
    (stopped.state / "step-000015" / "model.safetensors").write_bytes(b"damaged")
    resumed = TinyRun(tmp_path / "run", seed=1)
    resumed.train(resume=True)
    assert_same_metrics(resumed, whole)
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_the_number_of_micro_batches_changes_nothing(tmp_path: Path, micro_batch: int) -> None:
    one = TinyRun(tmp_path / "one")
    one.train(micro_batch=SEQUENCES)
    several = TinyRun(tmp_path / "several")
    several.train(micro_batch=micro_batch)
    assert_same_metrics(several, one, tolerance=1e-5)
    assert one.sites is not None and several.sites is not None
    expected = one.sites.frozen_constants()
    for site, constants in several.sites.frozen_constants().items():
        assert constants == pytest.approx(expected[site], rel=1e-5)


def test_control_and_removal_see_the_same_batches(tmp_path: Path) -> None:
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for removal in (True, False):
        run = TinyRun(tmp_path / str(removal), removal=removal)
        run.objective.register_forward_pre_hook(lambda module, args, kept=seen[removal]: kept.append(args[0].clone()))
        run.train(micro_batch=4)
    assert len(seen[True]) == 2 * STEPS
    for with_norms, without in zip(seen[False], seen[True], strict=True):
        assert torch.equal(with_norms, without)
    assert not torch.equal(seen[True][0], seen[True][2])


class Snapshots:
    """An evaluation that keeps the model's state after every step."""

    def __init__(self, run: TinyRun) -> None:
        self.run = run
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def __call__(self) -> dict[str, float]:
        state = self.run.model.state_dict()
        self.states[len(self.states) + 1] = {name: tensor.clone() for name, tensor in state.items()}
        return {}

    def changed(self, before: int, after: int) -> set[str]:
        """The parameters and statistics (not the mixes, which the schedule sets) that differ."""
        mixes = ("mix", "frozen_std", "captured_std", "dropped")
        first, second = self.states[before], self.states[after]
        return {name for name in first if not name.endswith(mixes) and not torch.equal(first[name], second[name])}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_step_changes_nothing_and_is_counted(tmp_path: Path, optimizer: str) -> None:
    run = TinyRun(tmp_path / "run", spec=tiny_spec(optimizer=optimizer, evaluate_every=1), objective=FaultyObjective)
    run.objective.bad_steps = frozenset({4, 6, 7})
    snapshots = Snapshots(run)
    result = run.train(evaluate=snapshots)
    assert result.skipped_steps == 3
    for step in (4, 6, 7):
        assert snapshots.changed(step, step + 1) == set(), "weights, or running stds of a residual stream of 1e15"
    for step in (3, 5, 8):
        moved = snapshots.changed(step, step + 1)
        assert {"transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"} < moved
        assert any(name.endswith("running_std") for name in moved)
    rows = run.metrics()
    assert [row["step"] for row in rows if row["loss"] is None] == [4, 6, 7]
    assert all(math.isfinite(row["loss"]) for row in rows if row["loss"] is not None)
    # The optimizer did not count the steps it did not make.
    adamw = sorted((run.state / f"step-{STEPS:06d}").glob("optimizer-*.safetensors"))[-1]
    assert load_file(adamw)["0.step"].item() == STEPS - 3


def test_three_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run", spec=tiny_spec(evaluate_every=1), objective=FaultyObjective)
    run.objective.bad_steps = frozenset(range(12, STEPS))
    snapshots = Snapshots(run)
    with pytest.raises(UserError, match="3 steps in a row") as caught:
        run.train(evaluate=snapshots)
    assert "\n" not in str(caught.value)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, snapshots.states[10][name]), name
    assert [step for step, _ in checkpoints(run.state)] == [5, 10]
    fresh = TinyRun(tmp_path / "fresh", seed=1)
    state, faults = load_newest(run.state, fresh.model, None)
    assert state is not None and state.step == 10 and faults == []
    for name, tensor in fresh.model.state_dict().items():
        assert torch.equal(tensor, snapshots.states[10][name]), name
    assert [row["step"] for row in run.metrics()] == list(range(10))


def test_two_bad_steps_at_a_time_do_not_stop_it(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run", removal=False, objective=FaultyObjective)
    run.objective.bad_steps = frozenset({8, 9, 11, 12})
    assert run.train().skipped_steps == 4


class Syncs(TorchDispatchMode):
    """Notes every read of a tensor's value by the host, with the number of forward passes before it."""

    def __init__(self, run: TinyRun) -> None:
        super().__init__()
        self.forwards = 0
        self.found: list[tuple[int, str]] = []
        run.objective.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.forwards += 1

    def note(self, name: str) -> None:
        self.found.append((self.forwards, name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.note(str(func))
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes the reads that take no dispatched operator on a CPU."""

    NAMES = frozenset("item tolist numpy cpu __bool__ __float__ __int__ __index__ __array__".split())

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            self.syncs.note(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("removal", [True, False])
def test_a_step_that_logs_nothing_does_not_wait_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removal: bool
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1000)
    run = TinyRun(tmp_path / "run", removal=removal, spec=tiny_spec(checkpoint_every=1000, **TERMS), on_spike="wait")
    syncs = Syncs(run)
    with syncs, Reads(syncs):
        run.train()
    assert any(step == STEPS for step, _ in syncs.found), "the last step logs, so the watch must have seen something"
    begins = {event.step for event in tiny_schedule().events if event.action == "freeze"} if removal else set()
    early = [(step, name) for step, name in syncs.found if step < STEPS and step not in begins]
    assert early == []
    # A site that leaves LayerNorm is checked for statistics: one look each, at a step that logs an event.
    freezing = [step for step, name in syncs.found if step < STEPS and name != "aten._local_scalar_dense.default"]
    assert len(freezing) <= (3 * LAYERS + 1 if removal else 0)


def test_metrics_say_what_the_schedules_say(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run")
    run.train()
    for row in run.metrics():
        assert row["learning_rate"] == learning_rate_at(row["step"], run.spec)
        assert row["tokens_per_second"] > 0
    expected = [
        {"kind": "event", "step": step, "site": change.site, "action": change.action, "value": change.value}
        for step in range(STEPS)
        for change in tiny_schedule().changes(step)
    ]
    assert run.metrics("event") == expected


class Clock:
    """Stands still, but for the first step, which compiles for 1,000 seconds, steps of 2 and evaluations of 30 seconds."""

    def __init__(self, run: TinyRun) -> None:
        self.now, self._next = 0.0, 1000.0
        run.objective.register_forward_pre_hook(self._pass)

    def perf_counter(self) -> float:
        return self.now

    def _pass(self, *_: object) -> None:
        self.now, self._next = self.now + self._next, 2.0

    def evaluate(self) -> dict[str, float]:
        self.now += 30.0
        return {"score": 1.0}


@pytest.mark.parametrize("resume", [False, True])
def test_speed_and_time_left_do_not_count_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """A resumed run compiles again, and its speed is that of its own steps. The time of all training counts everything."""
    shown: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(Tracker, "show", lambda self, step, **figures: shown.update({step: figures}))
    spec, before = tiny_spec(evaluate_every=8, checkpoint_every=8), 0
    if resume:
        short = TinyRun(tmp_path / "run", spec=spec.model_copy(update={"steps": 8}), planned=tiny_schedule(STEPS))
        before = short.train().seconds
    run = TinyRun(tmp_path / "run", spec=spec)
    clock = Clock(run)
    monkeypatch.setattr(loop, "time", clock)
    result = run.train(evaluate=clock.evaluate, resume=resume)
    assert STEPS == 24
    speed = spec.tokens_per_step / 2.0
    assert result.tokens_per_second == pytest.approx(speed)
    steps = 16 if resume else 24
    assert result.seconds == pytest.approx(before + 1000 + 2 * (steps - 1), abs=1)
    assert {row["tokens_per_second"] for row in run.metrics() if row["step"] >= 8 * resume} == {speed}
    # Logged before the evaluation that is due after 16 steps; that and the last one are to come.
    evaluation = 0 if resume else 30
    assert shown[16]["seconds_left"] == pytest.approx(2 * 8 + 2 * evaluation)
    assert shown[20]["seconds_left"] == pytest.approx(2 * 4 + 30)


def test_every_forward_pass_has_the_mixes_of_its_step(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run")
    assert run.sites is not None
    sites, found = run.sites, []
    norm = sites.norms["ln_2.0"]
    run.objective.register_forward_pre_hook(lambda *_: found.append((sites.mixes(), norm.dropped.tolist())))
    run.train()
    schedule = tiny_schedule()
    for step, (mixes, dropped) in enumerate(found):
        assert mixes == pytest.approx(schedule.freeze_values(step))
        special = schedule.special_values(step)
        assert dropped == pytest.approx([0, special["eot"], special["first"]])


def test_evaluation_sees_evaluation_mode_and_training_goes_on_in_its_own(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run", spec=tiny_spec(evaluate_every=10))
    modes: list[bool] = []

    def evaluate() -> dict[str, float]:
        modes.append(run.model.training)
        with torch.no_grad():
            run.model(torch.zeros(1, 8, dtype=torch.int64))
        return {"score": 2.0}

    run.train(evaluate=evaluate)
    assert modes == [False, False, False]
    assert run.metrics("evaluation") == [{"kind": "evaluation", "step": step, "score": 2.0} for step in (10, 20, 24)]
    undisturbed = TinyRun(tmp_path / "undisturbed")
    undisturbed.train()
    assert_same_weights(run.model, undisturbed.model, tolerance=0)


def test_the_attention_is_given_back(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run", spec=tiny_spec(steps=2), removal=False)
    inside: list[str] = []
    run.objective.register_forward_pre_hook(lambda *_: inside.append(run.model.config._attn_implementation))
    run.train()
    assert set(inside) == {"ln_removal_fused"}
    assert run.model.config._attn_implementation == "sdpa"
    padded = torch.tensor([[1, 1, 1, 0]])
    tokens = torch.arange(4)[None]
    model = run.model.eval()
    assert not torch.allclose(
        model(tokens.flip(1), attention_mask=padded.flip(1)).logits[0, -1], model(tokens.flip(1)).logits[0, -1]
    ), "a padding mask counts again"


def test_causal_attention_is_what_transformers_computes(tmp_path: Path) -> None:
    from ln_removal.models.attention import fused_attention

    model = tiny_model().eval()
    tokens = torch.randint(0, 63, (3, 16), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    with fused_attention(model):
        found = model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_metrics_behind_a_checkpoint_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kinds = [("train", step) for step in range(8)] + [("evaluation", 4), ("evaluation", 5), ("event", 4), ("event", 5)]
    lines = [json.dumps({"kind": kind, "step": step}) for kind, step in kinds]
    path.write_text("\n".join(lines) + '\n{"kind": "train", "st')
    truncate_metrics(path, 5)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in kept if row["kind"] == "train"] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in kept if row["kind"] == "evaluation"] == [4, 5], "made after 4 and after 5 steps"
    assert [row["step"] for row in kept if row["kind"] == "event"] == [4]


def test_metrics_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "metrics.jsonl", total_steps=2, label="test")
    with tracker:
        tracker.log("train", 0, {"loss": math.nan, "gradient_norm": math.inf, "learning_rate": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"kind": "train", "step": 0, "loss": None, "gradient_norm": None, "learning_rate": 0.5}


@pytest.mark.slow
def test_two_ranks_train_as_one_does(tmp_path: Path, forked: Commands) -> None:
    one = TinyRun(tmp_path / "one")
    one.train()
    assert one.sites is not None
    forked.at(tmp_path).run_ranks(2, "tiny_training:main", str(tmp_path / "two"))
    two = TinyRun(tmp_path / "two")
    assert_same_metrics(two, one, tolerance=1e-5)
    reports = [json.loads((tmp_path / "two" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0] == reports[1], "same weights, same constants, and both skipped the step that was bad on one"
    assert reports[0]["ranks"] == 2
    assert reports[0]["sick_skipped"] == 1
    expected = one.sites.frozen_constants()
    for site, constants in reports[0]["constants"].items():
        assert constants == pytest.approx(expected[site], rel=1e-5)
