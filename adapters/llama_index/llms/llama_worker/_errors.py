"""UnusableReply: the model answered, and the answer is not what LlamaIndex was asked for."""

from __future__ import annotations

from llama_worker import LlamaWorkerError


class UnusableReply(LlamaWorkerError, ValueError):
    """A reply holds no tool call, or no object of the class that was asked for. Never carries its text.

    A ValueError as well, because LlamaIndex and what is built on it raise and expect one here.
    """
