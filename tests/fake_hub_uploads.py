"""The writing half of the fake Hub: who a token is, creating repositories, uploads to large-file storage, commits, tags.

It follows the order in which the real client asks: whoami, create, preupload, batch, PUT, verify, commit, tag. It offers
no Xet storage, as a mirror or an older Hub: the client's Xet uploader finds no token there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

LARGE = 20_000
"""Bytes from which a file that is not a weights file goes to large-file storage too (on the real Hub: 10 MB)."""


@dataclass
class Account:
    """Whom a token belongs to: `role` is the token's (read, write, fineGrained), `orgs` are roles in organisations."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)
    scopes: list[tuple[str, list[str]]] = field(default_factory=list)  # of a fine-grained token: (owner or repo, may)

    def may_write(self, repo: str) -> bool:
        owner = repo.partition("/")[0]
        if self.role == "fineGrained":
            return any(name in (owner, repo) and "repo.write" in may for name, may in self.scopes)
        return self.role == "write" and (owner == self.name or self.orgs.get(owner) in ("write", "admin"))

    def whoami(self) -> dict[str, Any]:
        token: dict[str, Any] = {"displayName": "test", "role": self.role}
        if self.role == "fineGrained":
            scoped = [{"entity": {"type": "user", "name": name}, "permissions": may} for name, may in self.scopes]
            token["fineGrained"] = {"global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.orgs.items()]
        return {"type": "user", "name": self.name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str, message: str, body: Any = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.body = {"error": message} if body is None else body


class Uploads:
    """What is written, apart from HTTP: `answer` takes a request and returns its JSON, or raises Refused."""

    def __init__(self, hub: Any) -> None:
        self.hub = hub
        self.accounts: dict[str, Account] = {}
        self.storage: dict[tuple[str, str], bytes] = {}  # large files by repository and SHA-256, committed or not
        self.commits: list[dict[str, Any]] = []  # (repo, parent, summary, operations), in order

    def account(self, authorization: str) -> Account:
        found = self.accounts.get(authorization.removeprefix("Bearer "))
        if found is None:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return found

    def answer(self, method: str, path: str, body: bytes, authorization: str) -> Any | None:
        """The JSON for a request to the writing part of the API; None when the path is none of it."""
        if path == "api/whoami-v2":
            return self.account(authorization).whoami()
        if path == "api/validate-yaml":
            return self._validate(json.loads(body))
        if path == "api/repos/create":
            return self._create(json.loads(body), self.account(authorization))
        if match := re.fullmatch(r"storage/([^/]+/[^/]+)/([0-9a-f]{64})", path):
            return self._put(match[1], match[2], body)
        if match := re.fullmatch(r"([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path):
            return self._batch(self._writable(match[1], authorization), match[2], json.loads(body))
        if match := re.fullmatch(r"api/models/([^/]+/[^/]+)/(preupload|commit|tag)/(.+)", path):
            repo = self._writable(match[1], authorization)
            if match[2] == "preupload":
                return self._preupload(repo, match[3], json.loads(body))
            if match[2] == "commit":
                return self._commit(repo, match[3], [json.loads(line) for line in body.splitlines()])
            return self._tag(repo, match[3], json.loads(body)["tag"])
        if match := re.fullmatch(r"api/models/([^/]+/[^/]+)/refs", path):
            repo = self._known(match[1])
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": repo.commit(n)} for n in repo.revisions]
            tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": commit} for n, commit in repo.tags.items()]
            return {"branches": branches, "converts": [], "tags": tags}
        if re.fullmatch(r"api/models/([^/]+/[^/]+)/xet-write-token/.+", path):
            raise Refused(404, "", "this Hub has no Xet storage")
        return None

    def _known(self, name: str) -> Any:
        repo = self.hub.repos.get(("models", name))
        if repo is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repo

    def _writable(self, name: str, authorization: str) -> Any:
        account, repo = self.account(authorization), self._known(name)
        if not account.may_write(name):
            raise Refused(403, "", f"Forbidden: you don't have write access to {name}")
        return repo

    def _create(self, asked: dict[str, Any], account: Account) -> dict[str, Any]:
        name = f"{asked.get('organization') or account.name}/{asked['name']}"
        if not account.may_write(name):
            raise Refused(403, "", f"You don't have the rights to create a model under the namespace {name}")
        if ("models", name) in self.hub.repos:
            raise Refused(409, "", "You already created this model repo")
        repo = self.hub.add("models", name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        repo.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        return {"url": f"{self.hub.endpoint}/{name}", "name": name}

    @staticmethod
    def _validate(asked: dict[str, Any]) -> dict[str, Any]:
        import yaml

        block = re.match(r"---\n(.*?)\n---\n", asked["content"], flags=re.DOTALL)
        try:
            data = yaml.safe_load(block[1]) if block else {}
            assert isinstance(data, dict), "the metadata is no mapping"
        except (yaml.YAMLError, AssertionError) as error:
            raise Refused(400, "", "bad metadata", {"errors": [{"message": str(error)}], "warnings": []}) from error
        return {"errors": [], "warnings": []}

    def _preupload(self, repo: Any, revision: str, asked: dict[str, Any]) -> dict[str, Any]:
        found = repo.files(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        answers = []
        for file in asked["files"]:
            path, there = file["path"], found[1].get(file["path"])
            large = path.endswith(".safetensors") or file["size"] > LARGE
            oid = None
            if there is not None:
                git = hashlib.sha1(f"blob {len(there)}\0".encode() + there)
                oid = hashlib.sha256(there).hexdigest() if large else git.hexdigest()
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": path in self.hub.ignored, "oid": oid})
        return {"files": answers}

    def _batch(self, repo: Any, what: str, asked: dict[str, Any]) -> dict[str, Any]:
        if what == "verify":
            if len(self.storage.get((repo.name, asked["oid"]), b"")) != asked["size"]:
                raise Refused(404, "", "the object was not uploaded")
            return {}
        assert asked["operation"] == "upload" and "basic" in asked["transfers"]
        objects = []
        for item in asked["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if (repo.name, item["oid"]) not in self.storage:
                upload = {"href": f"{self.hub.endpoint}/storage/{repo.name}/{item['oid']}?signature=secret"}
                verify = {"href": f"{self.hub.endpoint}/{repo.name}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def _put(self, repo: str, oid: str, body: bytes) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "the content does not have this hash")
        self.storage[repo, oid] = body
        return {}

    def _commit(self, repo: Any, revision: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        assert lines[0]["key"] == "header" and len(lines) > 1
        header, parent = lines[0]["value"], repo.commit(revision)
        if header.get("parentCommit", parent) != parent:
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.revisions[revision])
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if (repo.name, value["oid"]) not in self.storage:
                    raise Refused(400, "", f"{value['path']} points to an object that was not uploaded")
                files[value["path"]] = self.storage[repo.name, value["oid"]]
            else:
                assert key == "deletedFile", key
                del files[value["path"]]
        commit = repo.advance(revision, files)
        operations = [(line["key"], line["value"]["path"]) for line in lines[1:]]
        self.commits.append(
            {"repo": repo.name, "parent": parent, "summary": header["summary"], "operations": operations}
        )
        return {"commitUrl": f"{self.hub.endpoint}/{repo.name}/commit/{commit}", "commitOid": commit, "success": True}

    @staticmethod
    def _tag(repo: Any, revision: str, tag: str) -> dict[str, Any]:
        if tag in repo.tags:
            raise Refused(409, "", "Reference already exists")
        found = repo.files(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        repo.tags[tag] = found[0]
        return {}
