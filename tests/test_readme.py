"""The documents keep their word: their Python runs, their make targets, files and names exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llama_worker
from tests import synth
from tests.synth_lora import lora

ROOT = Path(__file__).parent.parent
# Warnings are errors; but llama-cpp-python itself leaves /dev/null open.
WARNINGS = ["-W", "error", "-W", "ignore:unclosed file <_io.TextIOWrapper name='/dev/null'"]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(match[2], id=f"{path.name}:{path.read_text(encoding='utf-8')[: match.start()].count(chr(10)) + 1}")
    for path in DOCUMENTS
    for match in FENCE.finditer(path.read_text(encoding="utf-8"))
    if match[1] == "python"
]


def blocks(path: Path, language: str) -> list[str]:
    return [match[2] for match in FENCE.finditer(path.read_text(encoding="utf-8")) if match[1] == language]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.engine
@pytest.mark.parametrize("code", BLOCKS)
def test_the_python_runs(code: str, tmp_path: Path) -> None:
    """Each block stands alone: a reader may paste any one of them into a file."""
    if '"models/' in code:
        _put_models(tmp_path / "models")
    command = [sys.executable, *WARNINGS, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")


def _put_models(folder: Path) -> None:
    """What a reader has: a model, and adapters for it."""
    folder.mkdir()
    base = synth.llama(folder / "base.gguf")
    for seed, name in enumerate(("style", "facts")):
        lora(folder / f"{name}.gguf", base, seed=seed)


def test_the_readme_shows_every_way_in() -> None:
    """The bare worker and both frameworks have a quickstart."""
    shown = "\n".join(blocks(ROOT / "README.md", "python"))
    for module in ("llama_worker", "langchain_llama_worker", "llama_index.llms.llama_worker"):
        assert f"from {module} import" in shown


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(path: Path) -> None:
    asked = set(
        re.findall(r"\bmake ([a-z]+)\b", "\n".join([*blocks(path, "sh"), *re.findall(r"`[^`\n]+`", path.read_text())]))
    )
    assert asked <= make_targets()


def test_make_help_lists_the_targets() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert {"demo", "test", "check", "bench", "proof", "help"} <= set(
        re.findall(r"^  make (\w+)", done.stdout, re.MULTILINE)
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []


def test_the_documented_errors_are_the_real_ones() -> None:
    """docs/errors.md names every public error, and no other."""
    named = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE))
    real = {
        name
        for name in llama_worker.__all__
        if isinstance(value := getattr(llama_worker, name), type) and issubclass(value, Exception)
    }
    assert named == real


def test_the_migration_tables_name_our_parameters() -> None:
    """Whatever the right-hand columns call ours is a field of a setting or a request, or an adapter's method."""
    from llama_index.llms.llama_worker import LlamaWorkerLLM

    from langchain_llama_worker import ChatLlamaWorker
    from llama_worker import GenerationRequest, ModelConfig, SamplingParams, WorkerConfig

    settings = (ModelConfig, WorkerConfig, SamplingParams, GenerationRequest)
    ours = {name for kind in settings for name in kind.model_fields} | {*dir(ChatLlamaWorker), *dir(LlamaWorkerLLM)}
    migration = (ROOT / "README.md").read_text(encoding="utf-8").split("## Migration", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[2] for line in migration.splitlines() if line.startswith("| `")]
    named = {name for cell in rows for name in re.findall(r"`([a-z_]+)(?:=[^`]*)?`", cell)}
    assert len(named) >= 15
    assert named <= ours


def test_the_benchmarks_page_is_what_its_figures_render_to() -> None:
    from benchmarks import report

    lines = json.loads((ROOT / "docs" / "benchmarks.json").read_text(encoding="utf-8"))["lines"]
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == report.markdown(list(lines.values()))


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
