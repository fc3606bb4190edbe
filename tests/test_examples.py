"""Every example runs as a script on the demo models, and the retrieval example is right about its corpus."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Warnings are errors; but llama-cpp-python itself leaves /dev/null open, and LlamaIndex's workflows look at every
# attribute of an agent, deprecated ones of pydantic included.
WARNINGS = ["-W", "error", "-W", "ignore:unclosed file <_io.TextIOWrapper name='/dev/null'"]
WARNINGS += ["-W", "ignore::DeprecationWarning:inspect"]
EXAMPLES = ROOT / "examples"
QUESTIONS = json.loads((EXAMPLES / "data" / "questions.json").read_text(encoding="utf-8"))

# What the output must hold, by example; the arguments keep the generations short.
RUNS = {
    "demo.py": (["8"], ["LangChain, streamed:", "source: 'ferry", "the same vector in both: True"]),
    "langchain_chat.py": (["8"], ["'output_tokens': 8"]),
    "langchain_agent.py": (
        [],
        ["calls weather(", "A ferry goes to Bergen today at nine.", "It rains in Bergen. A ferry"],
    ),
    "llamaindex_agent.py": (
        [],
        ["calls weather({'town': '", "calls ferry({'town': '", "says: It rains in Bergen. A ferry goes today at nine."],
    ),
    "llamaindex_rag.py": (
        ["What do the sheep eat?"],
        ["passage: sheep", "quote:   The native sheep live on the shore"],
    ),
    "many_agents.py": (["8"], ["prompt tokens reused, 8 new", "What is fog?"]),
    "cancel_midway.py": (["2000"], ["left the stream after", "scope cancelled:", "deadline:", "the worker serves on"]),
    "prometheus_metrics.py": (
        ["8"],
        ['llama_worker_requests_total{outcome="length"} 1.0', "llama_worker_completion_tokens_total 8.0"],
    ),
    "hot_reload.py": (["8"], ["n_ctx 1024:", "still ends in order: Finished(", "n_ctx 4096:"]),
}


def test_every_example_is_run() -> None:
    assert set(RUNS) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_what_it_shows(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 50
    assert text.startswith('"""')


@pytest.mark.engine
@pytest.mark.parametrize("name", RUNS)
def test_the_example_runs(name: str) -> None:
    arguments, expected = RUNS[name]
    command = [sys.executable, *WARNINGS, EXAMPLES / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert [part for part in expected if part not in done.stdout] == []


def test_the_questions_fit_the_corpus() -> None:
    """At least twenty questions, each with a passage that exists."""
    headings = {line[3:] for line in (EXAMPLES / "data" / "skarrow.md").read_text().splitlines() if line[:3] == "## "}
    assert len(headings) >= 20
    assert len(QUESTIONS) >= 20
    assert {entry["passage"] for entry in QUESTIONS} <= headings


@pytest.fixture(scope="module")
def shared_workers() -> Iterator[None]:
    """The example opens its workers by configuration; the module shares them and closes them."""
    from llama_worker import close_all

    yield
    close_all()


@pytest.mark.engine
@pytest.mark.usefixtures("shared_workers")
def test_retrieval_finds_the_right_passage_and_quotes_it() -> None:
    """Top-1 is right for nine questions in ten, and each quote stands word for word in its passage."""
    from llama_index.core import VectorStoreIndex
    from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding

    from examples.llamaindex_rag import CORPUS, best_sentence, passages

    embedding = LlamaWorkerEmbedding(model="demo://all-minilm-l6-v2")
    retriever = VectorStoreIndex(passages(CORPUS), embed_model=embedding).as_retriever(similarity_top_k=1)
    right = 0
    for entry in QUESTIONS:
        top = retriever.retrieve(entry["question"])[0].node
        right += top.node_id == entry["passage"]
        assert best_sentence(entry["question"], top.get_content(), embedding) in top.get_content()
    assert right >= 0.9 * len(QUESTIONS), f"{right} of {len(QUESTIONS)}"


@pytest.mark.engine
@pytest.mark.usefixtures("shared_workers")
def test_editing_the_corpus_changes_answer_and_quote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the example says comes from the file, not from the model's memory."""
    from examples.llamaindex_rag import CORPUS, main

    edited = tmp_path / "edited.md"
    edited.write_text(CORPUS.read_text(encoding="utf-8").replace("eat seaweed", "eat turnips"), encoding="utf-8")
    said: list[dict[str, str]] = []
    for corpus in (CORPUS, edited):
        main("What do the sheep eat?", str(corpus), "24")
        lines = capsys.readouterr().out.splitlines()
        said.append({key: value.strip() for key, _, value in (line.partition(":") for line in lines)})
    assert [one["passage"] for one in said] == ["sheep", "sheep"]
    assert "seaweed" in said[0]["quote"]
    assert "turnips" in said[1]["quote"]
    assert said[0]["answer"] != said[1]["answer"]
