"""The Hugging Face Hub's client: a bounded wait for its first answer, and its failures as one line that says what to do."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from ln_removal.errors import UserError

T = TypeVar("T")

PUBLISHED = {
    **dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "openai-community"),
    "distilgpt2": "distilbert",
}
"""Models that are usually named without their owner on the Hub, and this owner."""

logger = logging.getLogger(__name__)

HUB_SECONDS = 12.0
"""How long the Hub may take to give its first answer before it counts as out of reach."""


def is_hub_id(name: str) -> bool:
    """Whether a model's name can be a Hub id, NAME or OWNER/NAME, rather than a path. The Hub is not asked.

    Where OWNER is a directory here, the name is taken for a path with a mistake in it. With a revision, NAME@REVISION, it is a
    Hub id whatever directories there are.
    """
    name, _, revision = name.partition("@")
    owner = name.rpartition("/")[0]
    is_here = not revision and (Path(name).exists() or bool(owner and Path(owner).is_dir()))
    return looks_like_hub_id(name) and not is_here


def looks_like_hub_id(name: str) -> bool:
    """Whether a name is written as a Hub id, NAME or OWNER/NAME, whatever directories there are."""
    owner, _, repository = name.rpartition("/")
    return bool(repository) and not name.startswith((".", "/", "~")) and "\\" not in name and "/" not in owner


def is_known_hub_id(name: str) -> bool:
    """Whether the Hub has a model of this name for certain: a published GPT-2, or one that was downloaded before."""
    from huggingface_hub import constants

    owner, _, repository = name.rpartition("/")
    is_published = repository in PUBLISHED and owner in ("", PUBLISHED[repository])
    downloaded = Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"))
    return looks_like_hub_id(name) and (is_published or downloaded.is_dir())


def say_if_hidden(name: str, path: Path, *, certain: bool = True) -> None:
    """Warn, once in a process, when a folder hides a Hub id: the folder is taken, and the user may have meant the Hub's model.

    Args:
        name: as it was typed; `path` is the folder.
        certain: only where the Hub has this id for certain; otherwise wherever the name has an owner.
    """
    if is_known_hub_id(name) or (not certain and "/" in name and looks_like_hub_id(name)):
        _say_hidden(name, str(path.resolve()))


@cache
def _say_hidden(name: str, folder: str) -> None:
    logger.warning(
        "%s is the folder %s here, which hides the Hub id of that name; write %s@main for the Hub's model, ./%s for the folder",
        name,
        folder,
        name,
        name,
    )


def first_answer(request: Callable[[], T], *, seconds: float = HUB_SECONDS) -> T:
    """Run a Hub request and wait at most `seconds` for it.

    The client's own time-out holds for one address of one connection attempt and not for name look-up, so a network
    that swallows packets can keep it for minutes. The request then goes on in a daemon thread that is left behind.

    Raises:
        TimeoutError: when there was no answer in time; otherwise whatever the request raises.
    """
    outcome: list[T] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            outcome.append(request())
        except Exception as error:  # noqa: BLE001 (raised again by the caller)
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="hub-first-answer")
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError(f"no answer in {seconds:.0f} seconds")
    return outcome[0]


def is_unreachable(error: BaseException) -> bool:
    """Whether an error of the Hub client, or one it was raised from, means that no connection could be made or kept."""
    return _is_lost_connection(_decisive(error))


def _decisive(error: BaseException) -> BaseException:
    """Of an error and those it was raised from, the first that is an answer of the Hub or a lost connection, or else `error`."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if _status(cause) is not None or _is_lost_connection(cause):
            return cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return error


def _status(error: BaseException) -> int | None:
    """The HTTP status of an answer that the Hub's client raised; None for any other error."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_lost_connection(error: BaseException) -> bool:
    """By the name of its base class, since the client has changed its HTTP library more than once."""
    names = {base.__name__ for base in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or bool(
        names & {"TransportError", "ClientConnectionError"}
    )


def hub_error(error: BaseException, what: str, repo_id: str, advice: str) -> UserError:
    """The one-line message for a failure of the Hub client.

    Args:
        error: what the client raised.
        what: `model` or `data set`.
        repo_id: the repository asked for.
        advice: what to do without network.
    """
    from huggingface_hub import constants, errors

    host = constants.ENDPOINT.partition("://")[2]
    page = f"{constants.ENDPOINT}/{'datasets/' if what == 'data set' else ''}{repo_id}"
    status = _status(error)
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"the {what} {repo_id} on {host} lacks the revision asked for; see {page}")
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{host} has no {what} {repo_id!r} that you may read; check the spelling, or, if it is private, log in "
            "with `hf auth login`"
        )
    if status in (401, 403):
        return UserError(f"the {what} {repo_id} is gated: accept its terms at {page} and log in with `hf auth login`")
    if is_unreachable(error):
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else one_line(error)
        return UserError(f"cannot reach {host} for the {what} {repo_id} ({reason}); {advice}")
    reason = f"it answered {status}" if status else one_line(error)
    return UserError(f"the {what} {repo_id} could not be fetched from {host}: {reason}; try again later, or {advice}")


def one_line(error: BaseException) -> str:
    """An error's message as one short line without secrets, or its type when it has none."""
    # Cut last: half a token would no longer be known as one.
    return without_secrets(" ".join(str(error).split()))[:300] or type(error).__name__


_BEARER = re.compile(r"Bearer [^\s'\"]+")
_QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]+")


def without_secrets(text: str) -> str:
    """A text without the user's token and without the signatures of upload addresses, which errors of HTTP libraries quote.

    A token that no header can hold is quoted with its odd characters escaped, so what follows `Bearer` goes as a whole.
    """
    from huggingface_hub import get_token

    token = get_token()
    shown = _BEARER.sub("Bearer (token)", _QUERY.sub(r"\1?...", text))
    return shown.replace(token, "(token)") if token else shown


PASSING_STATUSES = (408, 409, 412, 425, 429, 500, 502, 503, 504)
"""Answers that another attempt may change: busy, overloaded, or somebody else's commit came first."""


def is_passing(error: BaseException) -> bool:
    """Whether another attempt at publishing may succeed where this one failed: a lost connection, a Hub that is busy."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    found = _decisive(error)
    lost = _is_lost_connection(found) and not isinstance(found, OfflineModeIsEnabled)
    return lost or _status(found) in PASSING_STATUSES


def publish_error(error: BaseException, repo_id: str, *, attempts: int = 1) -> UserError:
    """The one-line message for a failure to publish; the token is in none of them.

    Args:
        error: what the Hub client raised.
        repo_id: the repository to be published to.
        attempts: how often it was tried.
    """
    from huggingface_hub import constants, errors

    host = constants.ENDPOINT.partition("://")[2]
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    found = _decisive(error)
    status = _status(found)
    tried = f" after {attempts} attempts" if attempts > 1 else ""
    if status == 401:
        return UserError(
            f"{host} does not accept the token; make one that may write at {tokens} and log in with `hf auth login`, or set "
            "HF_TOKEN (which wins)"
        )
    if status == 403:
        return UserError(
            f"the token may not write to {repo_id}; check the spelling, or make a token that may write at {tokens}"
        )
    if _is_lost_connection(found):
        reason = "HF_HUB_OFFLINE is set" if isinstance(found, errors.OfflineModeIsEnabled) else one_line(error)
        return UserError(f"cannot reach {host} to publish {repo_id}{tried} ({reason}); check the network")
    reason = f"{host} answered {status}: {one_line(found)}" if status else one_line(error)
    return UserError(f"{repo_id} could not be published{tried}: {reason}; try again later")
