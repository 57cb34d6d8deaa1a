"""The corpus that a model writes itself: drawn from its own probabilities, and the same however it was interrupted or batched."""

from __future__ import annotations

import copy
import json
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Commands, done, refused
from scipy.stats import chisquare
from small_model import REMOVE, tiny_neox, write_model

from ln_removal.cli.prepare import main
from ln_removal.data import generated
from ln_removal.data import prepare as prepare_module
from ln_removal.data.corpora import TokenDocument
from ln_removal.data.generated import SEED, GeneratedText, write_documents
from ln_removal.data.open_corpus import open_corpus
from ln_removal.data.tokens import TokenDataset
from ln_removal.errors import UserError
from ln_removal.models.loading import load_model

POSITIONS, ENTRIES = 32, 320


def write_eager(directory: Path, eot_logit: float, *, vocabulary: int | None = None) -> Path:
    """A random GPT-2 that ends its documents as readily as it is told: the end-of-text token's logit is raised everywhere."""
    write_model(directory, n_positions=POSITIONS, entries=ENTRIES, vocabulary=vocabulary)
    loaded = load_model(str(directory))
    eot, model = loaded.tokenizer.eos_token_id, loaded.model
    row = model.lm_head.weight[eot].detach()
    with torch.no_grad():
        model.transformer.ln_f.bias.add_(eot_logit * row / row.square().sum())
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose documents have lengths of 0 to 33 tokens."""
    return write_eager(tmp_path_factory.mktemp("writer") / "model", 3.0)


def texts(model: Path, number: int, skip: int = 0) -> list[TokenDocument]:
    corpus = GeneratedText(str(model), max_tokens=1, validation_fraction=0.2)
    return list(islice(corpus.documents(skip), number))


def model_of(family: str, writer: Path, world: Path) -> tuple[Any, int]:
    """A model and its end-of-text token."""
    if family == "neox":
        return tiny_neox(), 100
    loaded = load_model(str({"gpt2": writer}.get(family, world / "run" / family)))
    return loaded.model, loaded.tokenizer.eos_token_id


@pytest.mark.parametrize("family", ["gpt2", "neox", "model", "stock"])
def test_every_token_is_drawn_from_the_whole_models_probabilities(family: str, writer: Path, world: Path) -> None:
    """Against a forward pass of the document alone, without cached keys, in float64. The last two are LN-free."""
    model, eot = model_of(family, writer, world)
    positions, entries = model.config.max_position_embeddings, model.config.vocab_size
    numbers = range(7, 27)
    found = write_documents(model, numbers, eot_token_id=eot, entries=entries)
    exact = copy.deepcopy(model).double()
    checked = 0
    for number, tokens in zip(numbers, found, strict=True):
        drawn = tokens or [eot]
        with torch.inference_mode():
            probabilities = exact(torch.tensor([[eot, *drawn[:positions][:-1]]])).logits[0].softmax(-1)
        reached = probabilities.cumsum(-1)
        uniform = np.random.default_rng((SEED, number)).random(positions)
        for position, token in enumerate(drawn[:positions]):
            boundaries = reached[position] / reached[position, -1]
            low = 0.0 if token == 0 else float(boundaries[token - 1])
            assert low - 1e-5 <= uniform[position] <= float(boundaries[token]) + 1e-5
            checked += 1
    assert checked > 100


def test_first_tokens_follow_the_models_own_probabilities(writer: Path) -> None:
    loaded = load_model(str(writer))
    eot = loaded.tokenizer.eos_token_id
    with torch.inference_mode():
        expected = loaded.model(torch.tensor([[eot]])).logits[0, -1].double().softmax(-1).numpy()
    written = write_documents(loaded.model, range(4000), eot_token_id=eot, entries=ENTRIES)
    counts = np.bincount([tokens[0] if tokens else eot for tokens in written], minlength=ENTRIES)
    assert 0 < counts[eot] < 4000
    assert chisquare(counts, 4000 * expected).pvalue > 0.01


def test_documents_end_with_the_end_of_text_token_or_have_no_tokens(writer: Path) -> None:
    eot = load_model(str(writer)).tokenizer.eos_token_id
    written = [document.tokens for document in texts(writer, 200)]
    assert all(tokens.count(eot) == 1 and tokens[-1] == eot for tokens in written if tokens)
    lengths = {len(tokens) for tokens in written}
    assert 0 in lengths and max(lengths) == POSITIONS + 1, "one ended at once, and one filled the context"
    assert len(lengths) > 10


def test_the_same_every_time_from_every_place_and_in_every_batch(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = texts(writer, 150)
    assert texts(writer, 150) == whole
    for skip in (1, 63, 64, 100):
        assert texts(writer, 150 - skip, skip) == whole[skip:]
    for together in (1, 5, 150):
        monkeypatch.setattr(generated, "MOST_TOGETHER", {"cpu": together})
        assert texts(writer, 150) == whole
    assert {document.split for document in whole} == {"train", "validation"}
    assert whole[0].split == "train" and whole[1].split == "validation"


def test_skipped_documents_are_not_written_again(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def note(model: Any, numbers: range, **options: Any) -> list[list[int]]:
        asked.extend(numbers)
        return write_documents(model, numbers, **options)

    monkeypatch.setattr(generated, "write_documents", note)
    texts(writer, 10, skip=130)
    assert min(asked) >= 128, "but for those of its batch, without which rounding would differ"


def test_entries_that_the_tokenizer_lacks_are_not_drawn(tmp_path: Path) -> None:
    model = write_eager(tmp_path / "model", 0.0, vocabulary=2 * ENTRIES)
    tokens = [token for document in texts(model, 40) for token in document.tokens]
    assert min(tokens) >= 0 and ENTRIES // 2 < max(tokens) < ENTRIES


def test_the_cache_of_a_batch_has_a_limit(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(writer)).model
    assert generated.documents_together(model) == 64
    document = 2 * 2 * 32 * 4 * POSITIONS  # keys and values of 2 layers of width 32 in float32
    monkeypatch.setattr(generated, "CPU_CACHE_BYTES", 10 * document)
    assert generated.documents_together(model) == 10
    monkeypatch.setattr(generated, "CPU_CACHE_BYTES", 1)
    assert generated.documents_together(model) == 1


# ------------------------------------------------------------------------------------------------------- preparation


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_DOCUMENTS", 8)


PREPARE = "ln-prepare generated --tokenizer {} --max-tokens 6000 --validation-share 0.1 --out {}"


def write_slowly() -> None:
    """`ln-prepare` in a process of its own: it writes progress after every batch, and waits before each."""
    prepare_module.BATCH_DOCUMENTS, prepare_module.SECONDS_BETWEEN_CHECKPOINTS = 8, 0
    write = generated.write_documents

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(1)
        return write(*args, **options)

    generated.write_documents = slowly
    main()


def contents(directory: Path) -> dict[str, bytes]:
    # A process that is killed in the middle of an atomic write leaves its temporary file.
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.name != "prepare.lock" and path.suffix != ".tmp"
    }


@pytest.mark.usefixtures("small_batches")
def test_a_killed_preparation_goes_on_to_the_same_corpus(writer: Path, tmp_path: Path, forked: Commands) -> None:
    done(PREPARE.format(writer, tmp_path / "whole"))
    killed = tmp_path / "killed"
    command = PREPARE.format(writer, killed)
    worker = forked.start("test_generated:write_slowly", *command.split()[1:])
    worker.wait_until(lambda: (killed / "progress.json").exists()).send(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    consumed = json.loads((killed / "progress.json").read_text())["consumed"]
    assert consumed > 0 and not (killed / "index.json").exists()
    done(command)
    assert contents(killed) == contents(tmp_path / "whole")
    data = TokenDataset.open(killed)
    train, validation = data.split("train"), data.split("validation")
    assert 6000 <= train.tokens < 6000 + 8 * (POSITIONS + 1)
    assert 0.05 < validation.documents / (train.documents + validation.documents) < 0.2


@pytest.mark.usefixtures("small_batches")
def test_other_weights_in_the_same_place_are_another_corpus(tmp_path: Path) -> None:
    model = write_eager(tmp_path / "model", 1.0)
    command = f"ln-prepare generated --tokenizer {model} --max-tokens 500 --out {tmp_path / 'tokens'}"
    done(command)
    done(command)
    write_eager(model, 2.0)
    assert "weights_sha256" in refused(command)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("ln-prepare generated --tokenizer model --out new", ["--max-tokens"]),
        ("ln-prepare generated --tokenizer model --max-tokens 50 --max-bytes 9 --out new", ["max_bytes"]),
        ("ln-prepare generated --tokenizer model --max-tokens 50 --field body --out new", ["field"]),
        ("ln-prepare generated --tokenizer model --max-tokens 50 --validation-share 2 --out new", ["2"]),
        ("ln-prepare generated --tokenizer absent --max-tokens 50 --out new", ["absent"]),
        ("ln-pretrain --set data.corpus=generated --set data.weights={} --out new", ["ln-prepare generated"]),
        (f"{REMOVE} --set data.corpus=generated --set data.weights.stdlib=4 --out new", ["data.weights"]),
    ],
)
def test_what_cannot_be_written(command: str, parts: list[str]) -> None:
    line = refused(command)
    assert all(part in line for part in parts), line
    assert not Path("new").exists()


def test_a_model_that_writes_nothing_is_said_so(tmp_path: Path) -> None:
    model = write_eager(tmp_path / "model", 100.0)
    line = refused(f"ln-prepare generated --tokenizer {model} --max-tokens 500 --out {tmp_path / 'tokens'}")
    assert str(model) in line and "text of your own" in line


def test_a_tokenizer_without_an_end_of_text_token(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", n_positions=POSITIONS)
    config = json.loads((model / "tokenizer_config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("eos_token", "bos_token")}
    (model / "tokenizer_config.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match="no end-of-text token"):
        texts(model, 1)
    assert "end-of-text token" in refused(
        f"ln-prepare generated --tokenizer {model} --max-tokens 500 --out {tmp_path / 'x'}"
    )


def test_without_a_model_there_is_no_such_corpus() -> None:
    with pytest.raises(UserError, match="--tokenizer MODEL"):
        open_corpus("generated")


@pytest.mark.usefixtures("here")
def test_a_removal_on_what_its_model_writes() -> None:
    """The run lets the model write no more than it trains on, whatever the recipe allows."""
    line = REMOVE.replace("data.corpus=texts", "data.corpus=generated")
    done(f"{line} --set data.validation_share=0.2 --set data.max_tokens=100000000 --out new")
    data = TokenDataset.open("new/tokens")
    train, validation = data.split("train"), data.split("validation")
    assert data.corpus_name == "generated"
    assert 6 * 256 <= train.tokens < 6 * 256 + generated.MOST_TOGETHER["cpu"] * 65 + 16384
    assert 0.05 < validation.documents / (train.documents + validation.documents) < 0.4
    assert Path("new/model/config.json").is_file() and Path("new/results.json").is_file()
