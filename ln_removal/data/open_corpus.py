"""Open a corpus by its name, or only its held-out text: the Python source of this machine, a data set of the Hub, local files, a
model's own text.

The Python source is the embedded corpus, the same kind of text as CodeParrot. It has two sources: `stdlib` (the running
interpreter's standard library) and `site-packages` (what is installed beside this package). The validation split is a set of
standard-library modules chosen by a hash of their path, so the same modules are held out on every machine and in every Python
version, and no model of this project is ever trained on them. A training file that shares half of its long lines with
held-out modules (a vendored or back-ported copy) is dropped too.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.data.corpora import GENERATED, SOURCE, Corpus, Document, LocalFiles, Remarking, Split, TokenDocument
from ln_removal.data.hub_corpora import KNOWN_CORPORA, HubCorpus, hub_source
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ln_removal.data.tokens import TokenDataset

HELD_OUT_ONE_IN = 8
"""One standard-library module in this many is held out."""

MAXIMUM_FILE_BYTES = 512 * 1024
LONG_LINE = 32
"""Characters from which a line is specific enough to count as evidence of copying."""

COPY_SHARE = 0.5

# Not code that anyone wrote as code: character tables, documentation dumps, build variables, parser fixtures.
TABLES = ("encodings/", "pydoc_data/", "lib2to3/tests/data/", "test/encoded_modules/", "_sysconfigdata")

# Tests and end-user programs are trained on but never held out: some distributions do not ship them, and the validation
# set should be the same text everywhere.
NEVER_HELD_OUT = ("test/", "idlelib/", "lib2to3/", "turtledemo/", "ensurepip/", "config-", "__phello__")

BYTES_A_TOKEN = 8
"""More than a token of text usually has: reading stops once the bytes are certain to give enough tokens."""


@dataclass(frozen=True)
class _SourceFile:
    path: Path
    name: str
    source: str
    split: Split


def is_held_out(module_path: str) -> bool:
    """Whether a standard-library file is in the validation split.

    Args:
        module_path: path below the standard library with forward slashes, such as `json/decoder.py`.
    """
    if module_path.startswith(NEVER_HELD_OUT) or "/test/" in module_path or "/tests/" in module_path:
        return False
    return int.from_bytes(_digest(module_path)[:8], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Writer:
    """Who writes the corpus `generated`, how many training tokens of it, and where; see `generated.GeneratedText`."""

    model: str
    max_tokens: int | None
    device: str = "auto"


class PythonSource:
    """The `python-source` corpus.

    Args:
        stdlib: the standard library's directory; default: the running interpreter's.
        site_packages: directories with installed packages; default: the running environment's.
        max_bytes: stop after about this many bytes of training text (UTF-8); the validation split is always whole.

    Files come in the order of a hash of their path, so any prefix is a fair sample of the whole; held-out modules come
    first.
    """

    name = "python-source"

    def __init__(
        self,
        *,
        stdlib: Path | None = None,
        site_packages: list[Path] | None = None,
        max_bytes: int | None = None,
    ) -> None:
        paths = sysconfig.get_paths()
        self.stdlib = (stdlib or Path(paths["stdlib"])).resolve()
        if site_packages is None:
            site_packages = [Path(paths["purelib"]), Path(paths["platlib"])]
        self.site_packages = list(dict.fromkeys(path.resolve() for path in site_packages))
        self.max_bytes = max_bytes
        if not self.stdlib.is_dir():
            raise UserError(
                f"python-source: the standard library is not at {self.stdlib}; give its directory, or prepare another "
                "corpus (ln-prepare --help lists them)"
            )

    def identity(self) -> dict[str, object]:
        return {
            "name": self.name,
            "python": platform.python_version(),
            "max_bytes": self.max_bytes,
            "held_out_one_in": HELD_OUT_ONE_IN,
        }

    def held_out_modules(self) -> list[tuple[str, str]]:
        """The validation split as (path below the standard library, source text), in the order of the path."""
        held_out = [file for file in self._files() if file.split == "validation"]
        modules = [(file.name, text) for file in held_out if (text := _read(file.path))]
        return sorted(modules)

    def documents(self, skip: int = 0) -> Iterator[Document]:
        files = self._files()
        held_out = [file for file in files if file.split == "validation"]
        fingerprints: set[int] = set()
        count = 0
        for file in held_out:
            text = _read(file.path)
            if text is None:
                continue
            fingerprints.update(_long_lines(text))
            if count >= skip:
                yield Document(text, "validation", file.source)
            count += 1
        if count == 0:
            raise UserError(
                f"python-source: no module of the standard library at {self.stdlib} is readable Python source; install "
                "Python with its sources, or prepare a local directory instead (ln-prepare PATH)"
            )
        written = 0
        for file in files:
            if file.split != "train":
                continue
            if self.max_bytes is not None and written >= self.max_bytes:
                return
            text = _read(file.path)
            if text is None or _is_copy(text, fingerprints):
                continue
            written += len(text.encode())
            if count >= skip:
                yield Document(text, "train", file.source)
            count += 1

    def _files(self) -> list[_SourceFile]:
        files: list[_SourceFile] = []
        for path in self.stdlib.rglob("*.py"):
            name = path.relative_to(self.stdlib).as_posix()
            if "site-packages/" in name or "dist-packages/" in name or name.startswith(TABLES):
                continue
            files.append(_SourceFile(path, name, "stdlib", "validation" if is_held_out(name) else "train"))
        for root in self.site_packages:
            for path in root.rglob("*.py"):
                files.append(_SourceFile(path, path.relative_to(root).as_posix(), "site-packages", "train"))
        return sorted(files, key=lambda file: _digest(f"{file.source}/{file.name}"))


def held_out_modules() -> list[tuple[str, str]]:
    """This machine's held-out modules: (path below the standard library, source text)."""
    return PythonSource(site_packages=[]).held_out_modules()


def _digest(path: str) -> bytes:
    # A file name may hold bytes that are not UTF-8; Python carries them as surrogates.
    return hashlib.sha256(path.encode(errors="surrogateescape")).digest()


def _read(path: Path) -> str | None:
    """The text of a source file, or None when it is empty, too large, not UTF-8 or gone."""
    try:
        if not 0 < path.stat().st_size <= MAXIMUM_FILE_BYTES:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if text.strip() else None


def _long_lines(text: str) -> list[int]:
    return [hash(line) for raw in text.splitlines() if len(line := raw.strip()) >= LONG_LINE]


def _is_copy(text: str, fingerprints: set[int]) -> bool:
    lines = _long_lines(text)
    return len(lines) >= 4 and sum(line in fingerprints for line in lines) >= COPY_SHARE * len(lines)


def known_corpora() -> dict[str, str]:
    """Every corpus that has a name, with one line about it."""
    python = {PythonSource.name: "the Python source of this machine: standard library and installed packages"}
    generated = {GENERATED: "what the model of --tokenizer writes itself, for models whose training text nobody has"}
    return python | {name: source.summary for name, source in KNOWN_CORPORA.items()} | generated


def open_corpus(name_or_path: str | Path, *, writer: Writer | None = None, **options: Any) -> Corpus:
    """The corpus of that name, the Hub data set `hub:OWNER/NAME[:CONFIG]`, or the file or directory of that path.

    Args:
        name_or_path: a name wins over a path; write `./NAME` for a directory that has the name of a corpus.
        writer: the model that writes the corpus `generated`; other corpora leave it alone.
        options: what the corpus takes: `max_bytes` for text that is there; `field` for files and the Hub; `validation_fraction`
            where a hash decides which documents are held out. An option that is None counts as not given.

    Returns:
        The corpus. Nothing has been read yet, and the Hub has not been asked.

    Raises:
        UserError: when there is no such corpus, or it does not take an option.
    """
    name_or_path = str(name_or_path)
    factory: Callable[..., Corpus]
    if name_or_path == PythonSource.name:
        factory = PythonSource
    elif name_or_path == GENERATED:
        factory = _generated(writer)
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
    if "validation_fraction" in given and "validation_fraction" not in accepted:
        raise UserError(
            f"{name_or_path} has a validation split of its own, the same on every machine; leave out --validation-share "
            "(data.validation_share in a recipe)"
        )
    if unknown := [key for key in given if key not in accepted]:
        keys = ", ".join(key for key, parameter in accepted.items() if parameter.kind is parameter.KEYWORD_ONLY)
        raise UserError(f"{name_or_path} does not take the option {unknown[0]}; it takes {keys}")
    return factory(**given)


def _generated(writer: Writer | None) -> Callable[..., Corpus]:
    if writer is None:
        raise UserError(
            f"the corpus {GENERATED} is what a model writes, and here is none to write it; prepare it first with "
            f"`ln-prepare {GENERATED} --tokenizer MODEL --max-tokens N` and use its tokens"
        )
    from ln_removal.data.generated import GeneratedText

    return partial(GeneratedText, writer.model, max_tokens=writer.max_tokens, device=writer.device)


def _is_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "/" in text or "\\" in text or Path(text).expanduser().exists()


class HeldOutText:
    """The validation documents of a corpus, up to a limit. Of local files every document counts as held out.

    A prepared corpus has to have a training split. Nothing reads it here, so it holds one empty document.

    Args:
        corpus: what to take them from.
        max_tokens: stop once there is text for about this many tokens; None reads all of it.
    """

    def __init__(self, corpus: Corpus, max_tokens: int | None = None) -> None:
        self.corpus = _WholeFiles.like(corpus) if isinstance(corpus, LocalFiles) else corpus
        self.name = corpus.name
        self.max_tokens = max_tokens

    def identity(self) -> dict[str, object]:
        return {**self.corpus.identity(), "held_out_tokens": self.max_tokens}

    def documents(self, skip: int = 0) -> Iterator[Document | TokenDocument]:
        yielded = size = 0
        for document in self._all():
            if yielded == 0 and skip == 0:
                yield Document("", "train", document.source)
            if yielded + 1 >= skip:
                yield document
            yielded += 1
            size += (
                len(document.text.encode()) if isinstance(document, Document) else BYTES_A_TOKEN * len(document.tokens)
            )
            if self.max_tokens is not None and size >= BYTES_A_TOKEN * self.max_tokens:
                return
        if not yielded:
            raise UserError(
                f"{self.name} holds no text to evaluate on; name a file or directory with text, or a corpus"
            )

    def remarks(self) -> list[str]:
        return self.corpus.remarks() if isinstance(self.corpus, Remarking) else []

    def _all(self) -> Iterator[Document | TokenDocument]:
        if isinstance(self.corpus, LocalFiles):
            yield from self.corpus.documents()
            return
        comes_first = False  # the held-out part, as a whole: nothing after it is worth downloading
        for number, document in enumerate(self.corpus.documents()):
            if document.split == "validation":
                # Where a hash decides, the first document is for training (`hash_split`).
                comes_first |= (
                    number == 0 and isinstance(self.corpus, HubCorpus) and not self.corpus.source.nanogpt_split
                )
                yield document
            elif comes_first:
                return


class _WholeFiles(LocalFiles):
    """Local files without a training split."""

    @classmethod
    def like(cls, files: LocalFiles) -> _WholeFiles:
        return cls(
            files.path, field=files.field, validation_fraction=files.validation_fraction, max_bytes=files.max_bytes
        )

    def documents(self, skip: int = 0) -> Iterator[Document]:
        for number, (_, text) in enumerate(self._texts()):
            if number >= skip:
                yield Document(text, "validation", SOURCE)


def held_out_tokens(
    name: str, tokenizer: PreTrainedTokenizerFast, directory: Path, *, tokenizer_name: str, max_tokens: int | None
) -> TokenDataset:
    """Prepare the held-out text of a corpus, or the files of a path, for evaluation.

    Args:
        name: as `ln-prepare` takes it: a corpus, hub:OWNER/NAME, a file or a directory.
        tokenizer: of the models that will read it. tokenizer_name: its name in error messages.
        directory: where the tokens go.
        max_tokens: text for about so many tokens; None takes all that is held out.

    Raises:
        UserError: there is no such corpus, it is out of reach, or it holds no text to evaluate on.
    """
    from ln_removal.data.prepare import prepare
    from ln_removal.models.loading import tokenizer_fingerprint

    return prepare(
        HeldOutText(open_corpus(name), max_tokens),
        tokenizer,
        directory,
        tokenizer_name=tokenizer_name,
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
    )
