"""The README and its neighbours say what is true: commands parse, recipes and files are as listed, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ln_removal.config.recipe import available_recipes, load_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "checkpoints/README.md"]
DOCUMENTS += [f"docs/{name}.md" for name in ("design", "method", "LOG", "normfree", "reliability", "performance")]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands() -> list[list[str]]:
    return [words for words in shell_lines() if words[0] in SCRIPTS]


def app_of(script: str) -> typer.Typer:
    app = importlib.import_module(SCRIPTS[script].partition(":")[0]).app
    assert isinstance(app, typer.Typer)
    return app


def subcommands_of(script: str) -> dict[str, typer.core.TyperCommand]:
    return getattr(typer.main.get_command(app_of(script)), "commands", {})


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_in_the_readme_is_accepted(words: list[str]) -> None:
    name, *arguments = words
    command = typer.main.get_command(app_of(name))
    context = command.make_context(name, arguments)  # parses and checks choices, runs nothing
    if subcommands := subcommands_of(name):
        subcommands[arguments[0]].make_context(arguments[0], arguments[1:], parent=context)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_is_shown_in_the_readme_and_in_its_help(script: str) -> None:
    assert f"### {script}\n" in README
    assert any(words[0] == script for words in commands())
    shown = CliRunner().invoke(app_of(script), ["--help"], terminal_width=200)
    assert shown.exit_code == 0
    assert re.search(rf"Examples?:\n\s+{script} ", shown.output)
    helps = [
        CliRunner().invoke(app_of(script), [name, "--help"], terminal_width=200) for name in subcommands_of(script)
    ]
    known = {option for one in (shown, *helps) for option in re.findall(r"--[a-z][a-z-]+", one.output)}
    used = {word for words in commands() if words[0] == script for word in words if word.startswith("--")}
    assert used <= known


def test_options_named_in_prose_exist() -> None:
    known = set()
    for script in SCRIPTS:
        for command in (typer.main.get_command(app_of(script)), *subcommands_of(script).values()):
            known.update(option for parameter in command.params for option in parameter.opts)
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`(--[a-z][a-z-]+)", prose))
    assert "--set" in named
    assert named <= known | {"--help"}


def test_recipes_named_in_commands_exist() -> None:
    named = [words[at + 1] for words in commands() for at, word in enumerate(words) if word == "--recipe"]
    assert named
    assert {name for name in named if not name.endswith(".toml")} <= set(available_recipes())


def test_recipe_table_agrees_with_the_recipes() -> None:
    rows = re.findall(r"^\| `([\w/-]+)` \| ([^|]+) \| (\d+(?:\.\d+)?)M \| ([\d,]+) \|", README, flags=re.MULTILINE)
    assert sorted(name for name, *_ in rows) == available_recipes()
    for name, model, millions, steps in rows:
        recipe = load_recipe(name)
        assert int(steps.replace(",", "")) == recipe.training.steps, name
        decimals = len(millions.partition(".")[2])
        assert millions == f"{recipe.tokens / 1e6:.{decimals}f}", name
        if recipe.schedule is not None:
            assert model.removeprefix("embedded ").removesuffix("-gpt2") == recipe.model, name


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document: str) -> None:
    path = ROOT / document
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{document} links to {target}"


def test_tree_shows_every_file() -> None:
    shown, leaves = tree()
    for entry in shown:
        assert (ROOT / entry).exists(), f"the tree shows {entry}, which is not there"
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    tops = {entry.split("/")[0] for entry in shown}
    for name in listed.stdout.splitlines():
        is_ours = name.split("/")[0] in tops and (ROOT / name).exists()
        is_listed = name in shown or any(name.startswith(leaf) for leaf in leaves)
        if is_ours and not is_listed and Path(name).name != "__init__.py":
            pytest.fail(f"{name} is missing from the README's tree")


def test_tree_has_a_line_on_every_module() -> None:
    (block,) = re.findall(r"<!-- tree -->\n```\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines():
        assert re.search(r"\S {2,}\S", line.strip()) or line.strip() in ("notebooks/", "docs/"), line


def tree() -> tuple[set[str], list[str]]:
    """Paths in the README's tree, and those of its directories below which nothing is shown."""
    (block,) = re.findall(r"<!-- tree -->\n```\n(.*?)```", README, flags=re.DOTALL)
    shown: list[str] = []
    parents: list[str] = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        shown.append("".join(parents[: depth + 1]))
    leaves = [path for path in shown if path.endswith("/") and not any(p != path and p.startswith(path) for p in shown)]
    return set(shown), leaves


def test_python_blocks_are_python() -> None:
    found = blocks("python")
    assert len(found) >= 4
    for block in found:
        compile(block, "README.md", "exec")


def test_the_parts_work_as_shown() -> None:
    (block,) = [block for block in blocks("python") if "ln_removal.install(" in block]
    names: dict[str, object] = {}
    exec(block, names)
    tokens, report = names["tokens"], names["report"]
    assert report.max_relative_error < 1e-4  # type: ignore[attr-defined]
    folded = names["folded"](tokens).logits  # type: ignore[operator]
    stock = names["stock"](tokens).logits  # type: ignore[operator]
    assert (folded - stock).abs().max() < 1e-4 * folded.abs().max()
