"""The command line, as a person uses it: at a terminal, in a pipe, and with mistakes."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_worker import Message
from llama_worker.__main__ import _print_answer, main
from llama_worker.testing import fake_worker
from tests import synth
from tests.worker.tools import QWEN

SMOLLM2 = "demo://smollm2-135m-instruct"
COMMAND = [sys.executable, "-m", "llama_worker"]
CHAT = [*COMMAND, "chat", SMOLLM2, "--temperature", "0", "--n-threads", "1"]


class TestDescribe:
    def test_a_table_of_the_model_and_its_memory(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["describe", SMOLLM2, "--n-ctx", "8192"]) == 0
        rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if line)
        rows = {label: value.strip() for label, value in rows.items()}
        assert rows["model"] == "SmolLM2-135M-Instruct.Q4_1"
        assert rows["architecture"] == "llama, generates text (attention)"
        assert rows["trained context"] == "8,192 tokens"
        assert rows["KV cache"] == "180.0 MiB (8,192 tokens, f16)"
        assert rows["weights"] == "92.1 MiB (mapped from the file)"
        assert re.fullmatch(r"\d+\.\d MiB at most", rows["compute buffers"])
        assert re.fullmatch(r"\d+\.\d MiB at most, at the first text", rows["embedding"])
        assert re.fullmatch(r"\d+\.\d [MG]iB", rows["free RAM"])
        assert rows["free on devices"]
        assert rows["verdict"].startswith("fits: needs ")
        assert rows["chat format"].startswith("generic (")
        assert rows["tool calls"] == r'<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>'
        assert rows["begin with"] == "<tool_call>"
        assert rows["thoughts"] == "none"

    def test_what_a_template_writes_is_read_off_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = synth.llama(tmp_path / "thinker.gguf", template=QWEN)
        assert main(["describe", str(model)]) == 0
        out = capsys.readouterr().out
        assert re.search(r"chat format +derived \(", out)
        assert re.search(r"thoughts +<think> … </think>", out)
        assert re.search(r"turned on and off +by enable_thinking", out)

    def test_a_template_that_does_not_compile_is_still_described(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = synth.llama(tmp_path / "broken.gguf", template="{% if %}")
        assert main(["describe", str(model)]) == 0
        assert re.search(r"chat format +none: .*does not compile", capsys.readouterr().out)

    def test_an_embedding_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["describe", "demo://all-minilm-l6-v2"]) == 0
        assert "bert, embeds texts (pooling: mean)" in capsys.readouterr().out

    def test_what_does_not_fit_is_still_described(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["describe", SMOLLM2, "--n-ctx", "16000000"]) == 0
        assert "does not fit" in capsys.readouterr().out


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["describe", "gone.gguf"], "no file gone.gguf"),
            (["describe", "demo://gpt"], "unknown demo model"),
            (["describe", SMOLLM2, "--n-ctx", "-1"], "n_ctx=-1"),
            (["chat", SMOLLM2, "--temperature", "-3"], "temperature=-3.0"),
            (["chat", SMOLLM2, "--max-tokens", "0"], "max_tokens=0"),
            (["chat", "demo://all-minilm-l6-v2"], "embeds texts"),
        ],
    )
    def test_one_line_on_stderr_and_status_2(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(arguments) == 2
        output, errors = capsys.readouterr()
        assert output == ""
        assert errors.count("\n") == 1
        assert message in errors

    def test_the_program_itself_ends_with_status_2(self) -> None:
        done = subprocess.run([*COMMAND, "chat", "gone.gguf"], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("llama_worker: there is no file gone.gguf")


@pytest.mark.engine
class TestChat:
    def test_a_pipe_gets_answers_only(self) -> None:
        """The second answer shows that the first turn is remembered: greedy, it repeats the name."""
        done = subprocess.run(
            [*CHAT, "--max-tokens", "12", "--n-ctx", "512"],
            input="My name is Paris.\n\nWhat is my name?\n/exit\nnever asked\n",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) >= 2
        assert ">" not in done.stdout
        assert "Paris" in done.stdout

    def test_the_system_message_is_sent(self) -> None:
        """Greedy answers to the same question differ by it."""
        answers = {
            subprocess.run(
                [*CHAT, "--max-tokens", "12", "--system", system],
                input="Who are you?\n",
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            ).stdout
            for system in ("You are a pirate called Jack.", "You are a chemist called Marie.")
        }
        assert len(answers) == 2

    def test_a_message_that_does_not_fit_fails_alone(self) -> None:
        done = subprocess.run(
            [*CHAT, "--max-tokens", "8", "--n-ctx", "256"],
            input=f"{'word ' * 400}\nHello\n",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0
        assert "exceed the limit" in done.stderr
        assert done.stdout.strip()

    def test_ctrl_c_ends_the_answer_and_ctrl_d_the_program(self, terminal: Terminal) -> None:
        terminal.read_until("> ")
        terminal.write("Write a very long story about a river.\n")
        terminal.read_until("river.\r\n")
        terminal.read_some()
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.read_until("> ").endswith(" (cancelled)\r\n> ")
        terminal.write("Say hello.\n")
        terminal.read_until("hello.\r\n")
        answer = terminal.read_until("> ")
        assert len(answer.removesuffix("> ").strip()) > 0
        assert "cancelled" not in answer
        terminal.write("\x04")
        assert terminal.process.wait(timeout=60) == 0

    def test_ctrl_c_at_the_prompt_does_not_end_the_program(self, terminal: Terminal) -> None:
        terminal.read_until("> ")
        terminal.interrupt_until_heard()
        terminal.read_until("(Ctrl-D or /exit ends)\r\n")
        terminal.read_until("> ")
        terminal.write("/exit\n")
        assert terminal.process.wait(timeout=60) == 0


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestAnswers:
    THOUGHT = "<think>\nBecause.\n</think>\n\nIt is."

    def printed(self, monkeypatch: pytest.MonkeyPatch, out: io.StringIO, term: str = "xterm", **sampling: Any) -> str:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setenv("TERM", term)
        with fake_worker(self.THOUGHT, chat_template=QWEN, n_ctx=8192) as worker:
            with worker.stream([Message(role="user", content="Why?")], **sampling) as stream:
                self.text = _print_answer(stream)
        return out.getvalue()

    def test_thoughts_are_dim_and_set_off_at_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.printed(monkeypatch, Screen()) == "\x1b[2mBecause.\x1b[0m\n\nIt is.\n"
        assert self.text == "It is."

    def test_a_terminal_that_knows_no_codes_gets_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.printed(monkeypatch, Screen(), term="dumb") == "Because.\n\nIt is.\n"

    def test_a_pipe_gets_no_thoughts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.printed(monkeypatch, io.StringIO()) == "It is.\n"

    def test_an_answer_that_was_cut_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also one that was cut while it was thought about: the terminal is bright again."""
        printed = self.printed(monkeypatch, Screen(), max_tokens=12)
        assert printed.startswith("\x1b[2mBec")
        assert printed.endswith("\x1b[0m\n\n (cut: no more tokens were allowed)\n")
        assert self.printed(monkeypatch, io.StringIO(), max_tokens=12) == " (cut: no more tokens were allowed)\n"


class Terminal:
    """A chat at a pseudo-terminal."""

    def __init__(self) -> None:
        self._controller, follower = pty.openpty()
        command = [*CHAT, "--max-tokens", "200"]
        environment = {**os.environ, "TERM": "dumb"}  # no escape codes
        self.process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
        os.close(follower)

    def write(self, text: str) -> None:
        os.write(self._controller, text.encode())

    def read_until(self, end: str, seconds: float = 90.0) -> str:
        deadline, seen = time.monotonic() + seconds, ""
        while not seen.endswith(end):
            assert time.monotonic() < deadline, f"no {end!r} after {seen!r}"
            seen += self.read_some()
        return seen

    def read_some(self, seconds: float = 90.0) -> str:
        assert select.select([self._controller], [], [], seconds)[0], f"silent for {seconds} s"
        return os.read(self._controller, 1).decode("latin-1")

    def interrupt_until_heard(self) -> None:
        """A signal between the prompt and the wait for a key is seen at the next key only: then send another."""
        for _ in range(30):
            self.process.send_signal(signal.SIGINT)
            if select.select([self._controller], [], [], 3.0)[0]:
                return
        raise AssertionError("Ctrl-C was never heard")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._controller)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()
