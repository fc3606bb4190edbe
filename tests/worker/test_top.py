"""A running worker, watched from another process of the same user."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_worker import (
    ConfigError,
    LlamaWorker,
    LlamaWorkerError,
    ModelNotFoundError,
    UnsupportedFeatureError,
    WorkerClosed,
)
from llama_worker import _exporter as exporter
from llama_worker.__main__ import main
from llama_worker._exporter import poll, state_of
from llama_worker._top import HEADINGS, fitting, look, row
from llama_worker.testing import Gate, fake_loader, fake_worker
from tests.worker.waiting import in_thread, wait_until

SECRET = "the harbour at night"


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "llama-worker"


@pytest.fixture
def worker() -> Iterator[LlamaWorker]:
    with fake_worker("Well, hello.", model="/home/somebody/tiny.gguf") as worker:
        yield worker


def test_a_poll_is_one_line_of_json_without_texts_and_paths(worker: LlamaWorker) -> None:
    path = worker.export()
    worker.generate(SECRET, max_tokens=50)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        said = connection.makefile().read()
    assert said.endswith("\n")
    assert said.count("\n") == 1
    state = json.loads(said)
    assert (state["pid"], state["model"]) == (os.getpid(), "tiny.gguf")
    assert state["metrics"]["finished"] == {"stop": 1}
    assert state["metrics"]["completion_tokens"] == worker.metrics().completion_tokens
    assert state["health"]["verdict"] == "healthy"
    assert not any(text in said for text in (SECRET, "hello", "somebody"))


def test_only_the_user_may_look(worker: LlamaWorker, runtime_folder: Path) -> None:
    path = worker.export()
    assert path.parent == runtime_folder
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(runtime_folder.stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_is_refused(worker: LlamaWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(ConfigError, match="somebody else"):
        worker.export()


def test_without_a_runtime_folder_there_is_one_for_temporary_files(
    worker: LlamaWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = worker.export()
    assert path.parent == tmp_path / f"llama-worker-{os.getuid()}"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="no folder can be made"):
        worker.export()


def test_the_socket_goes_with_the_worker(tmp_path: Path) -> None:
    worker = fake_worker()
    paths = [worker.export(tmp_path / "a.sock"), worker.export(str(tmp_path / "b.sock")), worker.export()]
    assert all(poll(path)["pid"] == os.getpid() for path in paths)
    worker.close()
    wait_until(lambda: not any(path.exists() for path in paths))
    with pytest.raises(WorkerClosed):
        _ = worker.info
    dropped = fake_worker()
    path = dropped.export()
    del dropped
    wait_until(lambda: not path.exists())


def test_a_reader_that_goes_away_harms_nobody(worker: LlamaWorker) -> None:
    path = worker.export()
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
    assert poll(path)["pid"] == os.getpid()


def test_a_poll_waits_for_no_step(tmp_path: Path) -> None:
    gate = Gate()
    with fake_worker(loader=fake_loader(gate=gate)) as worker:
        path = worker.export(tmp_path / "w.sock")
        gate.shut()
        stream = worker.stream("Hello", max_tokens=1)
        gate.wait_reached()
        assert in_thread(lambda: poll(path)["running"])() == 1
        gate.open()
        assert list(stream)


def test_what_a_dead_process_left_behind_is_replaced(worker: LlamaWorker, tmp_path: Path) -> None:
    path = tmp_path / "w.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # and never listens, as after a crash
    assert worker.export(path) == path
    assert poll(path)["model"] == "tiny.gguf"


def test_paths_that_cannot_be_used_are_named(worker: LlamaWorker, tmp_path: Path) -> None:
    path = worker.export(tmp_path / "w.sock")
    with pytest.raises(ConfigError, match="another worker"):
        worker.export(path)
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="no socket"):
        worker.export(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    with pytest.raises(ConfigError, match="no socket can be made"):
        worker.export(tmp_path / "missing" / "w.sock")
    with pytest.raises(ConfigError, match="no socket can be made"):
        worker.export(tmp_path / ("x" * 200))
    assert poll(path)["pid"] == os.getpid()


def test_without_local_sockets_it_says_so(worker: LlamaWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(UnsupportedFeatureError, match="Unix sockets"):
        worker.export()
    with pytest.raises(UnsupportedFeatureError, match="Unix sockets"):
        exporter.check_platform("top")


# -- top


def test_one_frame_of_every_worker(worker: LlamaWorker, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    worker.export()
    with fake_worker(model="fake://other") as other:
        other.export()
        worker.generate("Hello", max_tokens=9)
        assert main(["top", "--once"]) == 0
    out = capsys.readouterr().out
    heading, *lines = [line.split() for line in out.splitlines()]
    assert heading[:3] == ["pid", "model", "health"]
    assert sorted(line[:3] for line in lines) == [
        [str(os.getpid()), name, "healthy"] for name in ("other", "tiny.gguf")
    ]


def test_a_row_has_what_the_headings_promise(worker: LlamaWorker) -> None:
    (before,) = look(str(worker.export())).values()
    for _ in range(3):
        worker.generate("Hello", max_tokens=5)
    (state,) = look(str(worker.export())).values()
    first = dict(zip(HEADINGS, row(before, None, 0.0), strict=True))
    shown = dict(zip(HEADINGS, row(state, before, 2.0), strict=True))
    assert (first["done"], first["tok/s"], first["TTFT"], first["reuse"]) == ("0", "-", "-", "-")
    assert (shown["done"], shown["failed"], shown["run"], shown["queue"]) == ("3", "0", "0", "0")
    assert shown["tok/s"] == f"{worker.metrics().decode_tokens / 2:.1f}"
    assert shown["reuse"] == f"{100 * (worker.cache_metrics().reuse_ratio or 0):.0f} %"
    assert shown["TTFT"].endswith(" ms")


def test_nothing_to_watch_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["top", "--once"]) == 2
    assert "worker.export()" in capsys.readouterr().err
    with pytest.raises(LlamaWorkerError, match="no worker is exported"):
        look(str(tmp_path / "none.sock"))


def test_without_rich_it_says_what_to_install(
    worker: LlamaWorker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.export()
    monkeypatch.setitem(sys.modules, "rich.live", None)
    assert main(["top", "--once"]) == 2
    assert "llama-worker[top]" in capsys.readouterr().err


def test_it_is_live_until_ctrl_c(worker: LlamaWorker) -> None:
    """In a terminal of its own; a request between two frames shows in the later one."""
    path = worker.export()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "llama_worker", "top", str(path), "--interval", "0.1"]
    watcher = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "180"}
    )
    os.close(theirs)
    seen = b""
    while b"healthy" not in seen:
        seen += os.read(ours, 4096)
    assert b"ms" not in seen
    worker.generate("Hello", max_tokens=9)
    while b" ms" not in seen:
        seen += os.read(ours, 4096)
    watcher.send_signal(signal.SIGINT)
    reading = in_thread(lambda: drain(ours))
    assert watcher.wait(30) == 130
    reading()
    os.close(ours)


def drain(terminal: int) -> int:
    """Read until the other side is closed."""
    n = 0
    try:
        while data := os.read(terminal, 4096):
            n += len(data)
    except OSError:
        pass
    return n


def test_what_is_exported_names_files_without_their_folders(tmp_path: Path):
    worker = LlamaWorker.begin(str(tmp_path / "alice" / "secret" / "model.gguf"))
    with pytest.raises(ModelNotFoundError):
        assert worker.info
    reason = state_of(worker._service, "model")["health"]["reason"]
    assert "model.gguf" in reason
    assert "alice" not in reason


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_a_narrow_terminal_shows_fewer_columns_and_those_whole(worker: LlamaWorker, width: int) -> None:
    worker.generate(SECRET, max_tokens=5)
    lines = [HEADINGS, row(poll(worker.export()), None, 0.0)]
    kept = fitting(lines, width)
    assert sum(1 + max(len(line[column]) for line in lines) for column in kept) <= width
    assert {"model", "health", "run", "tok/s", "failed"} <= {HEADINGS[column] for column in kept}
    assert kept == list(range(len(HEADINGS))) if width == 160 else kept == sorted(kept)
