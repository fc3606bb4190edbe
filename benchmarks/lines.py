"""The lines of the table: who does what work, and what is claimed of the figures."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Literal, TypeAlias

from benchmarks import places

Environment: TypeAlias = Literal["project", "langchain", "xllamacpp"]
Model: TypeAlias = Literal["chat", "embedding", "both"]

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
FEWER_CORES = max(1, CORES - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """`script` run for `work` in a virtual environment. `gates`: a claim rests on it, so it runs in every round;
    the others show where one stands and run in a few."""

    name: str
    script: str
    work: str
    environment: Environment = "project"
    model: Model = "chat"
    threads: int = CORES
    options: tuple[str, ...] = ()
    gates: bool = True

    def command(self, chat_model: str, embedding_model: str) -> list[str]:
        models = {"chat": [chat_model], "embedding": [embedding_model], "both": [chat_model]}[self.model]
        extra = [embedding_model] if self.model == "both" else []
        module = f"benchmarks.contestants.{self.script}"
        arguments = [self.work, *models, str(self.threads), *extra, *self.options]
        return [_interpreter(self.environment), "-W", "ignore::DeprecationWarning", "-m", module, *arguments]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of one contestant."""

    contestant: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`top` / `bottom` (or `top` itself) is at least, or at most, `target`.

    It passes when the interval reaches the target and the median misses it by no more than `slack`.
    A claim without a target is only reported.
    """

    text: str
    top: Figure
    bottom: Figure | None = None
    target: float | None
    at_most: bool = False
    slack: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One row of the table. `rounds`: how many in full, and how many in quick."""

    name: str
    title: str
    unit: str
    shown: str
    contestants: tuple[Contestant, ...]
    claims: tuple[Claim, ...]
    rounds: int
    quick_rounds: int = 3


def _interpreter(environment: Environment) -> str:
    if environment == "project":
        return sys.executable
    return str(places.peer_python(environment))


def _ratio(
    text: str, top: tuple[str, str], bottom: tuple[str, str], target: float | None, *, at_most: bool = False
) -> Claim:
    figures = {"top": Figure(contestant=top[0], name=top[1]), "bottom": Figure(contestant=bottom[0], name=bottom[1])}
    return Claim(text=text, **figures, target=target, at_most=at_most)


def _at_most(text: str, figure: tuple[str, str], target: float) -> Claim:
    top = Figure(contestant=figure[0], name=figure[1])
    return Claim(text=text, top=top, target=target, at_most=True, slack=0.02 * target)


def _report(text: str, figure: tuple[str, str]) -> Claim:
    return Claim(text=text, top=Figure(contestant=figure[0], name=figure[1]), target=None)


OURS = "llama-worker"
BENCH, BATCHED, BATCHED_UNIFIED = "llama-bench", "llama-batched-bench", "llama-batched-bench -kvu"
SERVER, LANGCHAIN, XLLAMACPP = "llama-server", "ChatLlamaCpp", "xllamacpp"
LLAMA = "llama-cpp-python"
BOUND, CTYPES = "bare loop", "plain ctypes loop"


def _server(work: str, *, gates: bool = True) -> Contestant:
    return Contestant(name=SERVER, script="llama_server", work=work, gates=gates)


def _langchain(work: str, *, gates: bool) -> Contestant:
    return Contestant(name=LANGCHAIN, script="langchain_llamacpp", work=work, environment="langchain", gates=gates)


ONE_STREAM = Line(
    name="one_stream",
    title="One stream, decoding",
    unit="tok/s",
    shown="tok_s",
    contestants=(
        Contestant(name=OURS, script="ours", work="one_stream"),
        Contestant(name=BENCH, script="native", work="one_stream"),
        _server("one_stream", gates=False),
        _langchain("one_stream", gates=False),
    ),
    claims=(
        _ratio("of llama-bench", (OURS, "tok_s"), (BENCH, "tok_s"), 0.97),
        _ratio("of llama-server", (OURS, "tok_s"), (SERVER, "tok_s"), None),
        _ratio("of ChatLlamaCpp", (OURS, "tok_s"), (LANGCHAIN, "tok_s"), None),
    ),
    rounds=30,
    quick_rounds=5,
)

EIGHT_STREAMS = Line(
    name="eight_streams",
    title="8 streams at once, prefill included",
    unit="tok/s",
    shown="tok_s",
    contestants=(
        Contestant(name=OURS, script="ours", work="eight_streams"),
        Contestant(name=BATCHED, script="native", work="eight_streams"),
        Contestant(name=BATCHED_UNIFIED, script="native", work="eight_streams", options=("-kvu",)),
        _server("eight_streams"),
        _langchain("eight_streams", gates=False),
    ),
    claims=(
        _ratio("of llama-batched-bench", (OURS, "tok_s"), (BATCHED, "tok_s"), 0.95),
        _ratio("of llama-batched-bench, unified cache", (OURS, "tok_s"), (BATCHED_UNIFIED, "tok_s"), 0.95),
        _ratio("of llama-server", (OURS, "tok_s"), (SERVER, "tok_s"), 1.1),
        _ratio("of ChatLlamaCpp, one after the other", (OURS, "tok_s"), (LANGCHAIN, "tok_s"), None),
    ),
    rounds=30,
    quick_rounds=5,
)


def _agents_line(name: str, title: str, variant: str) -> Line:
    given = {"work": "agents", "options": (variant,)}
    return Line(
        name=name,
        title=title,
        unit="s",
        shown="wall_s",
        contestants=(
            Contestant(name=OURS, script="ours", **given),
            Contestant(name=BOUND, script="bare_loop", **given),
            Contestant(name=SERVER, script="llama_server", **given),
            Contestant(name=LANGCHAIN, script="langchain_llamacpp", environment="langchain", **given),
            Contestant(name=XLLAMACPP, script="xllamacpp_server", environment="xllamacpp", gates=False, **given),
        ),
        claims=(
            _ratio("wall: speed of the bound", (BOUND, "wall_s"), (OURS, "wall_s"), 0.9),
            _ratio("wall: × llama-server", (SERVER, "wall_s"), (OURS, "wall_s"), 1.4),
            _ratio("wall: × ChatLlamaCpp", (LANGCHAIN, "wall_s"), (OURS, "wall_s"), 2.0),
            _ratio("wall: × xllamacpp", (XLLAMACPP, "wall_s"), (OURS, "wall_s"), None),
            _ratio("mean TTFT: speed of the bound", (BOUND, "ttft_s"), (OURS, "ttft_s"), 0.9),
            _ratio("mean TTFT: × llama-server", (SERVER, "ttft_s"), (OURS, "ttft_s"), 1.4),
            _ratio("mean TTFT: × ChatLlamaCpp", (LANGCHAIN, "ttft_s"), (OURS, "ttft_s"), 2.0),
            _ratio("mean TTFT: × xllamacpp", (XLLAMACPP, "ttft_s"), (OURS, "ttft_s"), None),
        ),
        rounds=5,
    )


AGENTS = _agents_line("agents", "4 agents × 4 turns over a shared 500-word system prompt", "4x4")
AGENTS_8 = _agents_line("agents_8", "8 agents × 6 turns over a shared 500-word system prompt", "8x6")
AGENTS_TOOLS = _agents_line(
    "agents_tools", "4 agents × 4 turns over a shared system prompt of 500 words and 20 functions", "tools"
)

SCHEMA = Line(
    name="schema",
    title="One stream held to a JSON schema",
    unit="tok/s",
    shown="schema_tok_s",
    contestants=(
        Contestant(name=OURS, script="ours", work="schema"),
        _server("schema", gates=False),
        Contestant(name=LLAMA, script="langchain_llamacpp", work="schema", environment="langchain", gates=False),
    ),
    claims=(
        _ratio("of free decoding", (OURS, "schema_tok_s"), (OURS, "free_tok_s"), 0.95),
        _ratio("llama-server, of its free decoding", (SERVER, "schema_tok_s"), (SERVER, "free_tok_s"), None),
        _ratio("llama-cpp-python, of its free decoding", (LLAMA, "schema_tok_s"), (LLAMA, "free_tok_s"), None),
        _ratio("× llama-server", (OURS, "schema_tok_s"), (SERVER, "schema_tok_s"), None),
        _ratio("× llama-cpp-python", (OURS, "schema_tok_s"), (LLAMA, "schema_tok_s"), None),
    ),
    rounds=5,
)

EMBEDDINGS = Line(
    name="embeddings",
    title="Embeddings, 256 texts of 8 to 60 words",
    unit="texts/s",
    shown="texts_s",
    contestants=(
        Contestant(name=OURS, script="ours", work="embeddings", model="embedding"),
        Contestant(
            name="LlamaCppEmbeddings",
            script="langchain_llamacpp",
            work="embeddings",
            environment="langchain",
            model="embedding",
        ),
    ),
    claims=(
        _ratio("× LlamaCppEmbeddings", (OURS, "texts_s"), ("LlamaCppEmbeddings", "texts_s"), 1.5),
        _ratio("same vectors: at least", (OURS, "fingerprint"), ("LlamaCppEmbeddings", "fingerprint"), 0.99),
        _ratio(
            "same vectors: at most", (OURS, "fingerprint"), ("LlamaCppEmbeddings", "fingerprint"), 1.01, at_most=True
        ),
    ),
    rounds=8,
)

CANCEL = Line(
    name="cancel",
    title="Cancel in a 2,000-token prefill, until the next request has its token",
    unit="ms",
    shown="next_ms",
    contestants=(
        Contestant(name=OURS, script="ours", work="cancel"),
        _server("cancel", gates=False),
    ),
    claims=(
        _at_most("ms until the stream ends, worst of 5", (OURS, "ended_ms"), 50.0),
        _at_most("ms until the next request has its token, worst of 5", (OURS, "next_ms"), 50.0),
    ),
    rounds=8,
)

BUSY = Line(
    name="busy",
    title=f"4 streams beside a busy Python thread, n_threads = cores - 1 ({FEWER_CORES})",
    unit="tok/s",
    shown="busy_tok_s",
    contestants=(
        Contestant(name=OURS, script="ours", work="busy", threads=FEWER_CORES),
        Contestant(name=CTYPES, script="bare_loop", work="busy", threads=FEWER_CORES),
    ),
    claims=(
        _ratio("of idle, generate()", (OURS, "busy_tok_s"), (OURS, "idle_tok_s"), 0.7),
        _ratio("× plain ctypes", (OURS, "busy_tok_s"), (CTYPES, "busy_tok_s"), 1.2),
        _ratio("of idle, stream()", (OURS, "busy_stream_tok_s"), (OURS, "idle_stream_tok_s"), None),
        _ratio("plain ctypes, of idle", (CTYPES, "busy_tok_s"), (CTYPES, "idle_tok_s"), None),
    ),
    rounds=8,
)

BUSY_ALL_CORES = Line(
    name="busy_all_cores",
    title=f"4 streams beside a busy Python thread, n_threads = cores ({CORES})",
    unit="tok/s",
    shown="busy_tok_s",
    contestants=(
        Contestant(name=OURS, script="ours", work="busy", threads=CORES),
        Contestant(name=CTYPES, script="bare_loop", work="busy", threads=CORES),
    ),
    claims=(
        _ratio("of idle, generate()", (OURS, "busy_tok_s"), (OURS, "idle_tok_s"), None),
        _ratio("× plain ctypes", (OURS, "busy_tok_s"), (CTYPES, "busy_tok_s"), None),
    ),
    rounds=8,
)

TOKEN_COST = Line(
    name="token_cost",
    title="Python's time per token, 8 sequences, without decoding and sampling",
    unit="µs",
    shown="long_us",
    contestants=(
        Contestant(name=OURS, script="token_cost", work="token_cost"),
        Contestant(name="Llama", script="token_cost", work="token_cost_llama", environment="langchain", gates=False),
    ),
    claims=(
        _at_most("µs after a 16-word prompt", (OURS, "short_us"), 30.0),
        _at_most("µs after a 3,000-word prompt", (OURS, "long_us"), 30.0),
        _ratio("long against short", (OURS, "long_us"), (OURS, "short_us"), 1.2, at_most=True),
        _report("µs after a 16-word prompt, generate()", (OURS, "short_whole_us")),
        _report("µs after a 3,000-word prompt, generate()", (OURS, "long_whole_us")),
        _report("µs of CPU after a 16-word prompt", (OURS, "short_cpu_us")),
        _report("µs of CPU after a 3,000-word prompt", (OURS, "long_cpu_us")),
    ),
    rounds=5,
)

SPECULATION = Line(
    name="speculation",
    title="One stream that copies its prompt, with drafts where they pay",
    unit="tok/s",
    shown="copy_tok_s",
    contestants=(Contestant(name=OURS, script="ours", work="speculation"),),
    claims=(
        _ratio("copied text: of decoding without drafts", (OURS, "copy_tok_s"), (OURS, "copy_plain_tok_s"), 0.97),
        _ratio("other text: of decoding without drafts", (OURS, "story_tok_s"), (OURS, "story_plain_tok_s"), 0.97),
        _report("drafts that were right", (OURS, "acceptance")),
    ),
    rounds=5,
)

TWO_WORKERS = Line(
    name="two_workers",
    title="A chat and an embedding worker at once, against one after the other",
    unit="s",
    shown="at_once_s",
    contestants=(Contestant(name=OURS, script="ours", work="two_workers", model="both"),),
    claims=(_ratio("time at once / sum of the times alone", (OURS, "at_once_s"), (OURS, "sum_s"), 1.15, at_most=True),),
    rounds=8,
)

LINES = (
    ONE_STREAM,
    EIGHT_STREAMS,
    AGENTS,
    AGENTS_8,
    AGENTS_TOOLS,
    SCHEMA,
    EMBEDDINGS,
    CANCEL,
    BUSY,
    BUSY_ALL_CORES,
    TOKEN_COST,
    SPECULATION,
    TWO_WORKERS,
)
