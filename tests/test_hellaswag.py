"""Multiple choice: packed scoring against one ending at a time, and each protocol against its rule written out here."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ln_removal.errors import UserError
from ln_removal.evaluation.choices import Prompt, batches, ending_log_probs, pack
from ln_removal.evaluation.hellaswag import (
    PROTOCOLS,
    ChoiceResult,
    Protocol,
    choice_prompts,
    evaluate_choices,
    texts_of,
)
from ln_removal.evaluation.questions import Question, load_questions, write_jsonl

TEXTS = [
    "Cooking: A man stands at a stove. he",
    "stirs the soup with a wooden spoon and smiles.",
    "throws the whole kitchen out of the window.",
    "Cleaning windows: A woman sprays water on the glass. She wipes it with a cloth.",
    "def read(path):\n    with open(path) as file:\n        return file.read()\n\n",
    "for name, value in items:\n    if value is None:\n        continue\n    print(name, value)\n",
    "She picks up the café's menu — naïve façade — and reads.",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that joins a symbol with the line break and the indentation after it, as one for code does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pattern = r" ?\p{L}+| ?[^\s\p{L}]+(?:\n[ \t]*)?|\n[ \t]*|\s+(?!\S)|\s+"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, n_positions: int = 96, attention: str = "sdpa"
) -> GPT2LMHeadModel:
    """Random weights, large enough that endings differ by whole nats."""
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=n_positions, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    model = GPT2LMHeadModel(config)
    model.set_attn_implementation(attention)
    model.train(False)
    return model


def question(ind: int, **changes: Any) -> Question:
    base = Question(
        ind=ind,
        activity_label="Cooking",
        ctx_a="A man stands at a stove.",
        ctx_b="he",
        ctx="A man stands at a stove. he",
        endings=(
            "stirs the soup with a wooden spoon and smiles.",
            "throws the whole kitchen out.",
            "reads the café's menu — naïve façade — slowly.",
            "wipes it with a cloth.",
        ),
        label=ind % 4,
    )
    return dataclasses.replace(base, **changes)


QUESTIONS = [
    question(0),
    question(1, ctx_b="THEN the woman", ctx="A man stands at a stove. THEN the woman"),
    question(2, ctx_a="How to cook [header] Soup [title] Take water. [substeps] Boil it  well [step]", ctx_b=""),
    question(3, endings=("[step] Stir  it.", "Leave [title] it", "Eat it. [substeps] Then go", "Go")),
    question(4, ctx_a="One. " * 9, ctx="One. " * 9 + "he"),
    question(5, activity_label="", ctx_a="", ctx_b="", ctx=""),
]
CODE = [
    question(10, ctx="for name, value in items:\n", endings=(
        "    if value is None:\n        continue", "    print(name, value)",
        "    if naïve:\n        return", "    continue")),
    question(11, ctx="def read(path):\n    with open(path) as file:\n\n", endings=(
        "        return file.read()", "        print(file.read())",
        "        if file:\n            pass", "        continue")),
    question(12, ctx="x = 1\n", endings=("print(x)", "print(x, x)", "printer = x", "pass")),
    question(13, ctx="for name in items:\n    print(name)\n", endings=(
        "    continue", "for value in items:", "        return", "\nfor name in file:")),
]  # fmt: skip


def naive_log_prob(model: GPT2LMHeadModel, context: list[int], ending: list[int]) -> float:
    """One ending alone: no packing, no padding, no mask, no chunks; the log-softmax in float64."""
    length = model.config.n_positions
    tokens = (context + ending)[-(length + 1) :]
    with torch.no_grad():
        log_probs = model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[len(tokens) - 1 - k, tokens[len(tokens) - k]]) for k in range(1, len(ending) + 1))


def lm_eval_answer(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, q: Question
) -> tuple[list[float], int, int]:
    """lm-eval 0.4.13's rule for hellaswag 1.0: log-probabilities, acc's choice, acc_norm's choice."""

    def preprocess(text: str) -> str:
        return re.sub("\\[.*?\\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    query = preprocess(q.activity_label + ": " + q.ctx_a + " " + q.ctx_b.capitalize())
    choices = [preprocess(ending) for ending in q.endings]
    sums = []
    for choice in choices:
        context, continuation = query, " " + choice
        spaces = len(context) - len(context.rstrip())
        if spaces:
            continuation, context = context[-spaces:] + continuation, context[:-spaces]
        head = encode(context)
        sums.append(naive_log_prob(model, head, encode(context + continuation)[len(head) :]))
    characters = np.array([float(len(choice)) for choice in choices])
    return sums, int(np.argmax(sums)), int(np.argmax(np.array(sums) / characters))


def check_lm_eval(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, result: ChoiceResult) -> None:
    acc, acc_norm = [], []
    for q, score in zip(QUESTIONS, result.per_question, strict=True):
        sums, choice, choice_norm = lm_eval_answer(model, tokenizer, q)
        assert score.log_probs == pytest.approx(sums, abs=1e-4)
        assert (score.choice, score.choice_norm, score.label) == (choice, choice_norm, q.label)
        acc.append(choice == q.label)
        acc_norm.append(choice_norm == q.label)
    assert result.acc == np.mean(acc) and result.acc_norm == np.mean(acc_norm)
    assert result.acc_norm_standard_error == pytest.approx(np.std(acc_norm, ddof=1) / math.sqrt(len(acc_norm)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
def test_lm_eval(tokenizer: PreTrainedTokenizerFast, attention: str, packed: bool, batch_tokens: int) -> None:
    model = make_model(tokenizer, attention=attention)
    result = evaluate_choices(model, tokenizer, QUESTIONS, protocol="lm-eval", packed=packed, batch_tokens=batch_tokens)
    check_lm_eval(model, tokenizer, result)


@pytest.mark.parametrize("n_positions", [24, 40])
def test_lm_eval_cuts_long_contexts_on_the_left(tokenizer: PreTrainedTokenizerFast, n_positions: int) -> None:
    model = make_model(tokenizer, n_positions=n_positions)
    check_lm_eval(model, tokenizer, evaluate_choices(model, tokenizer, QUESTIONS, protocol="lm-eval"))


def test_lm_eval_counts_characters_not_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    q = question(0, endings=("é" * 12, "x" * 12, "y" * 12, "z" * 12))
    score = evaluate_choices(make_model(tokenizer), tokenizer, [q], protocol="lm-eval").per_question[0]
    assert np.array(score.log_probs) / 12 == pytest.approx(score.normalised)


def test_float64_is_exact(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer).double()
    result = evaluate_choices(model, tokenizer, QUESTIONS, protocol="lm-eval", batch_tokens=300)
    for q, score in zip(QUESTIONS, result.per_question, strict=True):
        assert score.log_probs == pytest.approx(lm_eval_answer(model, tokenizer, q)[0], abs=1e-10)


def test_nanogpt(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer)
    questions = QUESTIONS[:5]
    result = evaluate_choices(model, tokenizer, questions, protocol="nanogpt")
    for q, score in zip(questions, result.per_question, strict=True):
        context = tokenizer(q.ctx, add_special_tokens=False)["input_ids"]
        endings = [tokenizer(" " + ending, add_special_tokens=False)["input_ids"] for ending in q.endings]
        sums = [naive_log_prob(model, context, ending) for ending in endings]
        means = [total / len(ending) for total, ending in zip(sums, endings, strict=True)]
        assert score.log_probs == pytest.approx(sums, abs=1e-4)
        assert score.normalised == pytest.approx(means, abs=1e-4)
        assert (score.choice, score.choice_norm) == (int(np.argmax(sums)), int(np.argmax(means)))


def test_code_compares_whole_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    """Wherever the cut lies, two scores must differ by just as much as the log-probabilities of the whole texts."""
    model = make_model(tokenizer)
    result = evaluate_choices(model, tokenizer, CODE, protocol="code")
    for q, score in zip(CODE, result.per_question, strict=True):
        wholes = [tokenizer(q.ctx + ending, add_special_tokens=False)["input_ids"] for ending in q.endings]
        sums = [naive_log_prob(model, whole[:1], whole[1:]) for whole in wholes]
        assert np.diff(score.log_probs) == pytest.approx(np.diff(sums), abs=1e-4)
        # What is given: the tokens that begin inside the context, as far as the endings agree on them.
        begins = [len(tokenizer.decode(wholes[0][:k])) for k in range(len(wholes[0]))]
        given = sum(begin < len(q.ctx) for begin in begins)
        given = next((k for k in range(given) if len({whole[k] for whole in wholes}) > 1), given)
        alone = [naive_log_prob(model, whole[:given], whole[given:]) for whole in wholes]
        assert score.log_probs == pytest.approx(alone, abs=1e-4)
        sizes = [len(ending.encode()) for ending in q.endings]
        assert score.normalised == pytest.approx(np.array(score.log_probs) / sizes)
        assert score.choice_norm == int(np.argmax(score.normalised))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_questions_that_were_tokenised_before_score_the_same(
    tokenizer: PreTrainedTokenizerFast, protocol: Protocol
) -> None:
    model = make_model(tokenizer)
    prompts = choice_prompts(tokenizer, CODE, protocol)
    expected = evaluate_choices(model, tokenizer, CODE, protocol=protocol)
    assert evaluate_choices(model, tokenizer, CODE, protocol=protocol, prompts=prompts) == expected


def test_code_keeps_the_natural_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """The line break of the context and the indentation of the ending stand in one token; it must not be torn apart."""
    q = CODE[0]
    whole = tokenizer(q.ctx + q.endings[0], add_special_tokens=False)["input_ids"]
    assert any(":\n    " in tokenizer.decode([token]) for token in whole), "the tokenizer of this test should join them"
    model = make_model(tokenizer)
    rows: list[list[int]] = []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    evaluate_choices(model, tokenizer, [q], protocol="code")
    assert len(rows) == 1 and rows[0][: len(whole) - 1] == whole[:-1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_kind_of_model(tokenizer: PreTrainedTokenizerFast, protocol: Protocol) -> None:
    """With freezable norms (constants that differ by position) and norm-free: packed as unpacked, one by one."""
    from ln_removal.models.norm_free import from_folded
    from ln_removal.norms.surgery import fold, install

    questions = CODE if protocol == "code" else QUESTIONS[:5]
    model = make_model(tokenizer)
    original = evaluate_choices(model, tokenizer, questions, protocol=protocol).per_question
    sites = install(model, eot_token_id=tokenizer.eos_token_id)
    installed = evaluate_choices(model, tokenizer, questions, protocol=protocol).per_question
    for before, after in zip(original, installed, strict=True):
        assert after.log_probs == pytest.approx(before.log_probs, abs=1e-4)
    model.train()
    with torch.no_grad():
        model(torch.arange(1, 91)[None])
    sites.update_running(0.0)
    for site in sites.sites:
        sites.set_mix(site, 1.0)
    frozen = evaluate_choices(model, tokenizer, questions, protocol=protocol).per_question
    apart = evaluate_choices(model, tokenizer, questions, protocol=protocol, packed=False).per_question
    for one, other, before in zip(frozen, apart, original, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
        assert one.log_probs != pytest.approx(before.log_probs, abs=1e-2)
    sites.set_special("eot", 1.0)
    sites.set_special("first", 1.0)
    dropped = evaluate_choices(model, tokenizer, questions, protocol=protocol).per_question
    norm_free = from_folded(model.config, fold(model)).eval()
    folded = evaluate_choices(norm_free, tokenizer, questions, protocol=protocol).per_question
    for one, other in zip(folded, dropped, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-3)


def test_rows_share_the_context_and_stay_in_the_budget() -> None:
    prompts = [Prompt("a", [1] * 10, [[2, 3], [4, 5, 6], [2, 3], [7]]), Prompt("b", [1] * 3, [[2]] * 4)]
    rows = pack(prompts, 100, together=True)
    assert [row.length for row in rows] == [10 + 1 + 2 + 0, 3]
    assert rows[0].answers == [[(0, 0), (0, 2)], [(0, 1)], [(0, 3)]]
    assert rows[1].answers == [[(1, 0), (1, 1), (1, 2), (1, 3)]]
    many = pack([Prompt(str(n), [1] * (n + 1), [[2, 3]] * 4) for n in range(50)], 100, together=True)
    for batch in batches(many, 120):
        assert len(batch) == 1 or len(batch) * max(row.length for row in batch) <= 120
    assert sum(len(batch) for batch in batches(many, 120)) == 50


def test_equal_endings_tie_exactly(tokenizer: PreTrainedTokenizerFast) -> None:
    q = question(0, endings=("stirs.", "reads a menu.", "reads a menu.", "stirs."))
    score = evaluate_choices(make_model(tokenizer), tokenizer, [q], protocol="lm-eval").per_question[0]
    assert score.log_probs[0] == score.log_probs[3] and score.log_probs[1] == score.log_probs[2]
    assert score.choice in (0, 1)


def test_memory_error_halves_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer)
    expected = evaluate_choices(model, tokenizer, QUESTIONS, protocol="lm-eval")
    sizes: list[int] = []

    def small_memory(module: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("no room")

    model.transformer.register_forward_pre_hook(small_memory, with_kwargs=True)
    result = evaluate_choices(model, tokenizer, QUESTIONS, protocol="lm-eval")
    assert max(sizes) == len(QUESTIONS)
    for one, other in zip(result.per_question, expected.per_question, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_limit_and_single_question(tokenizer: PreTrainedTokenizerFast) -> None:
    result = evaluate_choices(make_model(tokenizer), tokenizer, QUESTIONS, protocol="lm-eval", limit=1)
    assert result.questions == 1 and result.acc_standard_error is None
    assert [score.ind for score in result.per_question] == [0]


def test_scoring_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer, n_positions=8)
    with pytest.raises(UserError, match="question 0: ending 0"):
        evaluate_choices(model, tokenizer, QUESTIONS, protocol="lm-eval")
    with pytest.raises(UserError, match="questions"):
        evaluate_choices(model, tokenizer, [], protocol="lm-eval")
    with pytest.raises(UserError, match="'other'"):
        evaluate_choices(model, tokenizer, QUESTIONS, protocol="other")  # type: ignore[arg-type]
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.inf)
    with pytest.raises(UserError, match="finite"):
        ending_log_probs(model, [Prompt("a", [1, 2], [[3], [4]])])


def test_loading_jsonl(tmp_path: Path) -> None:
    write_jsonl(QUESTIONS, tmp_path / "q.jsonl")
    assert load_questions(tmp_path / "q.jsonl") == QUESTIONS
    official = {
        "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he", "split": "val", "split_type": "indomain", "label": 3,
        "endings": ["a", "b", "c", "d"], "source_id": "activitynet~v_-JhWjGDPHMY",
    }  # fmt: skip
    (tmp_path / "o.jsonl").write_text(json.dumps(official) + "\n\n")
    loaded = load_questions(tmp_path / "o.jsonl")[0]
    assert (loaded.ind, loaded.label, loaded.ctx_b, loaded.endings) == (24, 3, "he", ("a", "b", "c", "d"))


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2"])
def test_loading_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"questions.txt{suffix}"
    text = "Cooking: A man: he\x85\n2\na\nb\nc\u2028c\nd\nCleaning: A woman\n0\ne\nf\ng\nh\n"
    opener: Any = {"": open, ".gz": gzip.open, ".bz2": bz2.open}[suffix]
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    first, second = load_questions(path)
    assert (first.activity_label, first.ctx, first.ctx_a, first.ctx_b) == (
        "Cooking",
        "A man: he\x85",
        "A man: he\x85",
        "",
    )
    assert (first.ind, first.label, first.endings) == (0, 2, ("a", "b", "c\u2028c", "d"))
    assert (second.ind, second.activity_label, second.label) == (1, "Cleaning", 0)


RECORD: dict[str, Any] = {
    "ind": 7, "activity_label": "Cooking", "ctx_a": "A man.", "ctx_b": "he", "ctx": "A man. he", "label": 1,
    "endings": ["a", "b", "c", "d"], "split": "val", "source_id": "x~1",
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("form", ["lines", "array", "array on one line", "text"])
def test_every_form_of_a_file_of_questions_may_begin_with_a_byte_order_mark(
    tmp_path: Path, form: str, encoding: str
) -> None:
    records = [RECORD, {**RECORD, "ind": 8, "ctx": "naïve [title]\u2028he", "label": 3}]
    text = {
        "lines": "".join(json.dumps(record, ensure_ascii=False) + "\r\n" for record in records),
        "array": "\n" + json.dumps(records, indent=2, ensure_ascii=False) + "\n",
        "array on one line": json.dumps(records),
        "text": "".join(f"Cooking: {record['ctx']}\r\n{record['label']}\r\na\r\nb\r\nc\r\nd\r\n" for record in records),
    }[form]
    path = tmp_path / "q.json"
    path.write_bytes(text.encode(encoding))
    loaded = load_questions(path)
    assert [(q.ctx, q.label, q.endings) for q in loaded] == [
        (record["ctx"], record["label"], ("a", "b", "c", "d")) for record in records
    ]
    assert [q.ind for q in loaded] == ([0, 1] if form == "text" else [7, 8])


def test_a_null_is_an_empty_text_and_never_the_word_none(tmp_path: Path) -> None:
    nulls = dict.fromkeys(("ind", "activity_label", "ctx_a", "ctx_b", "split", "source_id"))
    (tmp_path / "q.jsonl").write_text(json.dumps({**RECORD, "ctx": "A man.", **nulls}))
    (loaded,) = load_questions(tmp_path / "q.jsonl")
    assert loaded == Question(
        ind=0, activity_label="", ctx_a="A man.", ctx_b="", ctx="A man.", endings=("a", "b", "c", "d"), label=1
    )
    assert texts_of(loaded, "lm-eval")[0].strip() == ": A man."
    (tmp_path / "b.jsonl").write_text(json.dumps({**RECORD, "ctx_a": "A man. he", "ctx_b": None}))
    assert texts_of(load_questions(tmp_path / "b.jsonl")[0], "lm-eval")[0].strip() == "Cooking: A man. he"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ctx": None}, "ctx is null"),
        ({"ctx": 5}, "ctx is 5"),
        ({"ctx_a": ["A man."]}, "ctx_a is ['A man.']"),
        ({"ctx_b": False}, "ctx_b is False"),
        ({"activity_label": {"en": "Cooking"}}, "activity_label is"),
        ({"source_id": 3}, "source_id is 3"),
        ({"ind": "7"}, "ind is '7'"),
        ({"label": None}, "without labels"),
        ({"label": 1.0}, "the label is '1.0'"),
        ({"endings": ["a", "b", None, "d"]}, "not a list of 4"),
        ({"ctx_a": None}, "ctx_b without ctx_a"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_other_types_are_errors_with_the_line(
    tmp_path: Path, change: dict[str, Any], message: str, indent: int | None
) -> None:
    records = [RECORD, {**RECORD, **change}]
    text = json.dumps(records, indent=1) if indent else "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_questions(tmp_path / "q.jsonl")
    line = text[: text.rindex('"ind"')].count("\n") if indent else 2  # the bracket stands on the line before "ind"
    assert f"line {line}: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("[]", "its list is empty"),
        ('[{"ctx": "a"},\n{"ctx', "line 2: not JSON"),
        ('[\n{"ctx": "a"}]', "line 2: no endings, label"),
        ("[{} {}]", "line 1: not JSON"),
        ("[{}] more", "line 1: not JSON"),
        ("[[step] no colon\n0\na\nb\nc\nd\n", "line 1: expected 'activity_label: context'"),
        ('{"ctx": "a"}', "line 1: no endings, label"),
        ('{"ctx": "a", "endings": ["a", "b"], "label": 0}', "not a list of 4"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": ""}', "test split is published without labels"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 4}', "expected 0 to 3"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 1}\n{"ctx', "line 2: not JSON"),
        ("a: b\n0\na\nb\nc\nd\na: b\n", "7 lines, not a multiple of 6"),
        ("no colon\n0\na\nb\nc\nd\n", "line 1: expected 'activity_label: context'"),
        ("a: b\nx\na\nb\nc\nd\n", "line 2: the label is 'x'"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        load_questions(path)
