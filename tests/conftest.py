"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command_line import Commands, commands

if TYPE_CHECKING:  # what is heavy is imported by the fixtures: the process that only hands out tests waits for nothing
    import torch
    from transformers import GPT2LMHeadModel

EOT = 100
"""End-of-text token of the tiny_gpt2 fixture: the last of its 101 tokens."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The interpreters of tools that cannot be installed beside this package; without them their tests are skipped."""
    for tool in ("saelens", "circuit-tracer"):
        parser.addoption(f"--{tool}-python", metavar="PATH", help=f"the python of an environment with {tool}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks come first, then files by their number of slow tests: workers that share the files end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.suffix == ".py", -slow[item.path], -tests[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_counts() -> Iterator[None]:
    """Background jobs start with SIGINT ignored, and so would every process that the tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and the machine may be busy.

    For the whole session: what a module's fixture trains and what its tests train must agree to the last bit.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Starts commands from one process that has everything imported."""
    with commands(tmp_path_factory.mktemp("commands")) as started:
        yield started


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `write_world` writes, made once for all tests, which leave it as it is."""
    from small_model import write_world

    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The world as the current directory; `new` is where a command may try to write."""
    monkeypatch.chdir(world)
    yield world
    shutil.rmtree(world / "new", ignore_errors=True)


@pytest.fixture
def copied(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world that a test may change, as the current directory."""
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from ln_removal.pipelines import context

    def began(*args: object, **options: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(context, "open_session", began)


@pytest.fixture
def tiny_gpt2() -> GPT2LMHeadModel:
    """A random GPT-2: 3 layers, width 32, 4 heads, 101 tokens, 32 positions, no dropout, evaluation mode.

    Norm weights, norm biases and all other biases are random too, so that a fold which forgets one of them shows.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=101,
        n_positions=32,
        n_embd=32,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.15,
        bos_token_id=EOT,
        eos_token_id=EOT,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                if name.endswith("wpe.weight"):
                    parameter[0] *= 8  # position 0 stands out, as it does in GPT-2
                if name.endswith("wte.weight"):
                    parameter[EOT] *= 3
    return model.eval()


@pytest.fixture
def with_norms(tiny_gpt2: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """tiny_gpt2 in float64."""
    return tiny_gpt2.double()


@pytest.fixture
def ln_free(tiny_gpt2: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """tiny_gpt2 with constant scales in place of its norms, folded, in float64."""
    from disarmed_model import disarm

    from ln_removal import from_disarmed

    return from_disarmed(disarm(tiny_gpt2)).double()


@pytest.fixture
def token_ids() -> torch.Tensor:
    """(4, 24) tokens with end-of-text in the middle of rows, and at position 0 of the second row."""
    import torch

    ids = torch.randint(0, EOT, (4, 24), generator=torch.Generator().manual_seed(1))
    ids[0, 7] = ids[1, 0] = ids[2, 23] = ids[2, 5] = EOT
    return ids
