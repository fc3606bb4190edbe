"""WorkerRequests: what callers ask of a worker's model. Texts, whole or piece by piece, sessions, vectors, tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from llama_worker._batch import Batch
from llama_worker._cache_transfer import CacheTransfer
from llama_worker._desk import Desk
from llama_worker._errors import InvalidRequestError
from llama_worker._events import Reply
from llama_worker._mailboxes import LastWord, Mailbox
from llama_worker._prompts import (
    MessageLike,
    Prompt,
    ToolLike,
    core_messages,
    core_tools,
    embed_request,
    generation_request,
)
from llama_worker._requests import GenerationRequest
from llama_worker._session import Session
from llama_worker._session_report import PrefixStatus
from llama_worker._streams import AsyncEventStream, EventStream
from llama_worker._view import ModelView

_WARM_UP = "Hello"


class WorkerRequests:
    """The part of LlamaWorker that hands in requests. It knows the desk, and no thread."""

    _desk: Desk
    _transfer: CacheTransfer

    # -- generating ---------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> Reply:
        """Answer `prompt`. Blocks. `session` and `priority` say when its turn is: see GenerationRequest.

        Raises RequestError, QueueFull, DeadlineExceeded (`timeout` seconds, waiting included),
        GenerationCancelled (with the partial reply), GenerationError, ModelLoadError, WorkerClosed.
        """
        with self._open(generation_request(prompt, timeout, sampling, session, priority), LastWord()) as stream:
            return stream.reply()

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> EventStream:
        """Answer `prompt` piece by piece. Blocks while the channel is full; raises as `generate`.

        What goes wrong after the request was accepted is the stream's last event, Failed.
        """
        return self._open(generation_request(prompt, timeout, sampling, session, priority), Mailbox())

    async def agenerate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> Reply:
        """The async twin of `generate`. Never blocks the event loop, also not while the model loads."""
        async with self.astream(prompt, timeout=timeout, session=session, priority=priority, **sampling) as stream:
            return await stream.reply()

    def astream(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> AsyncEventStream:
        """The async twin of `stream`: `async for event in worker.astream(...)`.

        The request is checked here and submitted by the first step of the iteration, which raises what
        preparing it raises.
        """
        request = generation_request(prompt, timeout, sampling, session, priority)
        cancel, deadline = self._desk.new_flag(request.timeout)
        start = partial(self._desk.asubmit, request, cancel=cancel, deadline=deadline)
        return AsyncEventStream(start, cancel, deadline, owner=self)

    def infer_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        timeout: float | None = None,
        max_concurrency: int | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> list[Reply | Exception]:
        """Answer many prompts: in their order, each with its Reply or with what `generate` would raise. Blocks.

        All are submitted by this thread, as fast as there is room, so the batch is one client among others and
        never has more than one caller waiting; with `max_concurrency` at most so many are under way. `timeout` is
        counted from this call for each. What interrupts the call cancels them all. Raises InvalidRequestError
        for what is wrong with all of them.
        """
        batch = self._batch(prompts, timeout, max_concurrency, session, priority, sampling)
        return batch.run(self._desk.submit)

    async def ainfer_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        timeout: float | None = None,
        max_concurrency: int | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> list[Reply | Exception]:
        """The async twin of `infer_batch`. Never blocks the event loop; cancelling the task cancels them all."""
        batch = self._batch(prompts, timeout, max_concurrency, session, priority, sampling)
        return await batch.arun(self._desk.asubmit)

    # -- sessions -----------------------------------------------------------------------------------

    def session(
        self,
        name: str | None = None,
        *,
        enable_thinking: bool | None = None,
        template_variables: Mapping[str, Any] | None = None,
        loras: Any = None,
        priority: int = 0,
    ) -> Session:
        """A Session: a conversation whose prefix is computed and kept when you say so. Never waits.

        `name` is the `session` of its requests; without one it is drawn. The others are those of GenerationRequest, for
        all that the session says. Raises InvalidRequestError.
        """
        return Session(
            self._desk,
            self._transfer,
            self,
            name,
            enable_thinking=enable_thinking,
            template_variables=template_variables,
            loras=loras,
            priority=priority,
        )

    def warm(
        self,
        messages: Sequence[MessageLike],
        tools: Sequence[ToolLike] = (),
        *,
        loras: Any = None,
        timeout: float | None = None,
    ) -> PrefixStatus:
        """Compute what all conversations that begin with `messages` and `tools` have in common, for the next ones.

        Blocks; raises as `generate`. Nothing is pinned: for that, open a session.
        """
        with self.session(loras=loras) as session:
            return session.ensure_prefix(messages, tools, timeout=timeout)

    async def awarm(
        self,
        messages: Sequence[MessageLike],
        tools: Sequence[ToolLike] = (),
        *,
        loras: Any = None,
        timeout: float | None = None,
    ) -> PrefixStatus:
        """The async twin of `warm`."""
        with self.session(loras=loras) as session:
            return await session.aensure_prefix(messages, tools, timeout=timeout)

    # -- embedding ----------------------------------------------------------------------------------

    def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        overlong: Literal["error", "truncate"] = "error",
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
    ) -> list[list[float]]:
        """One vector of n_embd floats for each text, in order. Blocks; raises as `generate`."""
        request = embed_request(texts, normalize, overlong, timeout, session, priority)
        return self._desk.embed(request) if request.texts else []

    async def aembed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        overlong: Literal["error", "truncate"] = "error",
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
    ) -> list[list[float]]:
        """The async twin of `embed`. Never blocks the event loop."""
        request = embed_request(texts, normalize, overlong, timeout, session, priority)
        return await self._desk.aembed(request) if request.texts else []

    # -- tokens -------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """The ids of plain text, without BOS. Never waits for a generation."""
        ids: list[int] = self._desk.view().tokenize(text).tolist()
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises InvalidRequestError."""
        return self._desk.view().detokenize(ids)

    def count_tokens(self, prompt: str | Sequence[MessageLike], tools: Sequence[ToolLike] = ()) -> int:
        """How many tokens a text has, or a conversation with `tools` when the model's template has rendered it.

        Never waits for a generation. Raises TemplateError and InvalidRequestError.
        """
        if not isinstance(prompt, str):
            return len(self._desk.view().chat_tokens(core_messages(prompt), core_tools(tools)))
        if tools:
            raise InvalidRequestError("tools", f"<{len(tools)} tools>", "a plain text has none; give messages")
        return len(self._desk.view().tokenize(prompt))

    # -- all of them --------------------------------------------------------------------------------

    def warmup(self) -> float:
        """Answer a word nobody asked for, so that the first request does not pay for what is done once.

        Blocks, until the model is loaded if need be; returns the seconds that it took. Raises as `generate`.
        """
        started = time.monotonic()
        view = self._desk.view()
        view.warm()
        if view.limits.generates:
            self.generate(_WARM_UP, max_tokens=2, temperature=0.0, ignore_eos=True)
        else:
            self.embed([_WARM_UP])
        return time.monotonic() - started

    async def awarmup(self) -> float:
        """The async twin of `warmup`."""
        started = time.monotonic()
        if await self._desk.prepared(_warmed, None, None):
            await self.agenerate(_WARM_UP, max_tokens=2, temperature=0.0, ignore_eos=True)
        else:
            await self.aembed([_WARM_UP])
        return time.monotonic() - started

    def cancel_all(self) -> None:
        """Cancel every request that is queued or running now. Never blocks."""
        self._desk.cancel_all()

    # -- inside -------------------------------------------------------------------------------------

    def _open(self, request: GenerationRequest, mailbox: Mailbox) -> EventStream:
        cancel, deadline = self._desk.new_flag(request.timeout)
        self._desk.submit(request, mailbox, cancel, deadline)
        return EventStream(mailbox, cancel, deadline, owner=self)

    def _batch(
        self,
        prompts: Sequence[Prompt],
        timeout: float | None,
        max_concurrency: int | None,
        session: str | None,
        priority: int,
        sampling: Mapping[str, Any],
    ) -> Batch:
        def ask(prompt: Prompt) -> GenerationRequest:
            return generation_request(prompt, timeout, sampling, session, priority)

        ask("")  # what is wrong with all of them is said at once
        return Batch(prompts, ask, self._desk.new_flag, max_concurrency, self._desk.would_refuse)


def _warmed(view: ModelView) -> bool:
    """Warm `view`; whether it generates."""
    view.warm()
    return view.limits.generates
