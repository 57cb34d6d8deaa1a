"""Schedules: the published ones step by step, and what holds for every schedule."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ln_removal.config.recipe import ScheduleSpec, load_recipe
from ln_removal.errors import UserError
from ln_removal.models.layout import all_sites
from ln_removal.norms.schedule import Event, RemovalSchedule, expand

# (recipe, layers, run, ln_2 steps, qk steps, v steps, ln_f, end-of-text, first position): arXiv 2409.13710 for
# gpt2-apollo, arXiv 2507.02559 for the others, written out so that no formula is shared with the code under test.
PUBLISHED = [
    ("gpt2-apollo", 12, 1200, range(200, 440, 20), range(440, 680, 20), range(680, 1040, 30), 1040, 1060, 1160),
    ("gpt2-fast", 12, 300, range(20, 44, 2), range(44, 68, 2), range(68, 104, 3), 104, 106, 116),
    ("gpt2-fast-aux", 12, 300, range(20, 44, 2), range(44, 68, 2), range(68, 104, 3), 104, 106, 116),
    ("gpt2-medium", 24, 500, range(20, 68, 2), range(68, 116, 2), range(116, 188, 3), 188, 190, 200),
    ("gpt2-large", 36, 600, range(30, 174, 4), range(174, 318, 4), range(318, 534, 6), 534, 536, 546),
    ("gpt2-xl", 48, 800, range(20, 116, 2), range(116, 212, 2), range(212, 356, 3), 356, 358, 368),
    ("gpt2-xl-aux", 48, 800, range(50, 242, 4), range(242, 434, 4), range(434, 722, 6), 722, 724, 734),
]


@pytest.mark.parametrize(
    ("recipe", "n_layer", "steps", "ln_2", "qk", "v", "ln_f", "eot", "first"),
    PUBLISHED,
    ids=[row[0] for row in PUBLISHED],
)
def test_published_schedules_step_by_step(
    recipe: str, n_layer: int, steps: int, ln_2: range, qk: range, v: range, ln_f: int, eot: int, first: int
) -> None:
    expected = {"ln_f": ln_f, "eot": eot, "first": first}
    for kind, times in (("ln_2", ln_2), ("ln_1_qk", qk), ("ln_1_v", v)):
        assert len(times) == n_layer
        expected |= {f"{kind}.{layer}": step for layer, step in enumerate(times)}

    loaded = load_recipe(recipe)
    assert loaded.training.steps == steps
    assert loaded.training.tokens_per_step == 2**19
    assert loaded.schedule is not None
    schedule = expand(loaded.schedule, n_layer, steps)

    assert {event.site: event.step for event in schedule.events} == expected
    assert {event.taper for event in schedule.events} == {0}
    for step in range(steps):
        values = schedule.freeze_values(step) | schedule.special_values(step)
        assert values == {site: float(step >= start) for site, start in expected.items()}, f"step {step}"


@pytest.mark.parametrize(
    ("recipe", "n_layer", "at_least"), [("gpt2", 12, 150), ("distilgpt2", 6, 150), ("tiny", 6, 60)]
)
def test_own_recipes_leave_time_to_recover(recipe: str, n_layer: int, at_least: int) -> None:
    loaded = load_recipe(recipe)
    assert loaded.schedule is not None
    schedule = expand(loaded.schedule, n_layer, loaded.training.steps)
    assert schedule.recovery_steps >= at_least


def spec(**changes: int | None) -> ScheduleSpec:
    values: dict[str, int | None] = {
        "ln_2_start": 5,
        "ln_2_gap": 2,
        "qk_gap": 2,
        "v_gap": 3,
        "eot_after": 2,
        "first_after": 4,
    }
    return ScheduleSpec.model_validate(values | changes)


counts = st.integers(0, 5)
specs = st.builds(
    spec,
    ln_2_start=st.integers(1, 20),
    ln_2_gap=counts,
    qk_gap=counts,
    v_gap=counts,
    eot_after=counts,
    first_after=counts,
    taper=counts,
    special_taper=counts,
)


@st.composite
def schedules(draw: st.DrawFn) -> RemovalSchedule:
    drawn, n_layer = draw(specs), draw(st.integers(1, 7))
    needed = expand(drawn, n_layer, 10**6).complete_at + 1
    return expand(drawn, n_layer, needed + draw(st.integers(0, 8)))


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_each_site_exactly_once_in_removal_order(schedule: RemovalSchedule) -> None:
    sites = [event.site for event in schedule.events]
    assert sites == [*map(str, all_sites(schedule.n_layer)), "eot", "first"]
    steps = [event.step for event in schedule.events]
    assert steps == sorted(steps)


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_values_rise_from_zero_to_one_and_stay(schedule: RemovalSchedule) -> None:
    before = dict.fromkeys((event.site for event in schedule.events), 0.0)
    for step in range(schedule.steps):
        now = schedule.freeze_values(step) | schedule.special_values(step)
        assert all(before[site] <= now[site] <= 1.0 for site in now)
        before = now
    assert set(before.values()) == {1.0}, "everything is constant in the last step"
    assert all(value == 0.0 for value in schedule.freeze_values(0).values()), "the first step gathers statistics"


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_changes_replay_to_the_values(schedule: RemovalSchedule) -> None:
    replayed = dict.fromkeys((event.site for event in schedule.events), 0.0)
    for step in range(schedule.steps):
        for change in schedule.changes(step):
            assert replayed[change.site] != change.value, "only what differs is a change"
            assert (change.action == "drop_special") == (change.site in ("eot", "first"))
            replayed[change.site] = change.value
        assert replayed == schedule.freeze_values(step) | schedule.special_values(step)


@given(start=st.integers(1, 50), taper=st.integers(0, 40))
@settings(deadline=None)
def test_taper_takes_equal_steps(start: int, taper: int) -> None:
    event = Event(start, "ln_f", "freeze", taper)
    assert event.value(start - 1) == 0.0
    assert event.value(event.complete_at - 1) < 1.0 == event.value(event.complete_at)
    rises = [event.value(step) - event.value(step - 1) for step in range(start, event.complete_at + 1)]
    assert rises == pytest.approx([1 / (taper + 1)] * (taper + 1))
    # Summed over the taper the mix is that of a straight line: (taper + 2) / 2.
    assert sum(event.value(step) for step in range(start, start + taper + 1)) == pytest.approx((taper + 2) / 2)


@given(specs, st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_kinds_follow_one_another_at_any_depth(drawn: ScheduleSpec, n_layer: int) -> None:
    starts = {event.site: event.step for event in expand(drawn, n_layer, 10**6).events}
    chain = [
        ("ln_2", drawn.ln_2_gap, "ln_1_qk.0"),
        ("ln_1_qk", drawn.qk_gap, "ln_1_v.0"),
        ("ln_1_v", drawn.v_gap, "ln_f"),
    ]
    for kind, gap, following in chain:
        assert [starts[f"{kind}.{layer}"] - starts[f"{kind}.0"] for layer in range(n_layer)] == [
            layer * gap for layer in range(n_layer)
        ]
        assert starts[following] - starts[f"{kind}.0"] == n_layer * gap


def test_given_starts_replace_the_chain() -> None:
    schedule = expand(spec(qk_start=6, v_start=7, ln_f_at=30), 4, 100)
    starts = {event.site: event.step for event in schedule.events}
    assert (starts["ln_1_qk.0"], starts["ln_1_v.0"], starts["ln_f"]) == (6, 7, 30)
    assert (starts["eot"], starts["first"]) == (32, 36)
    assert [event.step for event in schedule.events] == sorted(starts.values())


def test_special_drops_follow_their_own_taper() -> None:
    schedule = expand(spec(taper=1, special_taper=3), 1, 50)
    starts = {event.site: event.step for event in schedule.events}
    assert schedule.freeze_values(starts["ln_f"])["ln_f"] == 0.5
    assert [schedule.special_values(starts["eot"] + later)["eot"] for later in range(-1, 5)] == [
        0,
        0.25,
        0.5,
        0.75,
        1,
        1,
    ]


def test_a_cap_is_lifted_when_everything_is_constant() -> None:
    schedule = expand(
        ScheduleSpec.model_validate(spec(taper=1).model_dump() | {"cap": 2.0, "cap_after": 4, "cap_taper": 3}), 1, 60
    )
    constant = max(event.complete_at for event in schedule.events if event.site != "cap")
    lifted = next(event for event in schedule.events if event.site == "cap")
    assert (lifted.step, lifted.complete_at, schedule.complete_at) == (constant + 4, constant + 7, constant + 7)
    assert [lifted.value(lifted.step + later) for later in (-1, 0, 1, 2, 3)] == [0, 0.25, 0.5, 0.75, 1]
    assert schedule.stage(lifted.step) == "cap" and schedule.stage(lifted.complete_at + 1) == "recovery"
    assert [row[0] for row in schedule.table()][-1] == "cap" and schedule.timeline().splitlines()[-2].startswith("cap ")
    without = RemovalSchedule(schedule.events, 1, 60)
    with pytest.raises(UserError, match="cap"):
        without.validate()


def test_stages_in_order() -> None:
    schedule = expand(spec(), 2, 40)  # ln_2 5 7, qk 9 11, v 13 16, ln_f 19, eot 21, first 25
    stages = [schedule.stage(step) for step in range(40)]
    assert list(dict.fromkeys(stages)) == [
        "real", "ln_2 1/2", "ln_2 2/2", "ln_1_qk 1/2", "ln_1_qk 2/2", "ln_1_v 1/2", "ln_1_v 2/2",
        "ln_f", "special", "recovery",
    ]  # fmt: skip
    assert stages[4:6] == ["real", "ln_2 1/2"]
    assert stages[20:22] == ["ln_f", "special"]
    assert stages[25:27] == ["special", "recovery"]


def test_stages_of_overlapping_tapers() -> None:
    staged = expand(spec(taper=9, special_taper=9, eot_after=0, first_after=0), 2, 60)
    assert list(dict.fromkeys(staged.stage(step) for step in range(60))) == [
        "real", "ln_2 1/2", "ln_2 2/2", "ln_1_qk 1/2", "ln_1_qk 2/2", "ln_1_v 1/2", "ln_1_v 2/2", "ln_f", "special", "recovery",
    ]  # fmt: skip
    together = expand(spec(ln_2_start=1, ln_2_gap=0, qk_gap=0, v_gap=0, taper=3, eot_after=0, first_after=0), 2, 60)
    assert [together.stage(step) for step in range(4)] == ["real", "freezing 25 %", "freezing 50 %", "freezing 75 %"]


def test_json_lists_every_event_with_its_tokens() -> None:
    rows = expand(spec(taper=2), 3, 60).to_json(tokens_per_step=1000)
    assert len(rows) == 3 * 3 + 1 + 2
    assert rows[0] == {"site": "ln_2.0", "step": 5, "action": "freeze", "taper": 2, "tokens": 5000}
    assert [row["site"] for row in rows[-2:]] == ["eot", "first"]
    assert "tokens" not in expand(spec(), 3, 60).to_json()[0]


def test_a_run_that_is_too_short_says_how_long_it_must_be() -> None:
    needed = expand(spec(), 4, 1000).complete_at + 1
    assert expand(spec(), 4, needed).recovery_steps == 1
    with pytest.raises(UserError, match=str(needed)):
        expand(spec(), 4, needed - 1)


def test_all_faults_are_reported_at_once() -> None:
    good = expand(spec(), 2, 40)
    events = [event for event in good.events if event.site not in ("ln_2.1", "first")]
    events += [
        Event(-3, "ln_2.0", "freeze"),
        Event(6, "ln_2.9", "freeze"),
        Event(10, "first", "drop_special"),
        Event(60, "eot", "freeze", taper=-1),
    ]
    with pytest.raises(UserError) as caught:
        RemovalSchedule(tuple(events), 2, 40).validate()
    message = str(caught.value)
    for part in (
        "ln_2.9: not in a model of 2 layers",
        "ln_2.1: missing",
        "ln_2.0, eot: more than one event",
        "eot: wrong action",
        "eot: taper below 0",
        "ln_2.0: at step -3",
        "eot: not complete by the last step (39)",
        "dropped before",
    ):
        assert part in message, message


def test_no_freeze_before_the_first_statistics() -> None:
    with pytest.raises(UserError, match="step 1"):
        expand(spec(ln_2_start=0), 2, 100)


def test_special_constants_are_not_dropped_before_the_last_freeze() -> None:
    with pytest.raises(UserError, match=r"eot, first.*ln_1_v\.1"):
        expand(spec(ln_f_at=6), 2, 100)


def test_the_stage_of_a_schedule_that_freezes_everything_together() -> None:
    schedule = expand(load_recipe("gpt2-together").schedule, 12, 1000)  # type: ignore[arg-type]
    stages = [schedule.stage(step) for step in (0, 1, 50, 100, 200, 251)]
    assert stages == ["real", "freezing 1 %", "freezing 50 %", "special", "special", "recovery"]
