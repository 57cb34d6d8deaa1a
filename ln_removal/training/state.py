"""Checkpoints of a run in progress: safetensors and JSON only, written atomically, the newest valid one found on resume.

A checkpoint `state/step-000120/` holds `model.safetensors` (parameters and buffers, so mixes, running and frozen stds too),
`optimizer-0.safetensors`, ... and `trainer.json` (next step, counters, checksums). It is written under a temporary name, synced
and renamed: a folder with a final name is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ln_removal.data.tokens import checksum, write_json_atomically
from ln_removal.errors import UserError

_NAME = re.compile(r"step-(\d{6,})")


@dataclass
class TrainerState:
    """Where a run stands. `step` is the next optimizer step; `seconds` counts training time over all sessions.

    `schedule` is where an adaptive schedule stands; None for a fixed one, which the step alone determines.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    seconds: float = 0.0
    schedule: dict[str, Any] | None = None
    checksums: dict[str, str] = field(default_factory=dict)


def save_checkpoint(
    directory: Path, state: TrainerState, model: nn.Module, optimizers: list[torch.optim.Optimizer], *, keep: int
) -> Path:
    """Write `directory/step-NNNNNN` atomically, then delete all but the newest `keep` checkpoints up to this one.

    Raises:
        UserError: when the disk is full or the directory cannot be written; earlier checkpoints stay as they were.
    """
    final = directory / f"step-{state.step:06d}"
    temporary = directory / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(_unshared(model.state_dict()), temporary / "model.safetensors")
        for number, optimizer in enumerate(optimizers):
            save_file(_flatten(optimizer), temporary / f"optimizer-{number}.safetensors")
        state.checksums = {path.name: checksum(path) for path in sorted(temporary.glob("*.safetensors"))}
        for path in temporary.iterdir():
            _sync(path)
        write_json_atomically(temporary / "trainer.json", asdict(state))
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {final}: {error}; free some space, then continue from the one before with --resume"
        ) from error
    # Later ones are damaged (resuming passed them over): counted in, they would push out the one just written.
    kept = [path for step, path in checkpoints(directory) if step <= state.step][-keep:]
    for _, path in checkpoints(directory):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return final


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in `directory` as (step, path), oldest first."""
    found = []
    for path in directory.glob("step-*") if directory.is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def load_newest(
    directory: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer] | None
) -> tuple[TrainerState | None, list[str]]:
    """Load the newest checkpoint that is whole into `model` and `optimizers`.

    Args:
        directory: the run's `state` folder.
        model: receives parameters and buffers; every name must match.
        optimizers: receive their state; None loads the model only.

    Returns:
        The state, None when there is no checkpoint at all, and one line for each newer checkpoint passed over as damaged.

    Raises:
        UserError: when there are checkpoints and every one of them is damaged, or the newest is of another model or
            optimizer.
    """
    faults: list[str] = []
    for _, path in reversed(checkpoints(directory)):
        try:
            state = _read_trainer(path)
            tensors = {name: load_file(path / name) for name in state.checksums}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            faults.append(f"{path} is damaged ({error})")
            continue
        _load_model(path, model, tensors["model.safetensors"])
        for number, optimizer in enumerate(optimizers or []):
            _load_optimizer(path / f"optimizer-{number}.safetensors", optimizer, tensors)
        return state, faults
    if faults:
        raise UserError("; ".join(faults) + "; no whole checkpoint is left: start again with another --out")
    return None, []


def _read_trainer(path: Path) -> TrainerState:
    state = TrainerState(**json.loads((path / "trainer.json").read_text(encoding="utf-8")))
    for name, expected in state.checksums.items():
        if Path(name).name != name or checksum(path / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    if "model.safetensors" not in state.checksums:
        raise ValueError("it names no model.safetensors")
    return state


def _load_model(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # shapes differ
        raise UserError(
            f"{path} is of another model ({' '.join(str(error).split())[:200]}); resume with the recipe the run began with"
        ) from error
    # Tied weights are stored once; what is missing must be such a twin of something that was loaded.
    loaded = {tensor.data_ptr() for name, tensor in model.state_dict().items() if name in tensors}
    missing = [name for name in missing if model.state_dict()[name].data_ptr() not in loaded]
    if missing or unexpected:
        raise UserError(
            f"{path} is of another model: missing {missing[:3]}, unexpected {unexpected[:3]}; resume with the recipe the run "
            "began with"
        )


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors without the second name of a tied weight (safetensors refuses shared memory)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        result[name] = tensor.detach().contiguous()
    return result


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{parameter}.{key}": torch.as_tensor(value).contiguous()
        for parameter, values in state.items()
        for key, value in values.items()
    }


def _load_optimizer(path: Path, optimizer: torch.optim.Optimizer, files: dict[str, dict[str, Tensor]]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in files.get(path.name, {}).items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = tensor
    fits = path.name in files and all(
        number < len(parameters) and tensor.shape in ((), parameters[number].shape)
        for number, values in state.items()
        for tensor in values.values()
    )
    if not fits:
        raise UserError(f"{path.parent} has no state for this optimizer; resume with the recipe the run began with")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
