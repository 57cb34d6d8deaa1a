"""Publish on the Hugging Face Hub in one commit: a repository shows all of it or nothing.

Whether publishing will be allowed is asked before hours of training, not after them. The token is found by the Hub's own
client in its usual places (HF_TOKEN, `hf auth login`); our code only asks whether there is one.

Large files are uploaded before the commit and belong to no revision until then. What a lost connection interrupted is tried
again a few times; files that arrived are not sent twice.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.errors import UserError
from ln_removal.files.hub import first_answer, is_passing, one_line, publish_error

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

WRITING_ROLES = ("write", "admin", "contributor")
"""Roles in an organisation that may make a repository there."""

REPOSITORY = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
"""What the Hub accepts as OWNER/NAME, apart from two hyphens or dots in a row and the ending .git."""

Files = Mapping[str, Path | bytes]
"""What goes up, by its path in the repository."""

WAITS = (3.0, 10.0, 30.0)
"""Seconds between attempts. The client itself retries the uploads of files (http_backoff), but not the commit."""

STALE = (
    *("*.safetensors", "*.safetensors.index.json", "stock/*", "plots/*", "results.json", "report.html"),
    *("adapter_config.json", "adapter_model.*", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("tf_model*.h5", "flax_model*.msgpack", "rust_model.ot", "generation_config.json", "*quant*_config.json"),
)
"""Files of a model that was in the repository before. They would contradict the new one, or be loaded in its place or
with it, so they are removed with the commit if it has no such file. adapter_config.json makes transformers load its base."""

STALE_TOKENIZER = (
    *("tokenizer.*", "tokenizer_config.json", "vocab.*", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.*", "spiece.model", "sentencepiece*.model"),
)
"""The same for a tokenizer, when one is published."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubTarget:
    """A model repository on the Hub.

    Attributes:
        repo_id: OWNER/NAME, the owner being a user or an organisation.
        private: make a new repository private; an existing one has to be so already.
        tag: also give the commit this name, so that users can pin it as a revision.
    """

    repo_id: str
    private: bool = False
    tag: str | None = None

    @property
    def options(self) -> str:
        """The options that name this target on the command line."""
        tag = f" --tag {self.tag}" if self.tag else ""
        return f"--push-to-hub {self.repo_id}{' --private' if self.private else ''}{tag}"


def named_target(repo_id: str | None, *, private: bool = False, tag: str | None = None) -> HubTarget | None:
    """The target that the options name; None when there is none. Nothing is asked of the network.

    Raises:
        UserError: the id or the tag is malformed, or there are options for a target and none is named.
    """
    if repo_id is None:
        if private or tag is not None:
            raise UserError(f"{'--private' if private else '--tag'} says how to publish; add --push-to-hub USER/REPO")
        return None
    if not REPOSITORY.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise UserError(
            f"--push-to-hub {repo_id!r} is no repository; give USER/REPO of letters, digits, '-', '_' and '.', such as "
            "alice/gpt2-without-layernorm"
        )
    if tag is not None and (
        not re.fullmatch(r"\w[\w.+-]*", tag, re.ASCII) or tag.endswith((".", ".lock")) or ".." in tag
    ):
        raise UserError(
            f"--tag {tag!r} is no name for a revision; give letters, digits, '-', '_' and '.', such as v1.0"
        )
    return HubTarget(repo_id, private, tag)


def check_target(target: HubTarget) -> None:
    """Find out whether publishing to the target will be allowed; writes nothing.

    Raises:
        UserError: there is no token, the Hub does not accept it, it may not write there, the repository is public and
            the target private, the tag is taken, or the Hub is out of reach.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if first_answer(get_token) is None:
        raise UserError(
            f"no token for {_host()} was found; log in with `hf auth login`, or set HF_TOKEN, to a token that may write "
            f"(made at {constants.ENDPOINT}/settings/tokens)"
        )
    api = HfApi()
    try:
        who = first_answer(api.whoami)
        try:
            info = first_answer(lambda: api.model_info(target.repo_id))
        except RepositoryNotFoundError:
            _check_may_create(who, target)
            return
        _check_may_write(api, who, target)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (the client raises what its transports raise)
        raise publish_error(error, target.repo_id) from None
    _check_visibility(target, is_private=info.private)
    taken = None if target.tag is None else tagged_commit(api, target)
    if taken is not None and taken != info.sha:  # of the newest commit: publishing the same again is no mistake
        raise UserError(f"{target.repo_id} has the tag {target.tag} already, on {taken[:7]}; choose another --tag")


def _check_visibility(target: HubTarget, *, is_private: bool | None) -> None:
    from huggingface_hub import constants

    if target.private and not is_private:
        raise UserError(
            f"{target.repo_id} exists and is public; leave out --private, or choose another name, or make it private at "
            f"{constants.ENDPOINT}/{target.repo_id}/settings"
        )


def tagged_commit(api: HfApi, target: HubTarget) -> str | None:
    """The commit that the target's tag names already, or None."""
    refs = api.list_repo_refs(target.repo_id)
    return next((ref.target_commit for ref in refs.tags if ref.name == target.tag), None)


def _check_may_create(who: dict[str, Any], target: HubTarget) -> None:
    """Whether the account and its token may make the repository, as far as the Hub says who they are."""
    _check_token_writes(who, target)
    owner = target.repo_id.partition("/")[0]
    orgs = {org.get("name"): org.get("roleInOrg") for org in who.get("orgs") or ()}
    if owner == who.get("name"):
        return
    if owner not in orgs:
        others = ", ".join([str(who.get("name")), *(str(name) for name in orgs)])
        raise UserError(f"your account may not publish as {owner}; it may as {others}; give one of these as USER/REPO")
    if orgs[owner] is not None and orgs[owner] not in WRITING_ROLES:
        raise UserError(
            f"your role in {owner} is {orgs[owner]!r}, which may not publish; ask its administrators, or choose your own name"
        )


def _check_may_write(api: HfApi, who: dict[str, Any], target: HubTarget) -> None:
    """Ask where a small file would go, which the Hub answers only to those who may write; nothing is uploaded."""
    from huggingface_hub import CommitOperationAdd

    _check_token_writes(who, target)
    probe = CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=b"may I?")
    first_answer(lambda: api.preupload_lfs_files(target.repo_id, additions=[probe]))


def _check_token_writes(who: dict[str, Any], target: HubTarget) -> None:
    """What the token is for: reading, writing, or single permissions (then: on the owner or the repository)."""
    from huggingface_hub import constants

    token = (who.get("auth") or {}).get("accessToken") or {}
    scopes = (token.get("fineGrained") or {}).get("scoped")
    names = (target.repo_id, target.repo_id.partition("/")[0])
    may = token.get("role") != "read"
    if token.get("role") == "fineGrained" and scopes is not None:
        allowed = [scope for scope in scopes if (scope.get("entity") or {}).get("name") in names]
        may = any("repo.write" in (scope.get("permissions") or ()) for scope in allowed)
    if not may:
        raise UserError(
            f"the token may not write to {target.repo_id}; make one that may at {constants.ENDPOINT}/settings/tokens and log in "
            "with `hf auth login`"
        )


def _host() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT.partition("://")[2]


@dataclass(frozen=True)
class Published:
    """Where the model is now; `is_new` is False when the repository held exactly this already."""

    url: str
    commit: str
    is_new: bool

    @property
    def line(self) -> str:
        """What a command prints."""
        return f"published: {self.url}   commit {self.commit[:7]}" + ("" if self.is_new else " (it was there already)")


def publish(files: Files, target: HubTarget, *, message: str, progress: bool = False) -> Published:
    """Make the repository if needed, and commit the files to it at once.

    Args:
        files: by path in the repository.
        target: the repository, its visibility if it is new, and a tag.
        message: of the commit.
        progress: show the client's progress bars.

    Raises:
        UserError: the Hub refused, or could not be reached after several attempts; the repository is as it was before.
    """
    with _quiet_client(progress):
        for attempt, wait in enumerate((*WAITS, None), start=1):
            try:
                return _attempt(files, target, message, over_http=attempt > 1)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 (the client raises what its transports raise)
                if wait is None or not is_passing(error):
                    raise publish_error(error, target.repo_id, attempts=attempt) from None
                logger.warning("publishing was interrupted (%s); trying again in %.0f seconds", one_line(error), wait)
                time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _attempt(files: Files, target: HubTarget, message: str, *, over_http: bool) -> Published:
    from huggingface_hub import CommitOperationDelete, HfApi

    api = HfApi()
    _make_repository(api, target)
    before = api.model_info(target.repo_id)
    there = {sibling.rfilename for sibling in before.siblings or ()}
    stale = stale_files(there, files)
    with _additions(files, over_http=over_http) as additions:
        done = api.create_commit(
            target.repo_id,
            [*additions, *(CommitOperationDelete(path_in_repo=path) for path in stale)],
            commit_message=message,
            parent_commit=before.sha,  # somebody else's commit in between is told, not overwritten
        )
    if stale:
        before_that = f"; commit {before.sha[:7]} still has them" if before.sha else ""
        logger.warning(
            "removed from %s, as files of another model: %s%s", target.repo_id, ", ".join(stale), before_that
        )
    if missing := sorted(set(files) - set(api.list_repo_files(target.repo_id, revision=done.oid))):
        raise UserError(
            f"{target.repo_id} leaves out {missing[0]} of what is published, probably by its .gitignore; remove that file "
            "from the repository"
        )
    if target.tag is not None:
        _tag(api, target, done.oid)
    return Published(f"{api.endpoint}/{target.repo_id}", done.oid, is_new=done.oid != before.sha)


def stale_files(there: Iterable[str], files: Files) -> list[str]:
    """Which files of a repository belong to a model that `files` replaces; fnmatch's * also matches a slash, so they are counted."""
    patterns = STALE + (STALE_TOKENIZER if "tokenizer.json" in files or "tokenizer_config.json" in files else ())
    return [
        path
        for path in sorted(set(there) - set(files))
        if any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)
    ]


def _make_repository(api: HfApi, target: HubTarget) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_private = api.model_info(target.repo_id).private
    except RepositoryNotFoundError:
        api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        return
    _check_visibility(target, is_private=is_private)


def _tag(api: HfApi, target: HubTarget, commit: str) -> None:
    assert target.tag is not None
    taken = tagged_commit(api, target)
    if taken is None:
        api.create_tag(target.repo_id, tag=target.tag, revision=commit)
    elif taken != commit:
        raise UserError(
            f"{target.repo_id} was published as {commit[:7]}, but its tag {target.tag} is on {taken[:7]} already; choose another "
            "--tag"
        )


@contextmanager
def _additions(files: Files, *, over_http: bool) -> Iterator[list[CommitOperationAdd]]:
    """The operations of the commit.

    Given a path, the client uses Xet storage where it can. Where that does not answer (a mirror without it, a firewall),
    it gets open files, which it uploads over plain HTTP.
    """
    from huggingface_hub import CommitOperationAdd

    with ExitStack() as opened:
        yield [
            CommitOperationAdd(
                path_in_repo=path,
                path_or_fileobj=opened.enter_context(content.open("rb"))
                if over_http and isinstance(content, Path)
                else content,
            )
            for path, content in sorted(files.items())
        ]


@contextmanager
def _quiet_client(progress: bool) -> Iterator[None]:
    """No messages of the client, which name upload addresses with their signatures; progress bars when asked for."""
    import warnings

    import huggingface_hub.utils
    from huggingface_hub.utils import logging as client_logging

    bars: Any = huggingface_hub.utils
    verbosity, hide = client_logging.get_verbosity(), not progress and not bars.are_progress_bars_disabled()
    client_logging.set_verbosity(logging.CRITICAL)
    if hide:
        bars.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        client_logging.set_verbosity(verbosity)
        if hide:
            bars.enable_progress_bars()
