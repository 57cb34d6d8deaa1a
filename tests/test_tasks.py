"""Tasks: prompts with a right and a wrong answer of one token, corrupt twins, and a user's own prompts."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import ROOT
from disarmed_model import disarm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ln_removal import UserError, to_bridge
from ln_removal.interpret import load, logit_differences, make_task, patching_of_run, read_task, templates
from ln_removal.interpret.tasks import PAIRED, TASKS, Prompt, Task

OFFLINE = ("brackets", "repeat", "quotes", "self", "return", "with")


@pytest.fixture(scope="module")
def python_tokenizer() -> Any:
    """That of the embedded model."""
    from ln_removal.models.loading import load_model

    return load_model("tiny").tokenizer


@pytest.fixture(scope="module")
def english_tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in for GPT-2's: bytes, and each word of the templates and each number of two digits as one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    centuries = [f"Ġ{number}" for number in range(11, 18)]
    years = [f"{number:02d}" for number in range(100)]
    for word in [*centuries, *years, *(f"Ġ{name}" for name in templates.PEOPLE)]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def texts(tokenizer: Any, one: Prompt) -> tuple[str, str, str, str]:
    """Clean, corrupt (or nothing), answer and wrong answer."""
    rows = (one.clean, one.corrupt or (), [one.answer], [one.wrong])
    clean, corrupt, answer, wrong = (tokenizer.decode(list(row)) for row in rows)
    return clean, corrupt, answer, wrong


class TestOffline:
    @pytest.mark.parametrize("name", OFFLINE)
    def test_prompts(self, python_tokenizer: Any, name: str) -> None:
        """Twins differ in one token, answers are what the tokenizer makes of the text, prompts differ, seeds decide."""
        task = make_task(name, python_tokenizer, count=24, prepend_bos=False, seed=3)
        assert len(task.prompts) == 24 and len({one.clean for one in task.prompts}) == 24
        assert task.paired == (name in PAIRED)
        for one in task.prompts:
            clean, corrupt, answer, wrong = texts(python_tokenizer, one)
            assert tuple(python_tokenizer.encode(clean + answer)) == (*one.clean, one.answer)
            assert answer != wrong
            if one.corrupt is not None:
                assert len(one.clean) == len(one.corrupt)
                assert sum(a != b for a, b in zip(one.clean, one.corrupt, strict=True)) == 1
                assert tuple(python_tokenizer.encode(corrupt + wrong)) == (*one.corrupt, one.wrong)
        assert task == make_task(name, python_tokenizer, count=24, prepend_bos=False, seed=3)
        assert task != make_task(name, python_tokenizer, count=24, prepend_bos=False, seed=4)

    @pytest.mark.parametrize("name", OFFLINE)
    def test_bos_stands_in_front(self, python_tokenizer: Any, name: str) -> None:
        with_bos, without = (
            make_task(name, python_tokenizer, count=8, prepend_bos=bos, seed=0) for bos in (True, False)
        )
        front = (python_tokenizer.eos_token_id,)
        for one, other in zip(with_bos.prompts, without.prompts, strict=True):
            assert one.clean == front + other.clean and (one.answer, one.wrong) == (other.answer, other.wrong)
            assert one.corrupt == (None if other.corrupt is None else front + other.corrupt)

    def test_what_they_ask_for(self, python_tokenizer: Any) -> None:
        for one in make_task("brackets", python_tokenizer, count=20, prepend_bos=False).prompts:
            clean, corrupt, answer, wrong = texts(python_tokenizer, one)
            for text, closing in ((clean, answer), (corrupt, wrong)):
                whole = (text + closing).strip()
                assert whole.count("[") == whole.count("]")
                assert whole.count("(") - whole.count(")") == (1 if "print(" in whole else 0)
        for one in make_task("repeat", python_tokenizer, count=20, prepend_bos=False).prompts:
            clean, corrupt, answer, wrong = texts(python_tokenizer, one)
            second = clean.rstrip(" ")
            for text, asked in ((clean, answer), (corrupt, wrong)):
                first = text.index(asked)
                start = max(0, first - 12)
                assert second.endswith(text[start:first]), "the same text stood in front of it before"
        for one in make_task("self", python_tokenizer, count=20, prepend_bos=False).prompts:
            clean, _, answer, wrong = texts(python_tokenizer, one)
            assert clean.endswith(f".{answer.strip()} =") and f",{wrong}" in clean
        for one in make_task("quotes", python_tokenizer, count=20, prepend_bos=False).prompts:
            clean, _, answer, wrong = texts(python_tokenizer, one)
            assert clean.count(answer) == 1 and wrong not in clean

    def test_the_embedded_model_does_them(self, python_tokenizer: Any) -> None:
        bridge = load({"original": "tiny"}).any
        for name, least in (("brackets", 0.95), ("repeat", 0.95), ("quotes", 0.95), ("return", 0.75), ("with", 0.95)):
            clean, corrupt = logit_differences(bridge, make_task(name, python_tokenizer, count=16, prepend_bos=False))
            assert (clean > 0).mean() >= least, name
            assert corrupt is None or (corrupt < 0).mean() >= least, name


class TestForGPT2:
    def test_ioi_has_fifteen_templates_of_each_order(self) -> None:
        found = templates.ioi_templates()
        assert len(found) == len(set(found)) == 30
        for number, template in enumerate(found):
            order = "".join(part[0] for part in template.split("[")[1:] if part[0] in "AB" and part[1] == "]")
            assert order == ("ABBA" if number < 15 else "BABA"), template
            assert template.endswith(" to [A]")

    def test_no_name_is_in_another_word(self) -> None:
        """The subject is found by its name in the text."""
        words = {word.strip(".,") for template in templates.ioi_templates() for word in template.split()}
        words |= {noun for nouns in templates.NOUNS.values() for noun in nouns} | set(templates.PEOPLE)
        for name in templates.PEOPLE:
            assert not any(word.startswith(name) and word != name for word in words), name

    def test_ioi(self, english_tokenizer: PreTrainedTokenizerFast) -> None:
        """The subject is named twice, the indirect object once; in the twin it is the other way round."""
        state = random.getstate()
        task = make_task("ioi", english_tokenizer, count=40, prepend_bos=True, seed=1)
        assert random.getstate() == state, "TransformerLens' data set seeds the generator of the process"
        orders = set()
        for one in task.prompts:
            clean, corrupt, answer, wrong = texts(english_tokenizer, one)
            assert (clean.count(answer), clean.count(wrong)) == (1, 2)
            assert (corrupt.count(answer), corrupt.count(wrong)) == (2, 1)
            assert clean.endswith(" to") and one.clean[0] == english_tokenizer.bos_token_id
            assert one.corrupt is not None
            assert sum(a != b for a, b in zip(one.clean, one.corrupt, strict=True)) == 1
            orders.add(clean.index(answer) < clean.index(wrong))
        assert orders == {True, False} and len(task.prompts) == 40

    def test_greater_than(self, english_tokenizer: PreTrainedTokenizerFast) -> None:
        task = make_task("greater-than", english_tokenizer, count=40, prepend_bos=False)
        for one in task.prompts:
            clean, corrupt, later, earlier = texts(english_tokenizer, one)
            year = int(clean.split("year ")[1][2:4])
            assert 1 < int(earlier) < year < int(later)
            assert corrupt.split("year ")[1][2:4] == "01" and clean[-2:] == clean.split("year ")[1][:2]

    def test_patching_on_a_stand_in(self, english_tokenizer: PreTrainedTokenizerFast) -> None:
        """A random GPT-2 with the stand-in's vocabulary: only the name that differs, and what comes behind it, has effects."""
        config = GPT2Config(vocab_size=len(english_tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
        models = load({"original": GPT2LMHeadModel(config).double().eval()})
        for name in ("ioi", "greater-than"):
            task = make_task(name, english_tokenizer, count=3, prepend_bos=True)
            found = patching_of_run(models, task, ["atp"], budget=False).found["original"]
            for row, one in enumerate(task.prompts):
                assert one.corrupt is not None
                first = next(place for place, (a, b) in enumerate(zip(one.clean, one.corrupt, strict=True)) if a != b)
                effects = found.exact.nodes[row, :, task.length - len(one.clean) :]
                assert (effects[:, :first] == 0).all() and (effects[0, first] != 0).all()
                gap = found.clean[row] - found.corrupt[row]
                assert effects[0, first, 0] == pytest.approx(gap, abs=1e-12), (
                    "the whole difference comes from that token"
                )

    def test_the_notebook_on_a_stand_in(self, english_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        """Its cells, with a random GPT-2 and the same with constant scales in the place of a run of the real one."""
        import matplotlib.pyplot as plt

        from ln_removal import from_disarmed

        plt.switch_backend("agg")
        config = GPT2Config(
            vocab_size=len(english_tokenizer), n_positions=128, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = GPT2LMHeadModel(config).eval()
        model.save_pretrained(tmp_path)
        english_tokenizer.save_pretrained(tmp_path)
        run = {"original": tmp_path, "ln_free": from_disarmed(disarm(model)).double()}
        names: dict[str, Any] = {}
        cells = json.loads((ROOT / "notebooks" / "ioi.ipynb").read_text(encoding="utf-8"))["cells"]
        with torch.enable_grad():  # a cell switches it off
            for cell in cells:
                assert not cell.get("outputs"), "they would be those of another model"
                if "parameters" in cell["metadata"].get("tags", ()):
                    assert {"run", "prompts", "patched", "device"} == set(
                        re.findall(r"^(\w+) =", "".join(cell["source"]), re.M)
                    )
                    names |= {"run": run, "prompts": 6, "patched": 2, "device": "cpu"}
                elif cell["cell_type"] == "code":
                    exec("".join(cell["source"]), names)
        plt.close("all")
        assert set(names["effects"]) == {"original", "ln_free"} == set(names["found"].found)
        assert names["effects"]["original"].only("head").error().value > 1

    def test_a_tokenizer_that_cuts_the_answers(self, python_tokenizer: Any) -> None:
        with pytest.raises(UserError, match=r"ioi.*tokens"):
            make_task("ioi", python_tokenizer, count=4, prepend_bos=False)
        with pytest.raises(UserError, match=r"sudoku.*brackets.*jsonl"):
            make_task("sudoku", python_tokenizer, count=4, prepend_bos=False)

    def test_every_task_has_a_title(self) -> None:
        assert set(PAIRED) < set(TASKS) and set(OFFLINE) < set(TASKS)


GOOD = {"clean": "return values[i", "corrupt": "return values(i", "answer": "]", "wrong": ")"}


class TestOwnPrompts:
    def write(self, path: Path, *lines: Any) -> Path:
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
        return path

    def test_they_are_read(self, python_tokenizer: Any, tmp_path: Path) -> None:
        other = {"clean": "x = (a, b", "corrupt": "x = [a, b", "answer": ")", "wrong": "]"}
        path = self.write(tmp_path / "mine.jsonl", GOOD, "", other)
        task = read_task(path, python_tokenizer, prepend_bos=True)
        assert [texts(python_tokenizer, one)[2:] for one in task.prompts] == [("]", ")"), (")", "]")]
        assert task.paired and task.name == "mine.jsonl" and task.seed is None
        assert all(one.clean[0] == python_tokenizer.eos_token_id for one in task.prompts)

    def test_without_twins(self, python_tokenizer: Any, tmp_path: Path) -> None:
        single = {name: text for name, text in GOOD.items() if name != "corrupt"}
        task = read_task(self.write(tmp_path / "a.jsonl", single), python_tokenizer, prepend_bos=False)
        assert not task.paired and task.prompts[0].corrupt is None

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ('{"clean": ', r"line 2.*JSON"),
            ("[1]", r"line 2.*object.*list"),
            ({**GOOD, "answer": None}, r"line 2.*answer.*null"),
            ({name: GOOD[name] for name in ("clean", "corrupt", "answer")}, r"line 2.*no wrong"),
            ({**GOOD, "wrong answer": ")"}, r"line 2.*wrong answer"),
            ({**GOOD, "answer": " total_of_all"}, r"line 2.*answer ' total_of_all' has \d tokens"),
            ({**GOOD, "answer": ")"}, r"line 2.*both"),
            ({**GOOD, "corrupt": "return values(i, j"}, r"line 2.*\d tokens and the corrupt one \d"),
            ({**GOOD, "corrupt": GOOD["clean"]}, r"line 2.*the same"),
            ({**GOOD, "clean": "", "corrupt": None}, r"line 2.*empty"),
            ({**GOOD, "corrupt": None}, r"line 2.*twin"),
        ],
    )
    def test_a_bad_line_is_named(self, python_tokenizer: Any, tmp_path: Path, line: Any, words: str) -> None:
        path = self.write(tmp_path / "mine.jsonl", GOOD, line)
        with pytest.raises(UserError, match=words) as error:
            read_task(path, python_tokenizer, prepend_bos=False)
        assert "mine.jsonl" in str(error.value)

    def test_a_file_that_is_none(self, python_tokenizer: Any, tmp_path: Path) -> None:
        (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
        self.write(tmp_path / "empty.jsonl", "")
        for name, words in (("nothing.jsonl", "read"), ("binary.jsonl", "read"), ("empty.jsonl", "no prompts")):
            with pytest.raises(UserError, match=rf"{words}.*clean") as error:
                read_task(tmp_path / name, python_tokenizer, prepend_bos=False)
            assert name in str(error.value)


class TestLogitDifferences:
    def test_prompts_of_several_lengths(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        """Each prompt by itself, in the order of the task."""
        model = tiny_gpt2.double()
        generator = torch.Generator().manual_seed(0)

        def draw(length: int) -> tuple[int, ...]:
            return tuple(torch.randint(0, 100, (length,), generator=generator).tolist())

        prompts = tuple(Prompt(draw(n), 5 + n, 50 + n, draw(n)) for n in (7, 4, 9, 7, 4))
        clean, corrupt = logit_differences(to_bridge(model), Task("x", "x", prompts, False, None))
        assert corrupt is not None
        for place, one in enumerate(prompts):
            assert one.corrupt is not None
            with torch.no_grad():
                last, twin = (model(torch.tensor([ids])).logits[0, -1] for ids in (one.clean, one.corrupt))
            expected = [float(row[one.answer] - row[one.wrong]) for row in (last, twin)]
            np.testing.assert_allclose([clean[place], corrupt[place]], expected, atol=1e-12)

    def test_too_long_for_the_model(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        task = Task("mine", "x", (Prompt((1,) * 33, 2, 3),), False, None)
        with pytest.raises(UserError, match=r"mine.*33.*32"):
            logit_differences(to_bridge(tiny_gpt2), task)
