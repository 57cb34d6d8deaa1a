"""The embedded corpus: which modules are held out, that no copy of them is trained on, and that the order is fixed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ln_removal.data import open_corpus
from ln_removal.data.corpora import Corpus, Document
from ln_removal.data.open_corpus import PythonSource, held_out_modules, is_held_out
from ln_removal.errors import UserError

# A model trained under this rule is scored on these modules: the rule may never change.
HELD_OUT = ("ast.py", "base64.py", "copy.py", "random.py", "textwrap.py", "asyncio/threads.py", "json/scanner.py")
TRAINED_ON = ("os.py", "argparse.py", "typing.py", "heapq.py", "json/decoder.py", "asyncio/events.py")


def code(name: str, lines: int = 12) -> str:
    """Source with `lines` long lines that no other name gives."""
    return "".join(
        f"def {name}_{n}(first_argument, second_argument): return first_argument + {n}\n" for n in range(lines)
    )


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    names = [*HELD_OUT, *TRAINED_ON]
    return write(tmp_path / "lib", {name: code(name.replace("/", "_").removesuffix(".py")) for name in names})


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    return write(tmp_path / "site-packages", {f"package/part{n}.py": code(f"part{n}") for n in range(8)})


def corpus(stdlib: Path, *packages: Path, max_bytes: int | None = None) -> PythonSource:
    return PythonSource(stdlib=stdlib, site_packages=list(packages), max_bytes=max_bytes)


def texts(documents: list[Document], split: str) -> set[str]:
    return {document.text for document in documents if document.split == split}


@pytest.mark.parametrize("path", HELD_OUT)
def test_these_are_held_out(path: str) -> None:
    assert is_held_out(path)


@pytest.mark.parametrize("path", TRAINED_ON)
def test_these_are_not(path: str) -> None:
    assert not is_held_out(path)


@given(st.from_regex(r"[a-z_]{1,12}(/[a-z_]{1,12}){0,2}\.py", fullmatch=True))
def test_tests_and_programs_are_never_held_out(path: str) -> None:
    for prefix in ("test/", "idlelib/", "lib2to3/", "turtledemo/", "ensurepip/", "unittest/test/", "ctypes/tests/"):
        assert not is_held_out(prefix + path)


def test_one_module_in_eight_is_held_out() -> None:
    share = sum(is_held_out(f"package/module_{n}.py") for n in range(8000)) / 8000
    assert 0.11 < share < 0.14


def test_splits_and_sources(stdlib: Path, packages: Path) -> None:
    documents = list(corpus(stdlib, packages).documents())
    assert texts(documents, "validation") == {(stdlib / name).read_text() for name in HELD_OUT}
    assert texts(documents, "train") == {
        *((stdlib / name).read_text() for name in TRAINED_ON),
        *(path.read_text() for path in packages.rglob("*.py")),
    }
    for document in documents:
        assert document.source == ("site-packages" if "part" in document.text else "stdlib")
    splits = [document.split for document in documents]
    assert splits == sorted(splits, reverse=True), "the held-out modules come first"
    assert isinstance(corpus(stdlib), Corpus)


def test_held_out_modules_by_name(stdlib: Path, packages: Path) -> None:
    modules = corpus(stdlib, packages).held_out_modules()
    assert modules == [(name, (stdlib / name).read_text()) for name in sorted(HELD_OUT)]


def test_packages_inside_the_library_directory_are_not_the_library(stdlib: Path) -> None:
    write(stdlib, {"site-packages/ast.py": code("other"), "dist-packages/copy.py": code("more")})
    assert len(list(corpus(stdlib).documents())) == len(HELD_OUT) + len(TRAINED_ON)
    assert len(list(corpus(stdlib, stdlib / "site-packages").documents())) == len(HELD_OUT) + len(TRAINED_ON) + 1


def test_copies_of_held_out_modules_are_not_trained_on(stdlib: Path, packages: Path) -> None:
    original = (stdlib / "ast.py").read_text()
    changed = original.replace("    ", "\t") + code("addition", 6)
    indented = "\n".join(f"    {line}" for line in original.splitlines())
    partly = "".join(original.splitlines(keepends=True)[:4]) + code("mostly_new", 8)
    short = "x = 1\n"
    write(
        packages,
        {
            "vendored/ast.py": original,
            "backport/changed.py": changed,
            "backport/indented.py": f"if True:\n{indented}\n",
            "fair/partly.py": partly,
            "fair/short.py": short,
        },
    )
    write(stdlib, {"test/copy_of_ast.py": original})
    documents = list(corpus(stdlib, packages).documents())
    trained = texts(documents, "train")
    assert original not in trained
    assert changed not in trained
    assert not any(text.startswith("if True:") for text in trained)
    assert {partly, short} <= trained, "a third in common is no copy"
    assert original in texts(documents, "validation")


def test_what_is_not_source_is_left_out(stdlib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_corpus, "MAXIMUM_FILE_BYTES", 4000)
    before = list(corpus(stdlib).documents())
    write(
        stdlib,
        {
            "empty.py": "",
            "blank.py": " \n\n",
            "latin.py": b"# caf\xe9\n",
            "large.py": "x = 1\n" * 1000,
            "notes.txt": code("notes"),
            "encodings/cp1252.py": code("table"),
            "pydoc_data/topics.py": code("topics"),
            "_sysconfigdata__linux.py": code("build"),
        },
    )
    (stdlib / "gone.py").symlink_to(stdlib / "nowhere.py")
    (stdlib / "folder.py").mkdir()
    assert list(corpus(stdlib).documents()) == before


def test_a_file_name_that_is_not_utf8(stdlib: Path, packages: Path) -> None:
    odd = os.fsencode(packages) + b"/caf\xe9.py"
    try:
        with open(odd, "w", encoding="utf-8") as file:
            file.write(code("odd"))
    except OSError:
        pytest.skip("this file system has no such names")
    assert code("odd") in texts(list(corpus(stdlib, packages).documents()), "train")


def test_the_order_is_that_of_a_hash(stdlib: Path, packages: Path, tmp_path: Path) -> None:
    first = list(corpus(stdlib, packages).documents())
    assert list(corpus(stdlib, packages).documents()) == first
    # The same files, created in another order and elsewhere, in a process that hashes strings differently.
    moved = tmp_path / "elsewhere"
    for root in (packages, stdlib):
        for path in sorted(root.rglob("*.py"), reverse=True):
            write(moved, {f"{root.name}/{path.relative_to(root)}": path.read_text()})
    script = (
        "import sys; from pathlib import Path; from ln_removal.data.open_corpus import PythonSource; "
        "found = PythonSource(stdlib=Path(sys.argv[1]), site_packages=[Path(sys.argv[2])]).documents(); "
        "print([document.text.split('(')[0] for document in found])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script, str(moved / "lib"), str(moved / "site-packages")],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.strip() == str([document.text.split("(")[0] for document in first])
    train = [document for document in first if document.split == "train"]
    assert sorted(train, key=lambda document: document.text) != train


def test_skip_continues_where_it_stopped(stdlib: Path, packages: Path) -> None:
    write(packages, {"vendored/ast.py": (stdlib / "ast.py").read_text(), "empty.py": ""})
    whole = list(corpus(stdlib, packages).documents())
    for skip in range(len(whole) + 2):
        assert list(corpus(stdlib, packages).documents(skip=skip)) == whole[skip:]
    limited = list(corpus(stdlib, packages, max_bytes=3000).documents())
    assert list(corpus(stdlib, packages, max_bytes=3000).documents(skip=9)) == limited[9:]


def test_max_bytes_limits_the_training_text_only(stdlib: Path, packages: Path) -> None:
    whole = list(corpus(stdlib, packages).documents())
    limited = list(corpus(stdlib, packages, max_bytes=3000).documents())
    assert limited == whole[: len(limited)]
    assert texts(limited, "validation") == texts(whole, "validation")
    sizes = [len(document.text.encode()) for document in limited if document.split == "train"]
    assert sum(sizes) >= 3000 > sum(sizes[:-1])


def test_directories_named_twice_count_once(stdlib: Path, packages: Path) -> None:
    assert list(corpus(stdlib, packages, packages / ".." / packages.name).documents()) == list(
        corpus(stdlib, packages).documents()
    )


def test_identity_tells_what_decides_the_content(stdlib: Path) -> None:
    identity = corpus(stdlib, max_bytes=5).identity()
    assert identity["name"] == "python-source" and identity["max_bytes"] == 5
    assert identity != corpus(stdlib).identity()


def test_no_library(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        PythonSource(stdlib=tmp_path / "nowhere")
    write(tmp_path / "lib", {"readme.txt": "no source"})
    with pytest.raises(UserError, match="ln-prepare PATH"):
        list(corpus(tmp_path / "lib").documents())


def test_this_machines_library_has_enough_to_hold_out() -> None:
    modules = held_out_modules()
    assert len(modules) >= 20
    names = [name for name, _ in modules]
    assert names == sorted(set(names))
    assert all(is_held_out(name) and source.strip() for name, source in modules)
    assert {"ast.py", "copy.py", "random.py", "textwrap.py"} <= set(names)
    assert sum(len(source) for _, source in modules) > 500_000
