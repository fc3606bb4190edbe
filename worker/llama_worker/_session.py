"""Session: explicit control of what every request uses anyway: the prefix cache.

    ensure_prefix(messages, tools) -> prefill_suffix(messages) -> decode(...) -> events

A session lives on its caller's side. What it holds is a list of tokens, and what it asks for are ordinary
requests under its own name, so that turns, deadlines, cancelling and reloads are those of every request. Nothing
of it can be lost to others: what was evicted is restored or computed again by whoever needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeVar
from uuid import uuid4

from llama_worker._awaited import aawaited, awaited
from llama_worker._cache_transfer import CacheTransfer
from llama_worker._cancel import CancelFlag, CancelScope
from llama_worker._desk import Desk
from llama_worker._errors import LlamaWorkerError, SessionClosedError, SessionFatalError, WorkerClosed
from llama_worker._mailboxes import LastWord, Mailbox
from llama_worker._manifest import Manifest
from llama_worker._prompts import MessageLike, ToolLike
from llama_worker._requests import GenerationRequest
from llama_worker._session_calls import Call, SessionCalls
from llama_worker._session_report import ContextReport, PrefixStatus, SuffixStatus
from llama_worker._session_state import SessionState
from llama_worker._session_transfer import exported, imported
from llama_worker._streams import AsyncEventStream, EventStream
from llama_worker._view import ModelView

R = TypeVar("R")
T = TypeVar("T")


class Session:
    """A conversation whose prefix is kept. Made by `worker.session(...)`.

    Any thread may call it, one call at a time; of two at once the last to end says what it holds. The a-methods are
    for event loops. Each call takes a `timeout` in seconds, waiting included, and raises as `generate` does:
    RequestError, QueueFull, DeadlineExceeded, GenerationCancelled, GenerationError, WorkerClosed; besides
    SessionClosedError after `close`, and SessionFatalError once it broke: its worker ended, or something failed that
    should not. A call that fails or is cancelled changes nothing, and what it computed is reused by the next.

    The prefix is pinned: of what is idle it is evicted last, and it never makes anybody wait. One date, that of its
    beginning, stands in all its prompts.
    """

    def __init__(
        self,
        desk: Desk,
        transfer: CacheTransfer,
        owner: object,
        name: str | None = None,
        *,
        enable_thinking: bool | None = None,
        template_variables: Mapping[str, Any] | None = None,
        loras: Any = None,
        priority: int = 0,
    ) -> None:
        self._owner = owner  # a worker that nobody else holds lives as long as its sessions
        self._desk = desk
        self._transfer = transfer
        asked = GenerationRequest(
            messages=(),
            session=f"session-{uuid4().hex[:12]}" if name is None else name,
            priority=priority,
            enable_thinking=enable_thinking,
            template_variables=dict(template_variables or {}),
            loras=loras,
        )
        self._calls = SessionCalls(asked)
        self._running = CancelScope()
        self._closed = False
        self._broken_by: BaseException | None = None

    def __repr__(self) -> str:
        held = self._calls.held
        return f"<Session {self.name} ({self._state}): {0 if held is None else len(held.tokens)} tokens>"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        calls: SessionCalls | None = getattr(self, "_calls", None)  # none where its arguments were refused
        if calls is not None:
            calls.pin.release()

    # -- what it holds ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Whose turn it is, and which slots are preferred: see GenerationRequest.session."""
        return str(self._calls.asked.session)

    @property
    def tokens(self) -> list[int]:
        """The ids that it holds: prefix and suffix, and what `prefill` and `decode_one` put behind them."""
        ids: list[int] = [] if self._calls.held is None else self._calls.held.tokens.tolist()
        return ids

    @property
    def manifest(self) -> Manifest | None:
        """What it holds and under what it was computed; None before the first call."""
        return None if self._calls.held is None else self._calls.held.manifest

    def explain(self) -> ContextReport:
        """What it holds, message by message, in counts. Never waits; works when it is closed or broken, too."""
        held = self._calls.held
        return ContextReport(
            session=self.name,
            state=self._state,
            n_ctx=0 if held is None else held.manifest.identity.n_ctx,
            tokens=0 if held is None else len(held.tokens),
            resident=0 if held is None else held.n_computed,
            prefix=0 if held is None else held.manifest.n_prefix,
            reused=self._calls.reused,
            prefilled=self._calls.prefilled,
            manifest=self.manifest,
        )

    # -- messages -----------------------------------------------------------------------------------

    def ensure_prefix(
        self, messages: Sequence[MessageLike], tools: Sequence[ToolLike] = (), *, timeout: float | None = None
    ) -> PrefixStatus:
        """Have the beginning of all conversations that begin with `messages` and `tools` computed, and keep it. Blocks.

        What anybody has computed of it already is not computed again. The suffix is forgotten. After a reload the
        prefix for the new model takes the place of the old one.
        """
        return self._run(partial(self._calls.prefix, messages, tools, timeout))

    async def aensure_prefix(
        self, messages: Sequence[MessageLike], tools: Sequence[ToolLike] = (), *, timeout: float | None = None
    ) -> PrefixStatus:
        """The async twin of `ensure_prefix`."""
        return await self._arun(partial(self._calls.prefix, messages, tools, timeout))

    def prefill_suffix(self, messages: Sequence[MessageLike], *, timeout: float | None = None) -> SuffixStatus:
        """Have all that follows the prefix, `messages`, computed up to where a reply would begin. Blocks.

        They take the place of the former suffix; only what is new in them is computed. Raises ManifestMismatchError
        when another model, template, adapter or kind of KV cache has come since `ensure_prefix`, and when the template
        writes the prefix otherwise because of them.
        """
        return self._run(partial(self._calls.suffix, messages, timeout))

    async def aprefill_suffix(self, messages: Sequence[MessageLike], *, timeout: float | None = None) -> SuffixStatus:
        """The async twin of `prefill_suffix`."""
        return await self._arun(partial(self._calls.suffix, messages, timeout))

    def decode(self, *, timeout: float | None = None, **sampling: Any) -> EventStream:
        """Reply to what the session holds, piece by piece; its `reply()` is the reply as a whole.

        `sampling`: the keywords of `worker.stream`, but for what the session has said. It stays as it is: what the
        conversation says next, this reply included, is for the next `prefill_suffix` to say.
        """
        call = self._checked(partial(self._calls.reply, sampling, timeout))
        with self._watched():
            return self._open(call, Mailbox())

    def adecode(self, *, timeout: float | None = None, **sampling: Any) -> AsyncEventStream:
        """The async twin of `decode`. It is submitted by the first step of the iteration."""
        return self._aopen(self._checked(partial(self._calls.reply, sampling, timeout)))

    # -- tokens -------------------------------------------------------------------------------------

    def prefill(self, tokens: Sequence[int], *, timeout: float | None = None) -> SuffixStatus:
        """Put ids behind those that the session holds, and have them computed. Blocks. For who tokenizes himself."""
        return self._run(partial(self._calls.more, tokens, timeout))

    async def aprefill(self, tokens: Sequence[int], *, timeout: float | None = None) -> SuffixStatus:
        """The async twin of `prefill`."""
        return await self._arun(partial(self._calls.more, tokens, timeout))

    def decode_one(self, *, timeout: float | None = None, **sampling: Any) -> int | None:
        """Sample the token that follows those that the session holds, and put it there. None where the model ends.

        `sampling`: fields of SamplingParams. Each call has a sampler of its own, that has seen all tokens. Blocks.
        """
        return self._run(partial(self._calls.one, sampling, timeout))

    async def adecode_one(self, *, timeout: float | None = None, **sampling: Any) -> int | None:
        """The async twin of `decode_one`."""
        return await self._arun(partial(self._calls.one, sampling, timeout))

    # -- as bytes -----------------------------------------------------------------------------------

    def export_state(self, *, timeout: float | None = None) -> bytes:
        """The session as bytes, with its messages and the KV that there is of its tokens, for `import_state`. Blocks.

        It waits for an idle slot, and reads the model's file once in a process: that must still be where it was
        loaded from. Raises ManifestMismatchError after a reload to another model, ModelNotFoundError, OSError.
        """
        held = self._checked(self._calls.holding)
        cancel, deadline = self._limits(timeout)
        view = self._desk.view_until(deadline, timeout, cancel)
        return awaited(exported(self._transfer, view, held, self._calls.today), cancel, deadline, timeout)

    async def aexport_state(self, *, timeout: float | None = None) -> bytes:
        """The async twin of `export_state`."""
        held = self._checked(self._calls.holding)
        cancel, deadline = self._limits(timeout)
        view = await self._desk.aview_until(deadline, timeout, cancel)
        return await aawaited(exported(self._transfer, view, held, self._calls.today), cancel, deadline, timeout)

    def import_state(self, data: bytes, *, timeout: float | None = None) -> int:
        """Hold what another session exported, here or in another process, in place of what this one holds. Blocks.

        Returns of how many tokens the KV came along; the others are computed when they are needed. All is checked
        before anything is changed: raises StateError for what is damaged or none, ManifestMismatchError for another
        model, template, kind of KV cache or adapters, ContextOverflowError for what does not fit here, and
        ModelNotFoundError and OSError as `export_state`.
        """
        cancel, deadline = self._checked(partial(self._limits, timeout))
        view = self._desk.view_until(deadline, timeout, cancel)
        state, taken = self._import(view, data)
        return self._imported(state, awaited(taken, cancel, deadline, timeout))

    async def aimport_state(self, data: bytes, *, timeout: float | None = None) -> int:
        """The async twin of `import_state`."""
        cancel, deadline = self._checked(partial(self._limits, timeout))
        begun = self._desk.prepared(lambda view: self._import(view, data), deadline, timeout, cancel)
        state, taken = await begun
        return self._imported(state, await aawaited(taken, cancel, deadline, timeout))

    def close(self) -> None:
        """Cancel what it waits for, and let its prefix be evicted as any other. Idempotent, never blocks."""
        self._closed = True
        self._calls.pin.release()
        self._running.cancel()

    # -- inside: how it is asked --------------------------------------------------------------------

    @property
    def _state(self) -> Literal["open", "closed", "broken"]:
        return "closed" if self._closed else "open" if self._broken_by is None else "broken"

    def _import(self, view: ModelView, data: bytes) -> tuple[SessionState, Future[int]]:
        return imported(self._transfer, view, self._calls.asked, data)

    def _imported(self, state: SessionState, n: int) -> int:
        self._calls.held, self._calls.today = state.held, state.today
        return n

    def _run(self, make: Callable[[], Call[R]]) -> R:
        call = self._checked(make)
        with self._watched():
            with self._open(call, LastWord()) as stream:
                reply = stream.reply()
            return call.done(call.step.done, reply)

    async def _arun(self, make: Callable[[], Call[R]]) -> R:
        call = self._checked(make)
        with self._watched():
            reply = await self._aopen(call).reply()
            return call.done(call.step.done, reply)

    def _checked(self, make: Callable[[], T]) -> T:
        if self._closed:
            raise SessionClosedError()
        if self._broken_by is not None:
            raise SessionFatalError(self._broken_by)
        return make()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """What is raised that no request raises leaves the session broken."""
        try:
            yield
        except Exception as exc:
            fatal = isinstance(exc, WorkerClosed) or not isinstance(exc, LlamaWorkerError)
            if fatal and self._broken_by is None:
                self._broken_by = exc
                self._calls.pin.release()
            raise

    def _open(self, call: Call[Any], mailbox: Mailbox) -> EventStream:
        cancel, deadline = self._flag(call)
        self._desk.submit(call.request, mailbox, cancel, deadline, call.step)
        return EventStream(mailbox, cancel, deadline, owner=self)

    def _aopen(self, call: Call[Any]) -> AsyncEventStream:
        cancel, deadline = self._flag(call)
        start = partial(self._desk.asubmit, call.request, cancel=cancel, deadline=deadline, prepare=call.step)
        return AsyncEventStream(start, cancel, deadline, owner=self)

    def _flag(self, call: Call[Any]) -> tuple[CancelFlag, float | None]:
        return self._limits(call.request.timeout)

    def _limits(self, timeout: float | None) -> tuple[CancelFlag, float | None]:
        """A flag that `close` sets, and the deadline. Raises InvalidRequestError for a `timeout` that is none."""
        checked = GenerationRequest(messages=(), timeout=timeout)
        cancel, deadline = self._desk.new_flag(checked.timeout)
        self._running.add(cancel)
        return cancel, deadline
