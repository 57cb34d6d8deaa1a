"""Checkpoints of a run in progress: safetensors and JSON only, written atomically, the newest valid one found on resume.

A checkpoint `state/step-000120/` holds `model.safetensors` (parameters and buffers, so mixes, running and frozen stds too),
`optimizer-0.safetensors`, ... and `trainer.json` (next step, counters, checksums). It is written under a temporary name, synced,
read back from the disk, compared with the tensors in memory, and renamed. A folder with a final name is therefore complete. Older
checkpoints are deleted after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ln_removal.errors import UserError
from ln_removal.files.atomic import check_room, checksum, is_full, shortage, sync, write_json_atomically, written_whole

BESIDE_TENSORS = 1 << 18
"""More than the bytes of a checkpoint that are not tensors: headers, trainer.json, directory entries."""

Files = dict[str, dict[str, Tensor]]
"""File name to tensors."""

_NAME = re.compile(r"step-(\d{6,})")


@dataclass
class TrainerState:
    """How far a run has come. `step` is the next optimizer step; `seconds` is the training time of all sessions.

    `schedule` is the progress of a schedule that waits (divergence.ScheduleProgress); None for a fixed one.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    seconds: float = 0.0
    schedule: dict[str, Any] | None = None
    checksums: dict[str, str] = field(default_factory=dict)


class _NotAsWritten(Exception):
    """A file does not hold what was written to it."""


def save_checkpoint(
    directory: Path, state: TrainerState, model: nn.Module, optimizers: list[torch.optim.Optimizer], *, keep: int
) -> Path:
    """Write `directory/step-NNNNNN` atomically, then delete all but the newest `keep` checkpoints up to this one.

    A checkpoint that does not read back as it was written is written once more.

    Raises:
        UserError: when the disk is full or failing or the directory cannot be written; earlier checkpoints stay as they were.
    """
    final = directory / f"step-{state.step:06d}"
    files: Files = {"model.safetensors": _unshared(model.state_dict())}
    for number, optimizer in enumerate(optimizers):
        files[f"optimizer-{number}.safetensors"] = _flatten(optimizer)
    needed = BESIDE_TENSORS + sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    try:
        check_room(final, needed)
        try:
            _write(final, state, files)
        except _NotAsWritten:  # once may be chance
            _write(final, state, files)
    except _NotAsWritten as error:
        raise UserError(
            f"the checkpoint {final} does not read back as it was written ({error}, twice): the disk or the memory is failing; "
            f"{_before(final)} is intact, continue from there with --resume on a disk that works"
        ) from error
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = (
            f"{shortage(final, needed)}; free some space" if is_full(error) else "check the directory and its rights"
        )
        raise UserError(
            f"cannot write the checkpoint {final}: {reason}; {advice}, then continue from {_before(final)} with --resume"
        ) from error
    # Later ones are damaged, since resuming passed them over. Counted among the newest, they would push out the one just written.
    for step, path in checkpoints(directory):
        if step > state.step:
            _delete(path)
    prune(directory, keep=keep)
    return final


def prune(directory: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints. Call it only when the newest is known to be whole."""
    for _, path in checkpoints(directory)[:-keep]:
        _delete(path)


def _write(final: Path, state: TrainerState, files: Files) -> None:
    """Write a checkpoint and read it back. Raises _NotAsWritten, and leaves nothing, if the disk holds something else."""
    with written_whole(final) as temporary:
        state.checksums = {}
        for name, tensors in files.items():
            path = temporary / name
            save_file(tensors, path)
            sync(path)
            _forget_cached(path)
            state.checksums[name] = checksum(path)
            _check_reads_back(path, tensors)
        values = json.loads(json.dumps(asdict(state)))
        path = temporary / "trainer.json"
        write_json_atomically(path, {**values, "sha256": _digest(values)})
        try:
            _read_state(temporary)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _NotAsWritten(f"{path.name}: {error}") from error


def _check_reads_back(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            same = sorted(file.keys()) == sorted(tensors) and all(
                _same_bits(file.get_tensor(name), tensor) for name, tensor in tensors.items()
            )
    except (OSError, SafetensorError, ValueError) as error:
        raise _NotAsWritten(f"{path.name}: {error}") from error
    if not same:
        raise _NotAsWritten(path.name)


def _same_bits(found: Tensor, meant: Tensor) -> bool:
    """Whether two tensors are equal to the last bit. A NaN equals itself here."""
    if found.shape != meant.shape or found.dtype != meant.dtype:
        return False
    return torch.equal(found.flatten().view(torch.uint8), meant.detach().cpu().flatten().view(torch.uint8))


def _forget_cached(path: Path) -> None:
    """Ask the system, where that is possible, to serve the next read of a synced file from the disk and not from memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, because a half deleted one must not be taken for a checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.tmp")
    try:
        os.replace(checkpoint, doomed)
    except OSError:
        doomed = checkpoint
    shutil.rmtree(doomed, ignore_errors=True)


def _before(final: Path) -> str:
    """The newest checkpoint besides `final`, in words."""
    others = [path for _, path in checkpoints(final.parent) if path != final]
    return str(others[-1]) if others else "the beginning"


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
        The state, None when there is no checkpoint at all, and one line for each newer checkpoint passed over as damaged,
        which also names the one loaded instead.

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
        return state, [f"{fault}; going on from {path} instead" for fault in faults]
    if faults:
        raise UserError("; ".join(faults) + "; no whole checkpoint is left: start again with another --out")
    return None, []


def _read_trainer(path: Path) -> TrainerState:
    """trainer.json of a checkpoint. Raises ValueError if a file does not match the checksum in it."""
    state = _read_state(path)
    for name, expected in state.checksums.items():
        if Path(name).name != name or checksum(path / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    if "model.safetensors" not in state.checksums:
        raise ValueError("it names no model.safetensors")
    return state


def _read_state(path: Path) -> TrainerState:
    values = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    if values.pop("sha256", None) not in (None, _digest(values)):  # None: written before there was one
        raise ValueError("trainer.json does not match its checksum")
    return TrainerState(**values)


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of the other values in trainer.json."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _load_model(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # shapes differ
        raise UserError(
            f"{path} is of another model ({' '.join(str(error).split())[:200]}); resume with the recipe the run began with"
        ) from error
    # Tied weights are stored once, so a missing name must share its memory with one that was loaded.
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

    def fits(number: int, key: str, shape: torch.Size) -> bool:
        if number >= len(parameters):
            return False
        own = optimizer.state.get(parameters[number], {}).get(key)  # of one that begins with a state
        return shape in ((), parameters[number].shape) if own is None else shape == own.shape

    if path.name not in files or not all(
        fits(number, key, tensor.shape) for number, values in state.items() for key, tensor in values.items()
    ):
        raise UserError(f"{path.parent} has no state for this optimizer; resume with the recipe the run began with")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
