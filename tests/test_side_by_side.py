"""Several models on one data set: differences with intervals, the worst windows; residual stds; stress texts; samples."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_model import write_model
from test_token_statistics import make_data
from transformers import AutoTokenizer, GPT2LMHeadModel

from ln_removal.data.stress_text import KINDS, stress_sequences
from ln_removal.errors import UserError
from ln_removal.evaluation.compare import (
    WORST_SAMPLES,
    Comparison,
    compare_stress_texts,
    sample_text,
    stress_losses,
)
from ln_removal.evaluation.loss import cross_entropy
from ln_removal.evaluation.statistics import residual_std

CONTEXT = 16


class Letters:
    """A tokenizer that writes token n as <n>."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{number}>" for number in ids)


@pytest.fixture
def worse(tiny_gpt2: GPT2LMHeadModel) -> GPT2LMHeadModel:
    model = copy.deepcopy(tiny_gpt2)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(1.3)
    return model


def test_differences_are_paired_and_intervals_hold_the_means(
    tiny_gpt2: GPT2LMHeadModel, worse: GPT2LMHeadModel, tmp_path: Path
) -> None:
    data = make_data(tmp_path, [400])
    reading = Comparison("text", data, context=CONTEXT)
    reading.add("control", tiny_gpt2)
    reading.add("ln_free", worse)
    found = reading.scores(Letters())  # type: ignore[arg-type]
    expected = cross_entropy(tiny_gpt2, data.split("validation"), context=CONTEXT)
    assert found.cross_entropy.control == pytest.approx(expected.cross_entropy, abs=1e-6)
    assert found.cross_entropy.original is None and found.loss_spread.original is None
    (difference,) = found.differences
    assert (difference.model, difference.than, difference.unit) == ("ln_free", "control", "documents")
    assert found.cross_entropy.ln_free is not None and found.cross_entropy.control is not None
    assert difference.mean == pytest.approx(found.cross_entropy.ln_free - found.cross_entropy.control, abs=1e-6)
    assert difference.low <= difference.mean <= difference.high
    low, high = found.interval.control  # type: ignore[misc]
    assert low < found.cross_entropy.control < high
    assert high - low > difference.high - difference.low, "pairing did not help"
    assert found == reading.scores(Letters()), "seeded"  # type: ignore[arg-type]


def test_worst_windows_come_first_with_the_text_around_their_costliest_token(
    tiny_gpt2: GPT2LMHeadModel, worse: GPT2LMHeadModel, tmp_path: Path
) -> None:
    data = make_data(tmp_path, [400])
    split = data.split("validation")
    reading = Comparison("text", data, context=CONTEXT)
    for role, model in (("original", tiny_gpt2), ("ln_free", worse)):
        reading.add(role, model)
    samples = reading.scores(Letters()).worst  # type: ignore[arg-type]
    assert len(samples) == WORST_SAMPLES and {sample.ranked_by for sample in samples} == {"ln_free"}
    losses = [sample.loss.ln_free for sample in samples]
    assert losses == sorted(losses, reverse=True)  # type: ignore[type-var]
    for sample in samples:
        tokens = torch.from_numpy(split.read(sample.shard, sample.start, sample.tokens + 1))
        with torch.no_grad():
            log_probs = worse(tokens[None, :-1]).logits[0].log_softmax(-1)
        own = -log_probs.gather(1, tokens[1:, None])[:, 0]
        assert sample.loss.ln_free == pytest.approx(float(own.mean()), abs=1e-4)
        assert sample.token_loss == pytest.approx(float(own.max()), abs=1e-4)
        assert sample.position == int(own.argmax())
        assert sample.token == f"<{tokens[sample.position + 1]}>"
        assert sample.before.endswith(f"<{tokens[sample.position]}>")
    assert losses[0] == pytest.approx(
        max(
            float(_mean_loss(worse, torch.from_numpy(split.read(0, start, min(17, 400 - start)))))
            for start in range(0, 399, 16)
        ),
        abs=1e-4,
    )


def _mean_loss(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(tokens[None, :-1]).logits[0], tokens[1:])


def test_a_model_that_exploded_is_scored_and_not_an_error(
    tiny_gpt2: GPT2LMHeadModel, worse: GPT2LMHeadModel, tmp_path: Path
) -> None:
    from ln_removal.evaluation import results as results_file

    with torch.no_grad():
        worse.transformer.wte.weight[50] = float("nan")
    reading = Comparison("text", make_data(tmp_path, [400]), context=CONTEXT)
    losses = {role: reading.add(role, model) for role, model in (("control", tiny_gpt2), ("ln_free", worse))}
    found = reading.scores(Letters())  # type: ignore[arg-type]
    assert np.isnan(found.cross_entropy.ln_free) and np.isnan(found.calibration.ln_free.entropy)  # type: ignore[union-attr]
    assert np.isfinite(found.cross_entropy.control) and np.isnan(found.worst[0].loss.ln_free)  # type: ignore[arg-type]
    results = results_file.collect(
        losses,
        models={"control": "c", "ln_free": "m"},
        settings=results_file.Settings(data="d", context=CONTEXT),
        seconds=1,
        device="cpu",
        by_data=[found],
    )
    results_file.write(results, tmp_path / "results.json")
    again = results_file.read(tmp_path / "results.json")
    assert again.gap is not None and np.isnan(again.gap) and len(again.by_data[0].worst) == WORST_SAMPLES


def test_one_window_has_no_interval(tiny_gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    reading = Comparison("text", make_data(tmp_path, [9]), context=CONTEXT)
    reading.add("original", tiny_gpt2)
    found = reading.scores(Letters())  # type: ignore[arg-type]
    assert found.differences == () and found.interval.original is None and len(found.worst) == 1


def test_residual_std_is_what_the_norms_divide_by(tiny_gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    from ln_removal.models.norm_free import norm_free_config
    from ln_removal.models.normfree_gpt2 import NormFreeGPT2LMHeadModel

    data = make_data(tmp_path, [CONTEXT * 10])
    split = data.split("validation")
    found = residual_std(tiny_gpt2, split, context=CONTEXT, eot_token_id=100)
    assert found is not None and found.tokens == CONTEXT * 10
    assert (len(found.ordinary_pre), len(found.ordinary_mid)) == (4, 3)
    ids = torch.from_numpy(np.concatenate(list(split.windows(CONTEXT))))
    with torch.no_grad():
        states = tiny_gpt2.transformer(ids, output_hidden_states=True).hidden_states
    ordinary = ids != 100
    ordinary[:, 0] = False
    for layer in range(3):  # the last hidden state has gone through ln_f
        stds = states[layer].std(-1, correction=0)
        assert found.ordinary_pre[layer] == pytest.approx(float(stds[ordinary].mean()), rel=1e-5)
        assert found.first_pre[layer] == pytest.approx(float(stds[:, 0].mean()), rel=1e-5)
    hooks = [module for module in tiny_gpt2.modules() if module._forward_pre_hooks]
    assert not hooks, "hooks were left behind"
    config = norm_free_config(tiny_gpt2.config)
    assert residual_std(NormFreeGPT2LMHeadModel(config), split, context=CONTEXT, eot_token_id=100) is not None
    assert (
        residual_std(tiny_gpt2, make_data(tmp_path / "x", [5]).split("validation"), context=8, eot_token_id=0) is None
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    directory = write_model(tmp_path_factory.mktemp("models") / "model")
    return GPT2LMHeadModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def test_stress_texts_are_compared(saved: tuple[Any, Any]) -> None:
    model, tokenizer = saved
    sequences = stress_sequences(tokenizer, context=33, count=5, seed=0)
    losses = stress_losses(model, sequences)
    assert {kind: values.shape for kind, values in losses.items()} == dict.fromkeys(KINDS, (5, 32))
    rows = torch.from_numpy(sequences["tabs"])
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    assert losses["tabs"] == pytest.approx(expected.numpy(), abs=1e-4)
    doubled = {kind: 2 * values for kind, values in losses.items()}
    found = compare_stress_texts(tokenizer, sequences, {"control": losses, "ln_free": doubled})
    assert [one.kind for one in found] == list(KINDS)
    for one in found:
        assert one.loss.original is None and one.loss.control is not None and one.loss.ln_free is not None
        assert one.loss.ln_free == pytest.approx(2 * one.loss.control)
        worst = int(losses[one.kind].mean(1).argmax())
        assert one.worst.control == pytest.approx(losses[one.kind][worst].mean(), rel=1e-5)
        assert one.sample == tokenizer.decode(sequences[one.kind][worst].tolist()[:60])


def test_stress_texts_with_a_token_in_front_are_scored_over_the_same_tokens(saved: tuple[Any, Any]) -> None:
    model, tokenizer = saved
    sequences = stress_sequences(tokenizer, context=65, count=3, seed=0)  # the model has 64 positions
    eot = tokenizer.eos_token_id
    losses = stress_losses(model, sequences, bos=eot)
    for kind, rows in sequences.items():
        ids = torch.cat([torch.full((3, 1), eot), torch.from_numpy(rows[:, :-1])], dim=1)
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")[:, 1:]
        assert losses[kind] == pytest.approx(expected.numpy(), abs=1e-4), kind
    found = compare_stress_texts(tokenizer, sequences, {"original": losses}, bos=True)
    assert all(one.bos for one in found) and [one.kind for one in found] == list(KINDS)


def test_samples_depend_on_seed_and_temperature_alone(saved: tuple[Any, Any]) -> None:
    model, tokenizer = saved
    first = sample_text(model, tokenizer, "def f", max_new_tokens=12, seed=3)
    assert first == sample_text(model, tokenizer, "def f", max_new_tokens=12, seed=3)
    assert first != sample_text(model, tokenizer, "def f", max_new_tokens=12, seed=4)
    assert not first.startswith("def f")
    greedy = sample_text(model, tokenizer, "def f", max_new_tokens=6, temperature=0)
    ids = tokenizer("def f", return_tensors="pt").input_ids
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert greedy == tokenizer.decode(whole[0, ids.shape[1] :].tolist())
    with pytest.raises(UserError, match="positions"):
        sample_text(model, tokenizer, "x" * 500)
    with pytest.raises(UserError, match="empty"):
        sample_text(model, tokenizer, "")


def test_a_sample_ends_with_the_context(saved: tuple[Any, Any]) -> None:
    model, tokenizer = saved
    room = 64 - len(tokenizer("ab" * 25).input_ids)
    assert 0 < room < 20
    exactly = sample_text(model, tokenizer, "ab" * 25, max_new_tokens=room)
    assert sample_text(model, tokenizer, "ab" * 25, max_new_tokens=500) == exactly
