"""A small local server that speaks as much of the Hub's protocol as pushing and loading a model needs.

Repositories live in memory. A commit is a whole snapshot of files, and a branch points to one, so that what a
broken upload leaves behind can be looked at. Faults are switched on by `fail`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
READER = "hf_reader"  # may read, may not write


@dataclass
class Repository:
    """Commits (sha -> path -> content) and branches (name -> sha)."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{message}{branch}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`; `hub.repositories` is what it holds.

    `hub.fail` maps a step ("create", "preupload", "batch", "put", "verify", "commit", "resolve") to a status to
    answer with, or to 0 for a connection that breaks in the middle.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.fail: dict[str, int] = {}
        self.calls: list[str] = []
        server = self

        class Handler(_Handler):
            hub = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: str, token: str = TOKEN) -> dict[str, str]:
        """What a client's process must have set before it imports huggingface_hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "*",
        }

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    # -- answers -----------------------------------------------------------------------------------------------

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"Content-Type": "application/json"}
        headers |= {"X-Error-Code": code} if code else {}
        headers |= {"X-Error-Message": message} if message else {}
        self._send(status, json.dumps({"error": message or code or "error"}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _faulty(self, step: str) -> bool:
        status = self.hub.fail.get(step)
        if status is None:
            return False
        if status == 0:  # the line goes dead: no answer, connection closed
            self.close_connection = True
            self.connection.close()
        else:
            self._error(status, message=f"{step} fails")
        return True

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _token(self) -> str | None:
        value = self.headers.get("Authorization") or ""
        return value.removeprefix("Bearer ") or None

    def _may_write(self) -> bool:
        if self._token() == TOKEN:
            return True
        if self._token() == READER:
            self._error(403, message="You have read-only access")
        else:
            self._error(401, message="Invalid username or password.")
        return False

    def _readable(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token() not in (TOKEN, READER)):
            self._error(401 if self._token() is None else 404, "RepoNotFound", "Repository not found")
            return None
        return repository

    # -- requests ----------------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.hub.calls.append(f"POST {path}")
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if not self._may_write():
            return None
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if parts[0] == "verify":
            return None if self._faulty("verify") else self._json({})
        if parts[:2] == ["api", "models"] and len(parts) >= 6:
            name, action, rest = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
            repository = self.hub.repositories.get(name)
            if repository is None:
                return self._error(404, "RepoNotFound")
            if action == "branch":
                return self._branch(repository, rest)
            if action == "preupload":
                return self._preupload(repository, rest, json.loads(body))
            if action == "commit":
                return self._commit(name, repository, rest, body)
        return self._error(404)

    def do_PUT(self) -> None:
        self.hub.calls.append(f"PUT {self.path}")
        if "put" in self.hub.fail:
            if self.hub.fail["put"] == 0:  # in the middle of the file
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            else:
                self._body()
            self._faulty("put")
            return
        content = self._body()
        oid = self.path.rsplit("/", 1)[-1]
        if hashlib.sha256(content).hexdigest() != oid:
            return self._error(400, message="content does not match its hash")
        self.hub.blobs[oid] = content
        self._json({})

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _get(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            role = {TOKEN: "write", READER: "read"}.get(self._token() or "")
            if role is None:
                return self._error(401, message="Invalid username or password.")
            access = {"displayName": "test", "role": role}
            organisations = [{"name": "us", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
            return self._json({"name": "somebody", "orgs": organisations, "auth": {"accessToken": access}})
        if parts[:2] == ["api", "models"]:
            repository = self._readable("/".join(parts[2:4]))
            if repository is None:
                return
            revision = parts[5] if len(parts) > 5 else "main"
            files = repository.files(revision)
            if files is None:
                return self._error(404, "RevisionNotFound")
            if len(parts) > 4 and parts[4] == "tree":
                return self._tree(files, "/".join(parts[6:]))
            sha = repository.branches.get(revision, revision)
            siblings = [{"rfilename": p} for p in files]
            return self._json(
                {
                    "id": "/".join(parts[2:4]),
                    "sha": sha,
                    "private": repository.private,
                    "siblings": siblings,
                    "tags": [],
                }
            )
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self._error(404)

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        inside = {path: content for path, content in files.items() if not folder or path.startswith(folder + "/")}
        if not inside:
            return self._error(404, "EntryNotFound")
        entries = inside.items()
        return self._json([{"type": "file", "path": p, "size": len(c), "oid": _git(c)} for p, c in entries])

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if self.hub.fail and self._faulty("resolve"):
            return None
        repository = self._readable(name)
        if repository is None:
            return None
        files = repository.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound")
        sha = repository.branches.get(revision, revision)
        if path not in files:
            body = b"{}"
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            return self._send(404, body, headers)
        content = files[path]
        return self._send(200, content, {"ETag": f'"{_git(content)}"', "X-Repo-Commit": sha})

    def _create(self, request: dict) -> None:
        if not self._may_write() or self._faulty("create"):
            return None
        name = f"{request.get('organization') or 'somebody'}/{request['name']}"
        if name in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        repository = self.hub.repositories[name] = Repository(
            private=request.get("visibility") == "private" or bool(request.get("private"))
        )
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial")
        return self._json({"url": f"{self.hub.url}/{name}", "id": name})

    def _branch(self, repository: Repository, branch: str) -> None:
        if branch in repository.branches:
            return self._error(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return self._json({})

    def _preupload(self, repository: Repository, revision: str, request: dict) -> None:
        if self._faulty("preupload"):
            return None
        if revision not in repository.branches:
            return self._error(404, "RevisionNotFound")
        modes = []
        for file in request["files"]:
            large = file["path"].endswith((".safetensors", ".model", ".png"))
            modes.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        return self._json({"files": modes})

    def _batch(self, request: dict) -> None:
        if self._faulty("batch"):
            return None
        objects = []
        for wanted in request["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.url}/upload/{wanted['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify/{wanted['oid']}"}}
            objects.append(entry)
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        if self._faulty("commit"):
            return None
        if branch not in repository.branches:
            return self._error(404, "RevisionNotFound")
        files = dict(repository.files(branch) or {})
        message = ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self._error(400, message="lfs object is missing")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repository.commit(branch, files, message)
        return self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
