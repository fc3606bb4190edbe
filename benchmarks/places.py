"""Where things lie. Everything that is fetched or built goes into benchmarks/.work, which git ignores."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "benchmarks" / ".work"
DOCS = ROOT / "docs"


def sources(version: str) -> Path:
    """The unpacked source distribution of llama-cpp-python."""
    return WORK / f"llama_cpp_python-{version}"


def tool(name: str) -> Path:
    """An executable of our llama.cpp build."""
    return WORK / "build" / "bin" / name


def peer_python(name: str) -> Path:
    """The interpreter of the virtual environment of a peer."""
    return WORK / f"peers-{name}" / "bin" / "python"
