"""Questions in HellaSwag's format (Zellers et al. 2019): a context, four endings, the index of the right one."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ln_removal.data.text_files import READ_ERRORS, array_items, is_json_array, opened
from ln_removal.errors import UserError

ENDINGS = 4
HUB_NAME = "Rowan/hellaswag"
ARRAY_PROBE = 64


@dataclass(frozen=True, slots=True)
class Question:
    """One question, with the field names of the official jsonl.

    Attributes:
        ind: number in its set.
        activity_label: topic, such as "Roof shingle removal".
        ctx_a, ctx_b: the complete sentences of the context, and the unfinished last one (may be empty).
        ctx: the whole context.
        endings: four continuations of the context.
        label: index of the right ending.
        split, source_id: where the question comes from.
    """

    ind: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: tuple[str, str, str, str]
    label: int
    split: str = "validation"
    source_id: str = ""

    def to_json(self) -> dict[str, Any]:
        """The record of the official jsonl."""
        return {
            "ind": self.ind,
            "activity_label": self.activity_label,
            "ctx_a": self.ctx_a,
            "ctx_b": self.ctx_b,
            "ctx": self.ctx,
            "split": self.split,
            "label": self.label,
            "endings": list(self.endings),
            "source_id": self.source_id,
        }


def load_questions(path: Path | str) -> list[Question]:
    """Read a file of questions: the official jsonl, a JSON array of the same records, or the six-line text form.

    The file may be compressed (.gz, .bz2, .xz, .zst) and may begin with a byte-order mark, of UTF-8 or UTF-16.
    In the text form a question has six lines: `activity_label: ctx`, the index of the right ending, and the four endings.
    It does not tell ctx_a from ctx_b, so ctx_a is the whole context and ctx_b is empty.

    Raises:
        UserError: the file cannot be read, is empty, or has a malformed question (the message names its line).
    """
    path = Path(path)
    try:
        with opened(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as file:
            text = file.read()
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        raise UserError(f"cannot read questions from {path}: {error}; give a jsonl or six-line text file") from error
    if is_json_array(text[:ARRAY_PROBE].encode()):
        return _parse_array(text, path)
    # splitlines would also break at other characters, which a text may contain.
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(f"{path} holds no questions: it is empty; give the official jsonl or the six-line text form")
    parse = _parse_jsonl if lines[0].lstrip().startswith("{") else _parse_text
    return list(parse(lines, path))


def load_from_hub(*, split: str = "validation") -> list[Question]:
    """HellaSwag from the Hugging Face Hub (10,042 validation questions).

    Raises:
        UserError: `datasets` is not installed, or the Hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{HUB_NAME} needs the package datasets, which is not installed; pip install datasets, or give --data FILE"
        ) from error
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    from ln_removal.files.hub import first_answer, hub_error

    advice = (
        "give --data FILE (hellaswag_val.jsonl from github.com/rowanz/hellaswag), or, if it was downloaded before, set "
        "HF_HUB_OFFLINE=1"
    )
    try:
        # A request with a short time-out comes first, because `datasets` would retry for minutes.
        with suppress(OfflineModeIsEnabled):
            first_answer(lambda: HfApi().dataset_info(HUB_NAME))
        records = datasets.load_dataset(HUB_NAME, split=split)
    except Exception as error:
        raise hub_error(error, "data set", HUB_NAME, advice) from error
    return [_question(record, f"{HUB_NAME} record {number}", number) for number, record in enumerate(records)]


def write_jsonl(questions: Iterable[Question], path: Path | str) -> None:
    """Write questions as the official jsonl.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(question.to_json(), ensure_ascii=False) + "\n" for question in questions)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another file") from error


def _parse_jsonl(lines: list[str], path: Path) -> Iterator[Question]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or error
            raise UserError(f"{path}, line {number}: not JSON ({reason}); expected one question a line") from error
        yield _question(record, f"{path}, line {number}", number - 1)


def _parse_array(text: str, path: Path) -> list[Question]:
    try:
        records = list(array_items(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); expected a list of questions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); expected a list of questions") from error
    if not records:
        raise UserError(
            f"{path} holds no questions: its list is empty; give the official jsonl or the six-line text form"
        )
    return [_question(record, f"{path}, line {line}", number) for number, (line, record) in enumerate(records)]


def _parse_text(lines: list[str], path: Path) -> Iterator[Question]:
    size = ENDINGS + 2
    if len(lines) % size:
        raise UserError(
            f"{path} has {len(lines)} lines, not a multiple of {size} (activity_label: ctx, label, four endings); "
            "it is cut off, or not a file of questions: get it again"
        )
    for start in range(0, len(lines), size):
        head, label, *endings = lines[start : start + size]
        activity, separator, context = head.partition(": ")
        if not separator:
            raise UserError(
                f"{path}, line {start + 1}: expected 'activity_label: context', found {head[:60]!r}; correct that line"
            )
        record = {"activity_label": activity, "ctx": context, "label": label, "endings": endings}
        yield _question(record, f"{path}, line {start + 2}", start // size)


def _question(record: Any, where: str, number: int) -> Question:
    """Check a record of the jsonl or of the Hub and make it a question; `where` names it in an error."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected a JSON object with ctx, endings and label, found {type(record).__name__}")
    missing = [key for key in ("ctx", "endings", "label") if key not in record]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}; a question has ctx, endings and label")
    endings, label = record["endings"], "" if record["label"] is None else str(record["label"]).strip()
    if not isinstance(endings, list) or len(endings) != ENDINGS or not all(isinstance(e, str) for e in endings):
        raise UserError(f"{where}: endings is not a list of {ENDINGS} texts; only four-way questions are scored")
    if label not in {str(index) for index in range(ENDINGS)}:
        hint = (
            "the test split is published without labels, use the validation split" if not label else "expected 0 to 3"
        )
        raise UserError(f"{where}: the label is {label!r}; {hint}")
    index = number if record.get("ind") is None else record["ind"]
    if type(index) is not int:
        raise UserError(f"{where}: ind is {index!r}; expected a whole number, or leave it out")
    ctx = _text(record, "ctx", where)
    if ctx is None:
        raise UserError(f'{where}: ctx is null; give the context as a text (an empty one is written "")')
    first, second, third, fourth = endings
    question = Question(
        ind=index,
        activity_label=_text(record, "activity_label", where) or "",
        ctx_a=ctx if (ctx_a := _text(record, "ctx_a", where)) is None else ctx_a,
        ctx_b=_text(record, "ctx_b", where) or "",
        ctx=ctx,
        endings=(first, second, third, fourth),
        label=int(label),
        split=_text(record, "split", where) or "validation",
        source_id=_text(record, "source_id", where) or "",
    )
    if ctx_a is None and question.ctx_b:
        raise UserError(f"{where}: ctx_b without ctx_a, so the context would be read twice; give both, or only ctx")
    texts = [*endings, question.ctx, question.ctx_a, question.ctx_b, question.activity_label]
    if any("\ud800" <= character <= "\udfff" for character in "".join(texts)):
        raise UserError(f"{where}: the text holds half of a surrogate pair, which is no character; correct the file")
    return question


def _text(record: Mapping[str, Any], key: str, where: str) -> str | None:
    """The text of a field; None where it is null or missing."""
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {key} is {value!r:.60}, a {type(value).__name__}; expected a text")
    return value
