"""`python -m llama_worker`: look at a model, or talk to it.

    describe MODEL    what its header says, how it calls tools, and what memory it would take
    top [SOCKET]      the workers that are exported by running processes, live
    chat MODEL        Ctrl-C ends an answer, Ctrl-D or /exit the program

Errors are one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from llama_worker import (
    EventStream,
    Failed,
    Finished,
    LlamaWorker,
    LlamaWorkerError,
    MemoryPlan,
    Message,
    ModelConfig,
    ModelInfo,
    ReasoningDelta,
    RequestError,
    SamplingParams,
    TemplateError,
    TextDelta,
    UnsupportedFeatureError,
    inspect_model,
    plan_memory,
)
from llama_worker._chat.analysis import format_of
from llama_worker._chat.template import CHATML, ChatTemplate
from llama_worker._format_shown import shown_format
from llama_worker._memory import shown_bytes
from llama_worker._top import top

_FAILED = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except LlamaWorkerError as error:
        _complain(error)
        return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llama_worker", description="Look at a GGUF model, or talk to it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model", metavar="MODEL", help="a path to a GGUF file, or demo://smollm2-135m-instruct")
    common.add_argument("--n-ctx", type=int, default=4096, help="tokens of context; 0: what it was trained with")
    describe = commands.add_parser("describe", parents=[common], help="what a model is and what memory it takes")
    describe.set_defaults(run=_describe)
    chat = commands.add_parser("chat", parents=[common], help="talk to a model")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--temperature", type=float, help="0 always takes the likeliest token; default 0.8")
    chat.add_argument("--max-tokens", type=int, help="end each answer after so many tokens")
    chat.add_argument("--n-threads", type=int, help="CPU threads; default: the physical cores")
    chat.add_argument("--seed", type=int, help="for answers that can be repeated")
    chat.set_defaults(run=_chat)
    top = commands.add_parser("top", help="watch the workers of running processes")
    top.add_argument("path", metavar="SOCKET", nargs="?", help="what worker.export() returned; default: all")
    top.add_argument("--once", action="store_true", help="print one frame and end")
    top.add_argument("--interval", type=float, default=1.0, help="seconds between two frames; default 1")
    top.set_defaults(run=_top)
    return parser


def _complain(error: LlamaWorkerError) -> None:
    print("llama_worker:", " ".join(str(error).split()), file=sys.stderr)


# --- describe


def _describe(options: argparse.Namespace) -> int:
    config = ModelConfig(model=options.model, n_ctx=options.n_ctx)
    info = inspect_model(options.model)
    rows = [*_model_rows(info), *_format_rows(info), ("", ""), *_memory_rows(config, plan_memory(config))]
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{label:<{width}}  {value}".rstrip() for label, value in rows))
    return 0


def _model_rows(info: ModelInfo) -> list[tuple[str, str]]:
    return [
        ("model", info.name),
        ("file", str(Path(info.path))),
        ("architecture", f"{info.architecture}, {_kind(info)}"),
        ("size", f"{shown_bytes(info.size)}, {info.n_params / 1e6:,.1f} million parameters"),
        ("trained context", f"{info.n_ctx_train:,} tokens"),
        ("vocabulary", f"{info.n_vocab:,} tokens"),
        ("layers", f"{info.n_layer}, {info.n_embd} wide, {info.n_head} heads, {info.n_head_kv} KV heads"),
        ("chat template", f"{len(info.chat_template):,} characters" if info.chat_template else "none"),
        ("digest", info.digest),
    ]


def _format_rows(info: ModelInfo) -> list[tuple[str, str]]:
    """How its replies are read: see `_chat/format.py`. BOS and EOS are left out, they stand in no call."""
    if info.is_embedding:
        return []
    try:
        template = ChatTemplate(info.chat_template or CHATML, bos_text="", eos_text="")
    except TemplateError as error:
        return [("chat format", f"none: {error}")]
    return shown_format(format_of(template))


def _kind(info: ModelInfo) -> str:
    if info.is_embedding:
        return f"embeds texts (pooling: {info.pooling or 'mean'})"
    memory = "recurrent" if info.is_recurrent else "hybrid" if info.is_hybrid else "attention"
    window = f", sliding window of {info.n_swa:,} tokens" if info.n_swa else ""
    return f"generates text ({memory}{window})"


def _memory_rows(config: ModelConfig, memory: MemoryPlan) -> list[tuple[str, str]]:
    cells = f" ({memory.n_cells:,} tokens, {config.type_k})" if memory.n_cells else ""
    when = ", at the first text" if memory.n_cells else ""
    return [
        ("weights", f"{shown_bytes(memory.weights)} (mapped from the file)"),
        ("KV cache", shown_bytes(memory.kv) + cells),
        ("compute buffers", f"{shown_bytes(memory.compute)} at most"),
        ("embedding", f"{shown_bytes(memory.embedding)} at most{when}"),
        ("saved states", f"{shown_bytes(memory.saved)} at most, as they come"),
        ("free RAM", shown_bytes(memory.free_ram)),
        ("free on devices", "no layer goes there" if memory.free_device is None else shown_bytes(memory.free_device)),
        ("verdict", memory.verdict),
    ]


# --- top


def _top(options: argparse.Namespace) -> int:
    top(options.path, once=options.once, interval=max(options.interval, 0.1))
    return 0


# --- chat


def _chat(options: argparse.Namespace) -> int:
    sampling = {
        name: value for name in ("temperature", "max_tokens", "seed") if (value := getattr(options, name)) is not None
    }
    SamplingParams(**sampling)  # complain before a model is loaded
    if inspect_model(options.model).is_embedding:
        raise UnsupportedFeatureError("chat", f"{options.model} embeds texts; use LlamaWorker.embed")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits lines with it
    history = (Message(role="system", content=options.system),) if options.system else ()
    config = ModelConfig(model=options.model, n_ctx=options.n_ctx, n_threads=options.n_threads, n_parallel=1)
    with LlamaWorker(config) as worker:
        _Chat(worker, sampling).run(history)
    return 0


class _Chat:
    """Lines in, answers out. Ctrl-C ends what is under way, a line or an answer, and nothing else.

    It closes the stream, which then ends in order, instead of raising somewhere within it.
    """

    def __init__(self, worker: LlamaWorker, sampling: dict[str, Any]) -> None:
        self._worker = worker
        self._sampling = sampling
        self._prompt = "> " if sys.stdin.isatty() else ""
        self._stream: EventStream | None = None
        self._reading = False

    def run(self, history: tuple[Message, ...]) -> None:
        previous = signal.signal(signal.SIGINT, self._interrupt)
        try:
            while (line := self._read()) is not None:
                if line:
                    history = self._turn((*history, Message(role="user", content=line)), history)
        finally:
            signal.signal(signal.SIGINT, previous)

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self._stream is not None:
            self._stream.close()
        elif self._reading:
            self._reading = False  # a second Ctrl-C must not interrupt the answer to the first
            raise KeyboardInterrupt

    def _read(self) -> str | None:
        """The next line, "" for nothing to answer, None for the end."""
        self._reading = True
        try:
            line = input(self._prompt).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)")
            return ""
        finally:
            self._reading = False
        return None if line == "/exit" else line

    def _turn(self, messages: tuple[Message, ...], before: tuple[Message, ...]) -> tuple[Message, ...]:
        """Print the answer as it comes; the history with it, or that of `before` if it cannot be given."""
        try:
            with self._worker.stream(messages, **self._sampling) as self._stream:
                return (*messages, Message(role="assistant", content=_print_answer(self._stream)))
        except RequestError as error:
            _complain(error)
            return before
        finally:
            self._stream = None


_NOTES = {"cancelled": " (cancelled)", "length": " (cut: no more tokens were allowed)"}
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def _print_answer(stream: EventStream) -> str:
    """The whole answer. Raises what the request failed with.

    Thoughts are shown at a terminal only: who reads a pipe asked for the answer.
    """
    text, thoughts = "", _Thoughts(visible=sys.stdout.isatty())
    for event in stream:
        match event:
            case ReasoningDelta():
                thoughts.show(event.text)
            case TextDelta():
                thoughts.end()
                print(event.text, end="", flush=True)
            case Finished():
                thoughts.end()
                print(_NOTES.get(event.reason, ""), flush=True)
                text = event.text
            case Failed():
                thoughts.end()
                print(flush=True)
                raise event.error
    return text


class _Thoughts:
    """What is thought before an answer, set off from it by a line, and dim where the terminal can."""

    def __init__(self, *, visible: bool) -> None:
        self._visible = visible
        is_dumb = os.environ.get("TERM", "dumb") == "dumb"
        self._before, self._after = ("", "") if is_dumb else (_DIM, _PLAIN)
        self._open = False

    def show(self, text: str) -> None:
        if self._visible:
            print(text if self._open else self._before + text, end="", flush=True)
            self._open = True

    def end(self) -> None:
        if self._open:
            print(self._after, end="\n\n", flush=True)
            self._open = False


if __name__ == "__main__":
    sys.exit(main())
