"""What each call runs on a GPU: its parts in the order of their value, with the time, the memory and the files that each needs.

`call.py` runs them. This module and that one need nothing but Python's own library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path("benchmarks/gpu")
TOKENIZER = HERE / "carried/tokenizer"
PEERS = HERE / "carried/peers"
PEER_ARMS = ("gpt2_noln", "removing_layer_norm", "removing_layer_norm_as_published", "hf_trainer")


@dataclass(frozen=True)
class Part:
    """One program of a call.

    Attributes:
        name: of its JSON in the work folder.
        command: arguments of Python.
        seconds: the least that must be left of the call for it to be started.
        memory: GiB of the GPU that it takes at most. Parts run side by side as far as the memory reaches.
        after: names of the parts that must have ended before it starts.
        needs: files that it reads and that another part or carry.sh makes.
        leaves: files that a later part reads; without them it counts as not done.
        clears: what an earlier try may have left and this one must not find.
        prints_json: its standard output is its result. Otherwise it writes NAME.json itself.
        retry: added to the command where an earlier try failed; a part that has it is tried twice in a call.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    memory: float = 0
    after: tuple[str, ...] = ()
    needs: tuple[Path, ...] = ()
    leaves: tuple[Path, ...] = ()
    clears: tuple[Path, ...] = ()
    prints_json: bool = False
    retry: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scale:
    """The sizes of a call: those of a GPU, or small ones for a trial on a CPU.

    Attributes:
        pretrain_steps: of 131,072 tokens on a GPU; 330 took 127 s on an H200.
        arm_steps: of 65,536 tokens on a GPU; 120 of five arms at once took about 190 s on an H200.
    """

    device: str
    pretrain_steps: int = 330
    arm_steps: int = 120
    longer_steps: int = 200

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"


GPU = Scale("cuda")
TRIAL = Scale("cpu", pretrain_steps=20, arm_steps=10, longer_steps=10)
LIMITS = {"speed": 240, "removal": 420, "longer": 150}
"""Seconds of each call. With about 90 s for the start of a machine they fit into 15 minutes."""


def parts_of(call: str, scale: Scale, work: Path) -> list[Part]:
    """The parts of a call, the most valuable first."""
    return {"speed": _speed, "removal": _removal, "longer": _longer}[call](scale, work)


def _speed(scale: Scale, work: Path) -> list[Part]:
    """Call 1: the same numbers as on a CPU, one graph over all freezes, and the speed of ours and of the peers."""
    peers = _throughput("peers", scale, work, "gpt2", 131_072, ("hf_trainer_compiled", *PEER_ARMS), samples=3)
    return [
        Part(
            "parity",
            (
                *(str(HERE / "parity.py"), *_device(scale), "--out", str(work / "parity.json")),
                *(("--layers", "2", "--width", "64") if scale.tiny else ()),
            ),
            seconds=20,
            memory=3,
        ),
        Part(
            "ours",
            (
                *_throughput(
                    "ours", scale, work, "gpt2", 131_072, ("ours", "ours_teacher", "ours_documents"), samples=3
                ),
                "--together",
                "--stages",
            ),
            seconds=60,
            memory=50,  # 15, 16 and 16 GiB on an H200, and three contexts
        ),
        Part("medium", _size("medium", scale, work, 65_536, micro_batch=8), seconds=60, memory=14),
        Part("peers", (*peers, "--peers", str(PEERS)), seconds=30, memory=50, after=("ours",), needs=(PEERS,)),
        Part("large", _size("large", scale, work, 32_768, micro_batch=8), seconds=60, memory=28),
        Part("xl", _size("xl", scale, work, 16_384, micro_batch=4), seconds=60, memory=38),
        replace(_tokens(scale, work), after=("peers",)),
        Part(
            "profile",
            (
                "benchmarks/profile_step.py",
                *_device(scale),
                *("--shape", "tiny" if scale.tiny else "gpt2", "--sequences", "2" if scale.tiny else "32"),
                *("--out", str(work / "profile.json")),
            ),
            seconds=30,
            memory=16,
            after=("peers", "large", "xl"),
        ),
    ]


def _removal(scale: Scale, work: Path) -> list[Part]:
    """Call 2: a model of GPT-2 small's shape, trained here, and several removals of its LayerNorms at equal tokens."""
    base = work / "base"
    few = (
        *("--set", "architecture.n_layer=2", "--set", "architecture.n_embd=64", "--set", "architecture.n_head=2"),
        *("--set", "data.context=128", "--set", "training.tokens_per_step=1024"),
        *("--set", "training.evaluation_tokens=4096"),
    )
    return [
        _tokens(scale, work),
        Part(
            "pretrain",
            (
                *("-m", "ln_removal.cli.pretrain", "--recipe", str(HERE / "gpt2-python.toml"), "--json"),
                *("--tokens", str(work / "tokens"), "--out", str(base), *_device(scale)),
                *("--steps", str(scale.pretrain_steps), *(few if scale.tiny else ())),
            ),
            seconds=120,
            memory=40,
            after=("tokens",),
            needs=(work / "tokens/index.json",),
            leaves=(base / "model/config.json",),
            clears=(base,),
            prints_json=True,
            retry=("--set", "training.micro_batch=16"),  # its choice is what may fail on another GPU
        ),
        _arms("arms", scale, work, scale.arm_steps, (), seconds=100),
        _whole_run(scale, work, after="arms"),
    ]


def _longer(scale: Scale, work: Path) -> list[Part]:
    """What is left of the time, on the machine of call 2: the control and the recipe's method again with more steps."""
    arms = _arms("longer", scale, work, scale.longer_steps, ("control-prompts", "gpt2"), seconds=90)
    return [arms, _whole_run(scale, work, after="longer")]


def _whole_run(scale: Scale, work: Path, after: str) -> Part:
    """`ln-remove` itself, from the recipe to the report."""
    steps, tokens = (10, 1024) if scale.tiny else (60, 65_536)
    return Part(
        "command",
        (
            *("-m", "ln_removal.cli.remove", "--recipe", "gpt2", "--model", str(work / "base/model"), "--json"),
            *("--tokens", str(work / "tokens"), "--out", str(work / "run"), *_device(scale), "--control"),
            *("--steps", str(steps), "--set", f"training.tokens_per_step={tokens}"),
            *("--set", f"data.context={128 if scale.tiny else 1024}"),
            *(("--set", "data.validation_tokens=8192") if scale.tiny else ()),
        ),
        seconds=60,
        memory=30,
        after=(after,),
        needs=(work / "base/model/config.json", work / "tokens/index.json"),
        leaves=(work / "run/report.html",),
        clears=(work / "run",),
        prints_json=True,
    )


def _arms(name: str, scale: Scale, work: Path, steps: int, chosen: tuple[str, ...], seconds: float) -> Part:
    out = work / f"removals-{name}"
    small = (
        *("--layers", "2", "--tokens-per-step", "1024", "--micro-batch", "8"),
        *("--context", "128", "--validation-tokens", "8192"),
    )
    return Part(
        name,
        (
            *(str(HERE / "removal.py"), "--model", str(work / "base/model"), "--tokens", str(work / "tokens")),
            *("--out", str(out), "--steps", str(steps), *_device(scale), *(small if scale.tiny else ())),
            *(("--arms", *chosen) if chosen else ()),
            *("--json", str(work / f"{name}.json")),
        ),
        seconds=seconds,
        memory=60,
        after=("pretrain",),
        needs=(work / "base/model/config.json", work / "tokens/index.json"),
    )


def _tokens(scale: Scale, work: Path) -> Part:
    """The Python source of this machine as tokens. It uses the processor alone."""
    return Part(
        "tokens",
        (
            *("-m", "ln_removal.cli.prepare", "python-source", "--tokenizer", str(TOKENIZER), "--json"),
            *("--max-tokens", "600000" if scale.tiny else "80000000", "--out", str(work / "tokens")),
        ),
        seconds=45,
        needs=(TOKENIZER,),
        leaves=(work / "tokens/index.json",),
        prints_json=True,
    )


def _throughput(
    name: str, scale: Scale, work: Path, shape: str, tokens: int, who: tuple[str, ...], samples: int
) -> tuple[str, ...]:
    few = ("--samples", str(samples), "--warmup-steps", "3", "--sample-steps", "3")
    return (
        *("benchmarks/train_throughput.py", "--precision", "bfloat16", *_device(scale), "--resume"),
        *("--shape", "tiny" if scale.tiny else shape, "--tokens-per-step", str(2048 if scale.tiny else tokens)),
        *(*few, "--threads", "1" if scale.tiny else "4", "--turns", str(work / "turns")),
        *("--limit", "3000" if scale.tiny else "240"),
        *("--out", str(work / f"{name}.json"), "--only", *who),
    )


def _size(name: str, scale: Scale, work: Path, tokens: int, micro_batch: int) -> tuple[str, ...]:
    """Ours alone in a larger size; the trial takes the tiny shape for all of them, and does not compile it again."""
    who = "ours_eager" if scale.tiny else "ours"
    command = _throughput(name, scale, work, f"gpt2-{name}", tokens, (who,), samples=2)
    return (*command, "--micro-batch", str(1 if scale.tiny else micro_batch))


def _device(scale: Scale) -> tuple[str, str]:
    return ("--device", scale.device)
