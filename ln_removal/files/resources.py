"""Where the files that travel with the package lie, in a wheel and in a source checkout, and its version."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from ln_removal.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]

_CHECKOUT = _PACKAGE.parent


def package_version() -> str:
    """The installed version; "0+unknown" in a source tree that is not installed."""
    try:
        return metadata.version("ln-removal")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def recipes_directory() -> Path:
    """The folder of the built-in recipes (`*.toml`).

    Raises:
        UserError: the installation lacks them.
    """
    return _first_existing("built-in recipes", _PACKAGE / "_recipes", _CHECKOUT / "recipes", marker="tiny.toml")


def embedded_model_directory() -> Path:
    """The folder of the embedded base model, `--model tiny`: config, tokenizer and safetensors.

    Raises:
        UserError: the installation lacks it.
    """
    return _first_existing(
        "embedded model tiny-gpt2",
        _PACKAGE / "_checkpoints" / "tiny-gpt2",
        _CHECKOUT / "checkpoints" / "tiny-gpt2",
        marker="config.json",
    )


def _first_existing(what: str, in_wheel: Path, in_checkout: Path, *, marker: str) -> Path:
    """The wheel's folder if it holds the marker file, else the checkout's; both are tried in that order."""
    for folder in (in_wheel, in_checkout):
        if (folder / marker).is_file():
            return folder
    raise UserError(
        f"this installation lacks the {what}: no {marker} in {in_wheel} or {in_checkout}; "
        "install ln-removal again, or run it from a complete checkout"
    )
