"""Which model a run is made from: decided once, when the run starts, written into its directory, compared on every later use.

A name such as `models/plain` or `gpt2` means one thing in one directory and another thing in the next, and what a Hub id means
changes with every commit. So `identity.json` says where the model is: an absolute path, or a Hub id with its commit. It also
has a hash of the weights. Every later use (resume, control, score, export, publish) takes the model from there, from whatever
directory the command is typed.

The hash of a single weight file is its SHA-256, as `sha256sum` and the Hub show it. A file is read once per command. Beside
the reading itself, which loading the model does too, a gigabyte takes 0.6 seconds on a processor with SHA instructions. The
files of a commit of the Hub do not change, so they are not read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from ln_removal.errors import UserError
from ln_removal.files.atomic import checksum, write_json_atomically
from ln_removal.files.hub import say_if_hidden
from ln_removal.files.run_directory import IDENTITY_FILE, has_trained
from ln_removal.models.loading import EMBEDDED_MODEL, model_directory, weight_files

Kind = Literal["model", "tokenizer"]
"""What a run is made from: a removal from a model, a pretraining from the tokenizer that its recipe names."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """One model, or one tokenizer.

    Attributes:
        name: as the user gave it; recipe.toml and the results have it.
        place: `tiny`, an absolute path, or a Hub id.
        commit: of the Hub; empty for the other two.
        weights_sha256: see `weights_sha256`; empty for a tokenizer, whose fingerprint is in the index of the tokens.
    """

    name: str
    place: str
    commit: str = ""
    weights_sha256: str = ""

    @property
    def reference(self) -> str:
        """What `loading.load_model` takes; it means the same in every directory and at any time."""
        return f"{self.place}@{self.commit}" if self.commit else self.place

    def is_same_place(self, other: Identity) -> bool:
        """Whether both are one folder, or one commit of one Hub repository."""
        return self.reference == other.reference


def locate(name: str, kind: Kind = "model") -> Identity:
    """What a name means here and now: a folder of this machine, else the newest commit of a Hub repository.

    Says so when a folder hides a Hub id. Of a Hub model only config.json is fetched.

    Raises:
        UserError: as `loading.load_config`.
    """
    if name == EMBEDDED_MODEL:
        return Identity(name, name)
    path = Path(name).expanduser()
    if path.is_dir():
        say_if_hidden(name, path, certain=False)
        return Identity(name, str(path.resolve()))
    directory = model_directory(name, config=kind == "model", tokenizer=kind == "tokenizer")
    return Identity(name, name.partition("@")[0], commit=directory.name)


def identity_for(name: str, run: Path, kind: Kind = "model", *, resume: bool) -> Identity | None:
    """The model of a run that begins or goes on; None for a run that an older version has trained.

    A run that goes on keeps what it was begun with, if `name` is the name that it was begun by, or another name of the same
    weights, such as that of the place where the model was moved to.

    Raises:
        UserError: there is no such model, or it is another one than that of a run that has been trained.
    """
    recorded = read_identity(run, kind) if resume else None
    if recorded is None:
        return None if resume and has_trained(run) else locate(name, kind)
    if name in (recorded.name, recorded.reference):
        _say_if_another(recorded, run)
        return recorded
    found = locate(name, kind)
    is_same = found.is_same_place(recorded)
    if not is_same and kind == "model":
        is_same = weights_sha256(found.reference) == recorded.weights_sha256
    if is_same:
        return replace(found, name=recorded.name, weights_sha256=recorded.weights_sha256)
    if has_trained(run) and kind == "model":  # another tokenizer changes the recipe, and it is compared with the tokens
        raise UserError(
            f"{run} was begun with another {kind} ({recorded.reference}) than {found.reference}; leave it out to go on with the "
            "run, or choose another --out"
        )
    return found


def record(identity: Identity, run: Path, kind: Kind = "model") -> Identity:
    """Compare the weights with those that the run was begun with, and write `identity.json` where it is new.

    Returns:
        The identity with its hash, and with the place where it is now.

    Raises:
        UserError: the model is no longer there, its weights are others, or the file cannot be written.
    """
    identity = in_place(identity, run)
    if kind == "model":
        check_weights(identity, run)
        identity = replace(identity, weights_sha256=identity.weights_sha256 or weights_sha256(identity.reference))
    if read_identity(run, kind) != identity:
        try:
            write_json_atomically(run / IDENTITY_FILE, {kind: asdict(identity)})
        except OSError as error:
            raise UserError(
                f"cannot write {run / IDENTITY_FILE}: {error.strerror or error}; choose another --out"
            ) from error
    return identity


def model_of_run(run: Path, name: str) -> str:
    """The model that a run was made from, as `loading.load_model` takes it, once its weights have been compared.

    Args:
        name: the model in the run's recipe, which counts where an older version has not written what it was.

    Raises:
        UserError: the model is no longer there, or has other weights.
    """
    recorded = read_identity(run)
    if recorded is None:
        return name
    found = in_place(recorded, run)
    check_weights(found, run)
    return found.reference


def read_identity(run: Path, kind: Kind = "model") -> Identity | None:
    """What a run was begun with; None if it does not say.

    Raises:
        UserError: the file is damaged.
    """
    path = run / IDENTITY_FILE
    try:
        written = json.loads(path.read_text(encoding="utf-8")).get(kind)
        found = None if written is None else Identity(**written)
        if found is not None and not all(isinstance(value, str) for value in asdict(found).values()):
            raise ValueError("a value is not text")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}, which says what the run was made from, is damaged ({error}); restore it, or delete it if the model that "
            "recipe.toml names is the right one"
        ) from error
    return found


def in_place(recorded: Identity, run: Path) -> Identity:
    """The identity with the place where the model is now: its own, or the one that its name means here, if the weights are the same.

    Raises:
        UserError: it is in neither.
    """
    if recorded.commit or recorded.place == EMBEDDED_MODEL or Path(recorded.place).is_dir():
        return recorded
    here = Path(recorded.name).expanduser()
    if here.is_dir() and (not recorded.weights_sha256 or _has_weights(here, recorded.weights_sha256)):
        return replace(recorded, place=str(here.resolve()))
    raise UserError(
        f"{recorded.place}, which {run} was made from, is not there any more; put it back, or say where it is now: "
        "--model DIR for ln-remove --resume, --original DIR for ln-evaluate"
    )


def check_weights(identity: Identity, run: Path) -> None:
    """Raises UserError where the weights in a folder are not those that `identity` was recorded with."""
    if identity.commit or not identity.weights_sha256:
        return
    found = weights_sha256(identity.reference)
    if found != identity.weights_sha256:
        raise UserError(
            f"the weights in {identity.place} are not those that {run} was made from (SHA-256 {found[:12]}, recorded was "
            f"{identity.weights_sha256[:12]}); put the old ones back, or choose another --out for a run of the new ones"
        )


def _has_weights(directory: Path, sha256: str) -> bool:
    try:
        return weights_sha256(str(directory.resolve())) == sha256
    except UserError:
        return False


def weights_sha256(name: str) -> str:
    """The SHA-256 of a model's weight file; of several, that of the lines `SHA-256 NAME` in the order of the names.

    Raises:
        UserError: as `loading.load_model`, for the files.
    """
    directory = model_directory(name, weights=True)
    files = [directory / file for file in weight_files(directory)]
    try:
        sums = [_checksum(file, status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]]
    except OSError as error:
        raise UserError(f"cannot read the weights in {directory}: {error}; copy or download them again") from error
    if len(sums) == 1:
        return sums[0]
    lines = "".join(f"{each}  {file.name}\n" for each, file in zip(sums, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


@cache
def _checksum(path: Path, size: int, modified: int) -> str:
    """Of one file, read once by a process as long as its size and its time of change stay the same."""
    return checksum(path)


def _say_if_another(recorded: Identity, run: Path) -> None:
    """Warn when the name that a run was begun by means another folder here."""
    here = Path(recorded.name).expanduser()
    is_another = here.is_dir() and str(here.resolve()) != recorded.place and here.resolve() != run.resolve()
    if is_another and recorded.place != EMBEDDED_MODEL:
        which = f"the Hub's {recorded.place}, commit {recorded.commit[:8]}" if recorded.commit else recorded.place
        logger.warning("the folder %s is not what %s was made from; it goes on with %s", here.resolve(), run, which)
