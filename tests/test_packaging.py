"""What the wheel and the source distribution hold."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from llama_worker import __version__

ROOT = Path(__file__).parent.parent
LEAVES = [
    "llama_worker",
    "langchain_llama_worker",
    "llama_index/llms/llama_worker",
    "llama_index/embeddings/llama_worker",
]
NAMESPACES = ["llama_index", "llama_index/llms", "llama_index/embeddings", "llama_index/postprocessor"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    built = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"]))
    with zipfile.ZipFile(built) as archive:
        yield archive


@pytest.fixture(scope="module")
def files(wheel: zipfile.ZipFile) -> set[str]:
    return set(wheel.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_is_a_typed_package(files: set[str], leaf: str) -> None:
    assert {f"{leaf}/__init__.py", f"{leaf}/py.typed"} <= files


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_wheel_leaves_the_shared_namespaces_open(files: set[str], namespace: str) -> None:
    """An __init__.py there would break llama_index.core for whoever installs us."""
    assert f"{namespace}/__init__.py" not in files


def test_the_wheel_holds_the_product_and_nothing_else(files: set[str]) -> None:
    tops = {name.split("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "llama_worker",
        "langchain_llama_worker",
        "llama_index",
    }
    sources = {
        path.relative_to(ROOT / root).as_posix()
        for root in ("worker", "adapters")
        for path in (ROOT / root).rglob("*.py")
    }
    assert sources == {name for name in files if name.endswith(".py")}


def test_the_metadata_says_what_a_user_needs(metadata: Message) -> None:
    assert metadata["Name"] == "llama-worker"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"langchain", "llama-index", "demo"} <= set(metadata.get_all("Provides-Extra") or [])


def test_the_core_needs_no_framework(metadata: Message) -> None:
    """Without an extra neither LangChain nor LlamaIndex is installed."""
    plain = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert plain
    assert not [line for line in plain if line.startswith(("langchain", "llama-index"))]


def test_the_source_distribution_can_be_built_and_tested(tmp_path: Path) -> None:
    built = next(SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with tarfile.open(built) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile", "requirements-demo.txt"} <= names
    assert {"worker/llama_worker/__init__.py", "tests/test_packaging.py", "examples/data/skarrow.md"} <= names
    assert {"benchmarks/__main__.py", "benchmarks/README.md"} <= names
    assert not [name for name in names if ".venv" in name or name.startswith(("benchmarks/.work", "dist/"))]
