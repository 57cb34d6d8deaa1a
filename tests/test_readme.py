"""The README and the docs agree with the code: commands parse, recipes, files and rooms are as listed, links lead somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from command_line import environment, fork_code
from finished_run import make_run
from typer.testing import CliRunner

from ln_removal.config.recipe import available_recipes, load_recipe

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS: dict[str, str] = PROJECT["project"]["scripts"]
NAMES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "checkpoints/README.md", "benchmarks/README.md"]
NAMES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README, DESIGN, COMMANDS = (DOCUMENTS[name] for name in ("README.md", "docs/design.md", "docs/commands.md"))
SHOWING = ("README.md", "docs/commands.md", "docs/python.md", "docs/normfree.md")
"""The documents whose code blocks are meant to be typed."""
HISTORY = ("CHANGELOG.md", "docs/LOG.md")
"""They also name files that are gone."""


def blocks(language: str, *documents: str) -> list[str]:
    text = "\n".join(DOCUMENTS[name] for name in documents or SHOWING)
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(*documents: str) -> list[list[str]]:
    lines = [line for block in blocks("sh", *documents) for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] in SCRIPTS]


def prose(name: str) -> str:
    return re.sub(r"^```.*?^```", "", DOCUMENTS[name], flags=re.MULTILINE | re.DOTALL)


def app_of(script: str) -> typer.Typer:
    app = importlib.import_module(SCRIPTS[script].partition(":")[0]).app
    assert isinstance(app, typer.Typer)
    return app


def subcommands_of(script: str) -> dict[str, typer.core.TyperCommand]:
    return getattr(typer.main.get_command(app_of(script)), "commands", {})


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("words", {" ".join(words): words for words in commands()}.values(), ids=" ".join)
def test_every_command_shown_is_accepted(words: list[str]) -> None:
    name, *arguments = words
    command = typer.main.get_command(app_of(name))
    context = command.make_context(name, arguments)  # parses and checks choices, runs nothing
    if subcommands := subcommands_of(name):
        subcommands[arguments[0]].make_context(arguments[0], arguments[1:], parent=context)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_is_shown_and_explained(script: str) -> None:
    assert f"\n| `{script}` |" in README
    assert f"\n### {script}\n" in COMMANDS
    for document in ("README.md", "docs/commands.md"):
        assert any(words[0] == script for words in commands(document)), document
    assert CliRunner().invoke(app_of(script), ["--help"]).exit_code == 0


def test_options_named_in_prose_exist() -> None:
    known = {"--help"}
    for script in SCRIPTS:
        for command in (typer.main.get_command(app_of(script)), *subcommands_of(script).values()):
            known.update(option for parameter in command.params for option in parameter.opts)
    for name in DOCUMENTS:
        named = set(re.findall(r"`(--[a-z][a-z-]+)", prose(name)))
        assert named <= known, name


def test_recipes_named_in_commands_exist() -> None:
    named = [words[at + 1] for words in commands() for at, word in enumerate(words) if word == "--recipe"]
    assert named
    assert {name for name in named if not name.endswith(".toml")} <= set(available_recipes())


def test_recipe_table_agrees_with_the_recipes() -> None:
    rows = re.findall(r"^\| `([\w/-]+)` \| ([^|]+) \| (\d+(?:\.\d+)?)M \| ([\d,]+) \|", COMMANDS, flags=re.MULTILINE)
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
    named = {
        target for text in DOCUMENTS.values() for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)
    }
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)\s]+)\)", prose(document)) + re.findall(r'<img src="([^"]+)"', prose(document))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), f"{document} links to {link}"
        if anchor:
            assert anchor in anchors(file), f"{document} links to {link}"


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a file."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name not in HISTORY])
def test_cited_source_files_exist(document: str) -> None:
    for cited in re.findall(r"`([\w./-]+/[\w-]+\.(?:py|sh|toml))`", DOCUMENTS[document]):
        assert any((place / cited).is_file() for place in (ROOT, ROOT / "ln_removal")), f"{document} cites {cited}"


def test_rooms_are_those_of_the_import_contract() -> None:
    (contract,) = [each for each in PROJECT["tool"]["importlinter"]["contracts"] if each["type"] == "layers"]
    rooms = {room.strip() for layer in contract["layers"] for room in layer.split("|")} - {"errors"}
    shown = set(re.findall(r"^  ([a-z]+)/ {2,}\S", DESIGN, flags=re.MULTILINE))
    assert rooms <= shown
    (table,) = re.findall(r"\n## Where to change what\n(.*?)\n## ", DESIGN, flags=re.DOTALL)
    rows = re.findall(r"^\| [a-z ]+ \| `(\w+)/` \| (.+) \|$", table, flags=re.MULTILINE)
    assert len(rows) == 5
    for room, start in rows:
        for module in re.findall(r"`(\w+\.py)`", start):
            assert (ROOT / "ln_removal" / room / module).is_file(), f"{room}/{module}"


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
            pytest.fail(f"{name} is missing from the tree in docs/design.md")


def tree() -> tuple[set[str], list[str]]:
    """Paths in the tree of docs/design.md, and those of its directories below which nothing is shown."""
    (block,) = re.findall(r"<!-- tree -->\n```\n(.*?)```", DESIGN, flags=re.DOTALL)
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
        compile(block, "documentation", "exec")


def test_the_parts_work_as_shown() -> None:
    (block,) = [block for block in blocks("python") if "ln_removal.install(" in block]
    names: dict[str, object] = {}
    exec(block, names)
    tokens, report = names["tokens"], names["report"]
    assert report.max_relative_error < 1e-4  # type: ignore[attr-defined]
    folded = names["folded"](tokens).logits  # type: ignore[operator]
    stock = names["stock"](tokens).logits  # type: ignore[operator]
    assert (folded - stock).abs().max() < 1e-4 * folded.abs().max()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the run that the README names, without its training."""
    directory = tmp_path_factory.mktemp("a place")
    (directory / "checkpoints").mkdir()
    make_run(directory / "checkpoints" / "gpt2")
    return directory


def fresh(place: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in `place`, in a process that has imported nothing of ours."""
    return fork_code(code, cwd=place, environment=environment())


SHOWN_MODELS = [block for block in blocks("python", "README.md") if '"checkpoints/gpt2/model"' in block]


@pytest.mark.slow
@pytest.mark.parametrize("block", SHOWN_MODELS, ids=lambda block: re.findall(r"from (\w+)", block)[0])
def test_models_load_in_a_fresh_process_as_shown(place: Path, block: str) -> None:
    if "nnsight" in block:
        pytest.importorskip("nnsight")
    ended = fresh(place, block)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_the_harness_loads_the_model_that_the_readme_names(place: Path) -> None:
    """lm_eval is an extra. Where it is missing, its first step is made: to load the model in a process without ln_removal."""
    (line,) = [line for line in "".join(blocks("sh", "README.md")).splitlines() if line.startswith("lm_eval ")]
    words = shlex.split(line)
    assert words[words.index("--model") + 1] == "hf"
    arguments = dict(part.split("=") for part in words[words.index("--model_args") + 1].split(","))
    given = {"trust_remote_code": arguments.get("trust_remote_code") == "True"}
    code = f"""
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
name, given = {arguments["pretrained"]!r}, {given!r}
AutoConfig.from_pretrained(name, **given)
ids = AutoTokenizer.from_pretrained(name, **given)("def f(x):", return_tensors="pt").input_ids
print(AutoModelForCausalLM.from_pretrained(name, **given)(ids).logits.isfinite().all().item(), "ln_removal" in sys.modules)
"""
    ended = fresh(place, code)
    assert ended.stdout.split() == ["True", "False"], ended.stderr
    if importlib.util.find_spec("lm_eval"):
        (place / "question.jsonl").write_text('{"q": "def f(x):", "a": [" return", " x"], "gold": 0}\n')
        (place / "tasks").mkdir()
        (place / "tasks" / "mine.yaml").write_text(
            "task: hellaswag\ndataset_path: json\ndataset_kwargs: {data_files: {test: question.jsonl}}\ntest_split: test\n"
            'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: a\ndoc_to_target: gold\n'
            "metric_list: [{metric: acc}]\n"
        )
        offline = ["--include_path", "tasks", "--device", "cpu"]  # a task of that name which needs no network
        command = [sys.executable, "-m", *words, *offline]
        ended = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0 and "hellaswag" in ended.stdout, ended.stderr
