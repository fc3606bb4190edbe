"""llama-server of the same source, as a process of its own on 127.0.0.1, read over streaming HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import drive, places, workload
from benchmarks.contestants.command import main
from benchmarks.drive import Figures, Pieces
from benchmarks.workload import ChatMessage

START_SECONDS = 120
HOST = "127.0.0.1"


class Server:
    """A running llama-server; streams raw completions and chats."""

    def __init__(self, port: int) -> None:
        self._port = port

    def complete(self, prompt: str, n_tokens: int, **more: Any) -> Pieces:
        asked = {"prompt": prompt, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True, "stream": True} | more
        tokens = 0
        for event in self._events("/completion", asked):
            yield event.get("content", "")
            tokens = event.get("tokens_predicted", tokens)
        return tokens

    def constrained(self, prompt: str, n_tokens: int) -> Pieces:
        return self.complete(prompt, n_tokens, json_schema=workload.RECORDS)

    def chat(self, messages: Sequence[ChatMessage], n_tokens: int) -> Pieces:
        asked = {"messages": list(messages), "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
        tokens = 0
        for event in self._events("/v1/chat/completions", asked | STREAM_WITH_USAGE):
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""
        return tokens

    def post(self, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
        """Send a request and return its connection, unread. Closing that is how a client cancels."""
        connection = http.client.HTTPConnection(HOST, self._port)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._port)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with contextlib.closing(self.post(path, body)) as connection:
            response = connection.getresponse()
            assert response.status == 200, response.read()[:500]
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])


STREAM_WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@contextlib.contextmanager
def running(model: str, threads: str, *, n_ctx: int, slots: int) -> Iterator[Server]:
    """Start llama-server with one unified cache for all slots, wait until it is loaded, stop it at the end."""
    port = free_port()
    sizes = ["-c", str(n_ctx), "-np", str(slots), "-kvu", "-t", threads, "-tb", threads]
    command = [str(places.tool("llama-server")), "-m", model, *sizes, "--host", HOST, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        server = Server(port)
        _wait_until_healthy(server, process)
        yield server
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def one_stream(model: str, threads: str) -> Figures:
    with running(model, threads, n_ctx=workload.ONE_STREAM.n_ctx, slots=1) as server:
        return drive.one_stream(server.complete)


def schema(model: str, threads: str) -> Figures:
    with running(model, threads, n_ctx=workload.SCHEMA.n_ctx, slots=1) as server:
        return drive.schema(server.complete, server.constrained)


def eight_streams(model: str, threads: str) -> Figures:
    work = workload.EIGHT_STREAMS
    with running(model, threads, n_ctx=work.n_ctx, slots=work.streams) as server:
        return drive.eight_streams(server.complete)


def agents(model: str, threads: str, variant: str) -> Figures:
    work = workload.AGENTS[variant]
    with running(model, threads, n_ctx=work.n_ctx, slots=work.agents) as server:
        return drive.agents(server.chat, work)


def cancel(model: str, threads: str) -> Figures:
    """Hang up in the middle of a prefill; how long until the next short request has its first token?"""
    with running(model, threads, n_ctx=4096, slots=1) as server:
        drive.listen(server.complete(workload.story(8, seed=99), 8), 8)
        return {"next_ms": max(_hang_up(server, seed, delay) for seed, delay in enumerate(workload.CANCEL_DELAYS))}


def _hang_up(server: Server, seed: int, delay: float) -> float:
    """Milliseconds from hanging up to the end of a one-token request."""
    body = {"prompt": workload.long_prompt(seed), "n_predict": 1, "stream": True}
    connection = server.post("/completion", body)
    threading.Event().wait(delay)
    began = time.perf_counter()
    connection.close()
    drive.listen(server.complete(workload.story(4, seed=200 + seed), 1), 1)
    return (time.perf_counter() - began) * 1e3


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not server.is_healthy():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"llama-server did not start: exit status {process.poll()}")
        time.sleep(0.05)


if __name__ == "__main__":
    main(
        {"one_stream": one_stream, "eight_streams": eight_streams, "schema": schema, "agents": agents, "cancel": cancel}
    )
