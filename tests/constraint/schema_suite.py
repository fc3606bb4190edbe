"""The JSON Schema Test Suite, out of the source distribution of the `jsonschema` package; fetched once and kept."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

_VERSION = "4.26.0"
_DRAFT = "json/tests/draft2020-12"


@dataclass(frozen=True, slots=True)
class Group:
    """One schema of the suite and the instances that it is tried on, with whether they are valid."""

    name: str
    schema: Any
    instances: tuple[tuple[Any, bool], ...]


def groups() -> list[Group]:
    """All groups of draft 2020-12, with the optional formats."""
    return [group for path in sorted(_folder().rglob("*.json")) for group in _read(path)]


def _read(path: Path) -> Iterator[Group]:
    for group in json.loads(path.read_text("utf-8")):
        instances = tuple((test["data"], test["valid"]) for test in group["tests"])
        yield Group(f"{path.stem}: {group['description']}", group["schema"], instances)


def _folder() -> Path:
    """Where the suite lies. What is there is whole: it is unpacked beside it and renamed."""
    target = platformdirs.user_cache_path("llama-worker") / f"json-schema-suite-{_VERSION}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            _move(_fetched(Path(work)), target)
    return target


def _fetched(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "jsonschema"]
    done = subprocess.run(
        [*command, f"jsonschema=={_VERSION}", "--dest", str(work)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the JSON Schema Test Suite cannot be fetched:\n{done.stderr[-2000:]}")
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    return work / archive.name.removesuffix(".tar.gz") / _DRAFT


def _move(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:  # another process was faster
        if not target.exists():
            raise
