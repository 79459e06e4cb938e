"""A Hugging Face hub on this machine that has one model, lab/tiny, of which it may get new commits."""

import hashlib
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.support.loopback import LoopbackServer

REPO = "lab/tiny"


class FakeHub(LoopbackServer):
    """Answers what huggingface_hub's `snapshot_download` asks. `asked`: the files that it sent, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = False
        self.asked: list[str] = []
        self._commits: dict[str, Path] = {}
        self._branch = ""

    def push(self, folder: Path) -> str:
        """The folder's files as a new commit of the branch main."""
        self._branch = hashlib.sha1(str(len(self._commits)).encode()).hexdigest()
        self._commits[self._branch] = folder
        return self._branch

    def environment(self, cache: Path) -> dict[str, str]:
        """What lets a process use this hub, with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}

    def routes(self) -> list[web.RouteDef]:
        """Which commit a revision is, what files it has, and a file."""
        return [
            web.get("/api/models/{repo:.+/.+}/revision/{revision}", self._revision),
            web.get("/api/models/{repo:.+/.+}/tree/{revision}", self._tree),
            web.get("/{repo:.+/.+}/resolve/{revision}/{file}", self._file),
        ]

    def _commit(self, request: web.Request) -> str:
        """Of the revision that is asked for."""
        revision = request.match_info["revision"]
        commit = self._branch if revision == "main" else revision
        if request.match_info["repo"] != REPO:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RepoNotFound"})
        if self.gated:
            raise web.HTTPForbidden(headers={"X-Error-Code": "GatedRepo"})
        if commit not in self._commits:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RevisionNotFound"})
        return commit

    async def _revision(self, request: web.Request) -> web.Response:
        return web.json_response({"id": REPO, "sha": self._commit(request), "siblings": []})

    async def _tree(self, request: web.Request) -> web.Response:
        files = sorted(self._commits[self._commit(request)].iterdir())
        return web.json_response([_entry(file) for file in files])

    async def _file(self, request: web.Request) -> web.Response:
        commit = self._commit(request)
        file = self._commits[commit] / request.match_info["file"]
        if request.method == "GET":
            self.asked.append(file.name)
        return web.Response(body=file.read_bytes(), headers={"ETag": f'"{_hash(file)}"', "X-Repo-Commit": commit})


def _entry(file: Path) -> dict[str, Any]:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _hash(file)}


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
