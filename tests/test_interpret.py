"""The three models of a run in TransformerLens with the same hooks, and the documents that analyses read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import done, refused
from disarmed_model import disarm
from transformers import GPT2LMHeadModel

from ln_removal import UserError, from_disarmed
from ln_removal.interpret import load, load_untrained
from ln_removal.models.loading import load_model


class TestLoad:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_a_run(self, here: Path, dtype: torch.dtype) -> None:
        """Original, control and LN-free compute what they are, in the dtype that was asked for, with the same hooks."""
        models = load("run", dtype=dtype)
        assert [role for role, _ in models.items()] == ["original", "control", "ln_free"]
        ids = torch.arange(40).reshape(2, 20)
        hooks = []
        for role, bridge in models.items():
            with torch.no_grad():
                logits, cache = bridge.run_with_cache(ids)
                expected = load_model(models.names[role], dtype=dtype).model(ids).logits
            assert logits.dtype == dtype, role
            torch.testing.assert_close(logits, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)
            floats = {cache[name].dtype for name in cache.keys() if cache[name].is_floating_point()}  # noqa: SIM118
            assert floats == {dtype}, role
            hooks.append({name for name in cache.keys() if "hook_normalized" not in name and "hook_scale" not in name})  # noqa: SIM118
        assert hooks[0] == hooks[1] == hooks[2]
        assert models.original is not None and models.original.cfg.normalization_type == "LN"
        assert models.ln_free is not None and models.ln_free.cfg.normalization_type is None

    def test_models_in_memory(self, tiny_gpt2: GPT2LMHeadModel, token_ids: torch.Tensor) -> None:
        folded = from_disarmed(disarm(tiny_gpt2))
        models = load({"ln_free": folded, "original": tiny_gpt2})
        assert [role for role, _ in models.items()] == ["original", "ln_free"] and models.control is None
        assert models.original is not None
        torch.testing.assert_close(models.original(token_ids), tiny_gpt2(token_ids).logits)
        with pytest.raises(UserError, match="float64"):
            load({"ln_free": folded}, dtype=torch.float64)
        with pytest.raises(UserError, match="mine"):
            load({"mine": folded})
        with pytest.raises(UserError, match="tokens"):
            models.documents(4, prepend_bos=False)

    def test_weights_are_processed_only_when_asked(self, here: Path) -> None:
        ids = torch.arange(20)[None]
        plain, processed = load("run"), load("run", process_weights=True)
        for (_, one), (_, other) in zip(plain.items(), processed.items(), strict=True):
            assert (one(ids) - other(ids)).abs().max() > 1e-3, "centred logits"
            torch.testing.assert_close(one(ids).log_softmax(-1), other(ids).log_softmax(-1), rtol=1e-4, atol=1e-4)

    @pytest.mark.slow
    def test_before_there_is_a_run(self, tmp_path: Path) -> None:
        """The embedded model with norms and with constants, and held-out documents for both."""
        models = load_untrained(tmp_path / "tokens", dtype=torch.float64)
        assert [role for role, _ in models.items()] == ["original", "ln_free"] and models.tokenizer is not None
        assert models.original is not None and models.original.cfg.normalization_type == "LN"
        assert models.ln_free is not None and models.ln_free.cfg.normalization_type is None
        documents = models.documents(4, length=32, prepend_bos=False)
        one, other = (bridge(documents.inputs(bridge)) for _, bridge in models.items())
        assert one.dtype == other.dtype == torch.float64 and other.isfinite().all()
        assert models.documents(4, length=32, prepend_bos=True).tokens[0, 0] == models.tokenizer.eos_token_id

    def test_what_is_no_run(self, here: Path) -> None:
        for name in ("nowhere", "model"):
            with pytest.raises(UserError, match=rf"{name}.*run"):
                load(name)


class TestDocuments:
    def test_they_begin_documents_that_were_held_out(self, here: Path) -> None:
        models = load("run")
        assert models.data is not None
        split = models.data.split("validation")
        text = [split.read(0, int(start), 32) for start in split.document_starts[0]]
        found = models.documents(3, length=32, prepend_bos=False, seed=1)
        assert found.tokens.shape[1] == 32 and found.tokens.dtype == np.int64
        if found.unit == "documents":
            assert all(any(np.array_equal(row, one) for one in text) for row in found.tokens)
        again = models.documents(3, length=32, prepend_bos=False, seed=1)
        assert np.array_equal(found.tokens, again.tokens)

    def test_bos_takes_the_place_of_the_last_token(self, here: Path) -> None:
        models = load("run")
        assert models.data is not None
        without = models.documents(4, length=20, prepend_bos=False)
        with_bos = models.documents(4, length=21, prepend_bos=True)
        assert (with_bos.tokens[:, 0] == models.data.eot_token_id).all()
        assert np.array_equal(with_bos.tokens[:, 1:], without.tokens)
        assert with_bos.to_json()["prepend_bos"] is True

    def test_another_seed_draws_others(self, here: Path) -> None:
        models = load("run")
        one, other = (models.documents(3, length=16, prepend_bos=False, seed=seed).tokens for seed in (0, 1))
        assert not np.array_equal(one, other)
        assert not np.isin(models.data.eot_token_id, one)  # type: ignore[union-attr]

    def test_impossible_lengths(self, here: Path) -> None:
        models = load("run")
        with pytest.raises(UserError, match="64 positions"):
            models.documents(3, length=65, prepend_bos=False)
        with pytest.raises(UserError, match="at least"):
            models.documents(0, length=32, prepend_bos=False)


def test_a_command_shows_prints_and_writes(here: Path) -> None:
    """One table for all models; the same as JSON; figures and the JSON file where --out says."""
    said = done("ln-analyze dla run --documents 4 --length 32 --out new/found").stdout
    assert all(word in said for word in ("original", "control", "LN-free", "centred", "rank correlation"))
    files = {path.name for path in Path("new/found").iterdir()}
    assert {"dla.json", "dla-errors.png", "dla-errors.pdf", "dla-centred.png", "dla-correct.pdf"} <= files
    printed = json.loads(done("ln-analyze dla run --documents 4 --length 32 --out new/found --json").stdout)
    assert printed == json.loads(Path("new/found/dla.json").read_text())
    assert list(printed["models"]) == ["original", "control", "ln_free"]
    assert printed["dtype"] == "float64" and printed["text"]["tokens_each"] == 32


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("ln-analyze dla nonsense", "nonsense"),
        ("ln-analyze dla model", "run"),
        ("ln-analyze dla run --direction sideways", "centred"),
        ("ln-analyze dla run --dtype float16", "float64"),
        ("ln-analyze dla run --out model/config.json", "file"),
        ("ln-analyze dla run --length 3", "8"),
    ],
)
def test_mistakes_are_one_line(here: Path, command: str, word: str) -> None:
    assert word in refused(command)
    assert not Path("analysis").exists()
