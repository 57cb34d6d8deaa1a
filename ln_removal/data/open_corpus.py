"""From what the user typed to a corpus."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ln_removal.data.corpora import Corpus
from ln_removal.data.hub_corpora import KNOWN_CORPORA, HubCorpus, hub_source
from ln_removal.data.local_files import LocalFiles
from ln_removal.data.python_source import PythonSource
from ln_removal.errors import UserError


def known_corpora() -> dict[str, str]:
    """Every corpus that has a name, with one line about it."""
    python = {PythonSource.name: "the Python source of this machine: standard library and installed packages"}
    return python | {name: source.summary for name, source in KNOWN_CORPORA.items()}


def open_corpus(name_or_path: str, **options: Any) -> Corpus:
    """The corpus of that name, the Hub data set `hub:OWNER/NAME[:CONFIG]`, or the file or directory of that path.

    Args:
        name_or_path: a name wins over a path; write `./NAME` for a directory that has the name of a corpus.
        options: what the corpus takes: `max_bytes` always; `field` and `validation_fraction` for files and the Hub. An
            option that is None counts as not given.

    Returns:
        The corpus. Nothing has been read yet, and the Hub has not been asked.

    Raises:
        UserError: when there is no such corpus, or it does not take an option.
    """
    factory: Callable[..., Corpus]
    if name_or_path == PythonSource.name:
        factory = PythonSource
    elif name_or_path in KNOWN_CORPORA:
        factory = partial(HubCorpus, KNOWN_CORPORA[name_or_path])
    elif name_or_path.startswith("hub:"):
        factory = partial(HubCorpus, hub_source(name_or_path))
    elif _is_path(name_or_path):
        factory = partial(LocalFiles, name_or_path)
    else:
        names = list(known_corpora())
        close = difflib.get_close_matches(name_or_path.lower(), names, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]}?" if close else ";"
        raise UserError(
            f"no corpus or file {name_or_path!r}{hint} known: {', '.join(names)}, hub:OWNER/NAME[:CONFIG], or the path "
            "of a file or directory"
        )
    given = {key: value for key, value in options.items() if value is not None}
    accepted = inspect.signature(factory).parameters
    if unknown := [key for key in given if key not in accepted]:
        keys = ", ".join(key for key, parameter in accepted.items() if parameter.kind is parameter.KEYWORD_ONLY)
        raise UserError(f"{name_or_path} does not take the option {unknown[0]}; it takes {keys}")
    return factory(**given)


def _is_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "/" in text or "\\" in text or Path(text).expanduser().exists()
