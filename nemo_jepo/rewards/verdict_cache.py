"""Verdicts or scores on disk, one JSON object a line, so that no answer is judged twice. Runs may share a file.

A line is one write under a lock. One that a killed process or a full disk has torn is closed by the next writer and
skipped by every reader; so is whatever else is no verdict.
"""

import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any, Generic

from nemo_jepo.config.judge import RUN_SERVERS, EndpointConfig
from nemo_jepo.rewards.judge_prompt import Verdict

log = logging.getLogger(__name__)


class VerdictCache(Generic[Verdict]):
    """The verdicts of a file, and room for more. A file that cannot be read or written costs requests, never a run.

    Args:
        path: made with its folder at the first verdict.
        name: what a line calls a verdict.
        kind: of the verdicts.
    """

    def __init__(self, path: Path, name: str, kind: type[Verdict]) -> None:
        self._path, self._name = path, name
        self._verdicts: dict[str, Verdict] = {}
        self._writable = True
        try:
            lines = path.read_bytes().splitlines() if path.exists() else []
        except OSError as error:
            lines = []
            log.warning("judge: verdicts cannot be read back: %s", error)
        for line in lines:
            entry = _read(line)
            if isinstance(entry.get("key"), str) and type(entry.get(name)) is kind:
                self._verdicts[entry["key"]] = entry[name]

    def get(self, key: str) -> Verdict | None:
        """The verdict of an earlier judgement; None where there is none."""
        return self._verdicts.get(key)

    def put(self, key: str, verdict: Verdict, about: dict[str, Any]) -> None:
        """Keep a verdict.

        Args:
            key: says everything that the verdict depends on.
            about: for people who read the file.
        """
        self._verdicts[key] = verdict
        line = json.dumps({"key": key, self._name: verdict, **about}).encode() + b"\n"
        try:
            if self._writable:
                self._append(line)
        except OSError as error:
            self._writable = False
            log.warning("judge: verdicts are not kept: %s", error)

    def _append(self, line: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)


def open_cache(settings: EndpointConfig, folder: Path, name: str, kind: type[Verdict]) -> VerdictCache[Verdict] | None:
    """The cache of some settings, below a folder; None without one, as for servers whose weights change."""
    if settings.cache is None or settings.url == RUN_SERVERS:
        return None
    return VerdictCache(folder / settings.cache, name, kind)


def _read(line: bytes) -> dict[str, Any]:
    """The object of a line; {} for one that is torn or something else."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
