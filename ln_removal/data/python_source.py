"""The embedded corpus: the Python source found on this machine, the same kind of text as CodeParrot.

Two sources: `stdlib` (the running interpreter's standard library) and `site-packages` (what is installed beside this
package). The validation split is a set of standard-library modules chosen by a hash of their path, so the same modules
are held out on every machine and in every Python version, and no model of this project is ever trained on them.

Held out means more than the path: a training file that shares half of its long lines with held-out modules (a vendored
or back-ported copy) is dropped too.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ln_removal.data.corpora import Document, Split
from ln_removal.errors import UserError

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
