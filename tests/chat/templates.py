"""The chat templates that llama.cpp ships, out of the source distribution of the installed llama-cpp-python.

They are other people's, so they are not in this repository: the first use fetches them with pip into the user's
cache folder. Without them the tests that need them fail; nothing is skipped.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import platformdirs

from llama_worker._chat.template import ChatTemplate

N_TEMPLATES = 70
"""How many 0.3.36 ships. Later versions have more, or others."""

_INSIDE = "/vendor/llama.cpp/models/templates/"


@cache
def shipped_templates() -> dict[str, ChatTemplate]:
    """By name, compiled. The first call may take a minute: it fetches 76 MB."""
    return {
        path.stem: ChatTemplate(path.read_text("utf-8"), bos_text="<s>", eos_text="</s>")
        for path in sorted(folder().glob("*.jinja"))
    }


def folder() -> Path:
    """Where the templates lie. What is there is whole: it is unpacked beside it and renamed."""
    version = importlib.metadata.version("llama-cpp-python")
    target = platformdirs.user_cache_path("llama-worker") / f"llama.cpp-templates-{version}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            _unpack(_fetch(f"llama-cpp-python=={version}", Path(work)), Path(work, "templates"))
            _move(Path(work, "templates"), target)
    return target


def _fetch(package: str, work: Path) -> Path:
    name = package.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name, package, "--dest", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{package} cannot be fetched, and its chat templates are needed:\n{done.stderr[-2000:]}")
    (archive,) = work.glob("*.tar.gz")
    return archive


def _unpack(archive: Path, target: Path) -> None:
    target.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            inside, _, name = member.name.rpartition("/")
            content = tar.extractfile(member) if f"{inside}/".endswith(_INSIDE) and name.endswith(".jinja") else None
            if content is not None:
                (target / name).write_bytes(content.read())
    if not any(target.iterdir()):
        raise RuntimeError(f"{archive.name} has no *{_INSIDE}*.jinja")


def _move(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:  # another process was faster
        if not target.exists():
            raise


if __name__ == "__main__":
    sys.stdout.write(f"{folder()}: {len(os.listdir(folder()))} templates\n")
