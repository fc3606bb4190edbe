"""Who may import whom, and what an import must not load. pyproject.toml holds most of the rules."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
NAMESPACES = ["", "llms", "embeddings", "postprocessor"]
LEAVES = ["langchain_llama_worker", "llama_index.llms.llama_worker", "llama_index.embeddings.llama_worker"]
PRODUCT = sorted([*(ROOT / "worker").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")])


def imported_modules(path: Path) -> set[str]:
    """Every module that `path` names in an import, at any depth of the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return found


def modules_after(statement: str) -> set[str]:
    """What `sys.modules` holds in a fresh interpreter after `statement`."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_the_import_contracts_hold() -> None:
    """import-linter finds no forbidden arrow."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_the_llama_index_adapter_imports_llama_index(path: Path) -> None:
    uses = {name for name in imported_modules(path) if name.startswith("llama_index")}
    assert not uses or path.is_relative_to(ROOT / "adapters" / "llama_index")


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_product_does_not_import_its_testing_tools(path: Path) -> None:
    uses = {name for name in imported_modules(path) if name.startswith("llama_worker.testing")}
    assert not uses or path.is_relative_to(ROOT / "worker" / "llama_worker" / "testing")


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_call_hides_in_an_executor(path: Path) -> None:
    """Async calls are native: an executor's thread could be neither cancelled nor joined."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"run_in_executor\(|to_thread\(|ThreadPoolExecutor\(", text)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_shared_namespaces_have_no_init(namespace: str) -> None:
    """One __init__.py here would hide llama_index.core, or every other integration, from Python."""
    assert not (ROOT / "adapters" / "llama_index" / namespace / "__init__.py").exists()


def test_importing_the_worker_loads_no_engine_and_no_framework() -> None:
    loaded = modules_after("import llama_worker")
    assert "llama_worker" in loaded
    assert not {name for name in loaded if name.split(".")[0] in {"llama_cpp", "langchain_core", "llama_index"}}


@pytest.mark.parametrize("leaf", LEAVES)
def test_importing_an_adapter_loads_no_engine(leaf: str) -> None:
    assert "llama_cpp" not in modules_after(f"import {leaf}")


def test_the_adapters_stand_beside_the_frameworks() -> None:
    """Ours and LlamaIndex's own packages share one namespace; each adapter leaves the other framework alone."""
    loaded = modules_after(
        "import llama_index.llms.llama_worker, llama_index.embeddings.llama_worker, llama_index.core"
    )
    assert {"llama_index.core", "llama_index.llms.llama_worker", "llama_index.embeddings.llama_worker"} <= loaded
    assert not {name for name in loaded if name.startswith(("langchain_llama_worker", "langchain_core"))}
    assert not {name for name in modules_after("import langchain_llama_worker") if name.startswith("llama_index")}


@pytest.fixture(params=["llama_worker", "llama_worker.testing", *LEAVES])
def package(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def test_all_names_the_public_surface(package: ModuleType) -> None:
    """__all__ is there, has no double entry, hides nothing private, and every name in it exists."""
    names = package.__all__
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("_") and name != "__version__"]
    assert not [name for name in names if not hasattr(package, name)]


def test_every_error_is_public() -> None:
    """Callers catch errors by name, so each class of the tree that the module draws is exported."""
    import llama_worker
    from llama_worker import _errors

    drawn = set(
        re.findall(
            r"^(?:[│ ]*[├└]── )?(\w*(?:Error|Full|Exceeded|Cancelled|Closed|Died))\b", _errors.__doc__ or "", re.M
        )
    )
    assert len(drawn) >= 17
    assert drawn <= set(llama_worker.__all__)
