"""Session: explicit control of what every request uses anyway: the prefix cache.

    ensure_prefix(messages, tools) -> prefill_suffix(messages) -> decode(...) -> events

A session lives on its caller's side. What it holds is a list of tokens, and what it asks for are ordinary
requests under its own name, so that turns, deadlines, cancelling and reloads are those of every request. Nothing
of it can be lost to others: what was evicted is restored or computed again by whoever needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar
from uuid import uuid4

import numpy as np

from llama_worker._cancel import CancelFlag, CancelScope
from llama_worker._desk import Desk
from llama_worker._errors import (
    InvalidRequestError,
    LlamaWorkerError,
    SessionClosedError,
    SessionFatalError,
    WorkerClosed,
)
from llama_worker._events import Reply, Usage
from llama_worker._manifest import Manifest
from llama_worker._pins import Pin
from llama_worker._prompts import MessageLike, ToolLike, core_messages, core_tools, generation_request
from llama_worker._requests import GenerationRequest, Message, ToolSpec
from llama_worker._session_jobs import Held, Prepared, Step, chat_step, prefix_step, tokens_step
from llama_worker._session_report import ContextReport, PrefixStatus, SuffixStatus
from llama_worker._streams import AsyncEventStream, EventStream, LastWord, Mailbox
from llama_worker._tokens import TokenIds, common_prefix

R = TypeVar("R")

_OWN = ("enable_thinking", "loras", "messages", "priority", "prompt", "session", "template_variables", "tools")
"""What a reply's keywords cannot say: the session has said it."""

_ONE = ("logprobs", "max_tokens", "stop")
"""What has no meaning for one token."""


@dataclass(frozen=True, slots=True, eq=False)
class _Call(Generic[R]):
    """One call of a session: what is asked, and what it means to the session when it is done."""

    step: Step
    request: GenerationRequest
    done: Callable[[Prepared, Reply], R]


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
        owner: object,
        name: str | None = None,
        *,
        enable_thinking: bool | None = None,
        template_variables: Mapping[str, Any] | None = None,
        loras: Any = None,
        priority: int = 0,
    ) -> None:
        self._pin = Pin()
        self._owner = owner  # a worker that nobody else holds lives as long as its sessions
        self._desk = desk
        self._today = date.today()
        self._asked = GenerationRequest(
            messages=(),
            session=f"session-{uuid4().hex[:12]}" if name is None else name,
            priority=priority,
            enable_thinking=enable_thinking,
            template_variables=dict(template_variables or {}),
            loras=loras,
        )
        self._running = CancelScope()
        self._held: Held | None = None
        self._reused = self._prefilled = 0
        self._closed = False
        self._broken_by: BaseException | None = None

    def __repr__(self) -> str:
        return f"<Session {self.name} ({self._state}): {0 if self._held is None else len(self._held.tokens)} tokens>"

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
        pin: Pin | None = getattr(self, "_pin", None)
        if pin is not None:
            pin.release()

    # -- what it holds ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Whose turn it is, and which slots are preferred: see GenerationRequest.session."""
        return str(self._asked.session)

    @property
    def tokens(self) -> list[int]:
        """The ids that it holds: prefix and suffix, and what `prefill` and `decode_one` put behind them."""
        ids: list[int] = [] if self._held is None else self._held.tokens.tolist()
        return ids

    @property
    def manifest(self) -> Manifest | None:
        """What it holds and under what it was computed; None before the first call."""
        return None if self._held is None else self._held.manifest

    def explain(self) -> ContextReport:
        """What it holds, message by message, in counts. Never waits; works when it is closed or broken, too."""
        held = self._held
        return ContextReport(
            session=self.name,
            state=self._state,
            n_ctx=0 if held is None else held.manifest.identity.n_ctx,
            tokens=0 if held is None else len(held.tokens),
            resident=0 if held is None else held.n_computed,
            prefix=0 if held is None else held.manifest.n_prefix,
            reused=self._reused,
            prefilled=self._prefilled,
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
        return self._run(partial(self._prefix_call, messages, tools, timeout))

    async def aensure_prefix(
        self, messages: Sequence[MessageLike], tools: Sequence[ToolLike] = (), *, timeout: float | None = None
    ) -> PrefixStatus:
        """The async twin of `ensure_prefix`."""
        return await self._arun(partial(self._prefix_call, messages, tools, timeout))

    def prefill_suffix(self, messages: Sequence[MessageLike], *, timeout: float | None = None) -> SuffixStatus:
        """Have all that follows the prefix, `messages`, computed up to where a reply would begin. Blocks.

        They take the place of the former suffix; only what is new in them is computed. Raises ManifestMismatchError
        when another model, template, adapter or kind of KV cache has come since `ensure_prefix`, and when the template
        writes the prefix otherwise because of them.
        """
        return self._run(partial(self._suffix_call, messages, timeout))

    async def aprefill_suffix(self, messages: Sequence[MessageLike], *, timeout: float | None = None) -> SuffixStatus:
        """The async twin of `prefill_suffix`."""
        return await self._arun(partial(self._suffix_call, messages, timeout))

    def decode(self, *, timeout: float | None = None, **sampling: Any) -> EventStream:
        """Reply to what the session holds, piece by piece; its `reply()` is the reply as a whole.

        `sampling`: the keywords of `worker.stream`, but for what the session has said. It stays as it is: what the
        conversation says next, this reply included, is for the next `prefill_suffix` to say.
        """
        call = self._checked(partial(self._reply_call, sampling, timeout))
        with self._watched():
            return self._open(call, Mailbox())

    def adecode(self, *, timeout: float | None = None, **sampling: Any) -> AsyncEventStream:
        """The async twin of `decode`. It is submitted by the first step of the iteration."""
        return self._aopen(self._checked(partial(self._reply_call, sampling, timeout)))

    # -- tokens -------------------------------------------------------------------------------------

    def prefill(self, tokens: Sequence[int], *, timeout: float | None = None) -> SuffixStatus:
        """Put ids behind those that the session holds, and have them computed. Blocks. For who tokenizes himself."""
        return self._run(partial(self._tokens_call, tokens, timeout))

    async def aprefill(self, tokens: Sequence[int], *, timeout: float | None = None) -> SuffixStatus:
        """The async twin of `prefill`."""
        return await self._arun(partial(self._tokens_call, tokens, timeout))

    def decode_one(self, *, timeout: float | None = None, **sampling: Any) -> int | None:
        """Sample the token that follows those that the session holds, and put it there. None where the model ends.

        `sampling`: fields of SamplingParams. Each call has a sampler of its own, that has seen all tokens. Blocks.
        """
        return self._run(partial(self._one_call, sampling, timeout))

    async def adecode_one(self, *, timeout: float | None = None, **sampling: Any) -> int | None:
        """The async twin of `decode_one`."""
        return await self._arun(partial(self._one_call, sampling, timeout))

    def close(self) -> None:
        """Cancel what it waits for, and let its prefix be evicted as any other. Idempotent, never blocks."""
        self._closed = True
        self._pin.release()
        self._running.cancel()

    # -- inside: what is asked ----------------------------------------------------------------------

    def _prefix_call(
        self, messages: Sequence[MessageLike], tools: Sequence[ToolLike], timeout: float | None
    ) -> _Call[PrefixStatus]:
        said, known = core_messages(messages), core_tools(tools)
        if not said and not known:
            raise InvalidRequestError("messages", "[]", "a prefix has at least a message or a tool")
        request = self._chat(said, known, {}, timeout)
        step = Step(partial(prefix_step, request=request, today=self._today), self._pin)
        return _Call(step, request, partial(self._prefixed, said, known))

    def _suffix_call(self, messages: Sequence[MessageLike], timeout: float | None) -> _Call[SuffixStatus]:
        held, said = self._holding(), core_messages(messages)
        request = self._chat((*held.prefix, *said), held.tools, {}, timeout)
        step = partial(chat_step, request=request, held=held, today=self._today, says=False)
        return _Call(Step(step, self._pin), request, partial(self._suffixed, replace(held, suffix=said, is_chat=True)))

    def _reply_call(self, sampling: Mapping[str, Any], timeout: float | None) -> _Call[Reply]:
        held = self._holding()
        _refuse(sampling, _OWN, "the session has its own; give it to worker.session() or ensure_prefix()")
        if not held.is_chat:
            return self._token_call(held.tokens, held, sampling, timeout, says=True, done=_itself)
        request = self._chat((*held.prefix, *held.suffix), held.tools, sampling, timeout)
        step = partial(chat_step, request=request, held=held, today=self._today, says=True)
        return _Call(Step(step, self._pin), request, _itself)

    def _tokens_call(self, tokens: Sequence[int], timeout: float | None) -> _Call[SuffixStatus]:
        held, more = self._held, _ids(tokens)
        whole = more if held is None else np.concatenate([held.tokens, more])
        then = None if held is None else replace(held, is_chat=False)
        return self._token_call(whole, held, {}, timeout, says=False, done=partial(self._suffixed, then))

    def _one_call(self, sampling: Mapping[str, Any], timeout: float | None) -> _Call[int | None]:
        held = self._holding()
        _refuse(sampling, (*_OWN, *_ONE), "it has no meaning for one token")
        one = {**sampling, "max_tokens": 1, "logprobs": 0}
        return self._token_call(held.tokens, held, one, timeout, says=True, done=partial(self._said_one, held))

    def _token_call(
        self,
        tokens: TokenIds,
        held: Held | None,
        sampling: Mapping[str, Any],
        timeout: float | None,
        *,
        says: bool,
        done: Callable[[Prepared, Reply], R],
    ) -> _Call[R]:
        asked = self._asked
        request = generation_request("", timeout, {**sampling, "loras": asked.loras}, asked.session, asked.priority)
        step = partial(tokens_step, request=request, tokens=tokens, held=held, says=says)
        return _Call(Step(step, self._pin), request, done)

    def _chat(
        self,
        messages: tuple[Message, ...],
        tools: tuple[ToolSpec, ...],
        sampling: Mapping[str, Any],
        timeout: float | None,
    ) -> GenerationRequest:
        asked = self._asked
        own = {
            "tools": tools,
            "enable_thinking": asked.enable_thinking,
            "template_variables": asked.template_variables,
            "loras": asked.loras,
        }
        return generation_request(messages, timeout, {**sampling, **own}, asked.session, asked.priority)

    def _holding(self) -> Held:
        if self._held is None:
            raise InvalidRequestError("session", self.name, "it holds nothing yet; call ensure_prefix or prefill first")
        return self._held

    # -- inside: what came of it --------------------------------------------------------------------

    def _prefixed(
        self, messages: tuple[Message, ...], tools: tuple[ToolSpec, ...], done: Prepared, reply: Reply
    ) -> PrefixStatus:
        manifest, n = done.manifest, len(done.tokens)
        status = PrefixStatus(
            reused=reply.usage.cached_tokens,
            prefilled=n - reply.usage.cached_tokens,
            dropped=self._dropped(done),
            resident=n,
            available=manifest.identity.n_ctx - n,
            digest=manifest.prefix_digest,
        )
        held = Held(prefix=messages, tools=tools, tokens=done.tokens, n_computed=n, manifest=manifest)
        self._hold(held, reply.usage)
        return status

    def _suffixed(self, held: Held | None, done: Prepared, reply: Reply) -> SuffixStatus:
        n = len(done.job.prompt)
        status = SuffixStatus(
            reused=reply.usage.cached_tokens,
            prefilled=n - reply.usage.cached_tokens,
            dropped=self._dropped(done),
            resident=n,
            available=done.manifest.identity.n_ctx - len(done.tokens),
        )
        self._hold(Held.following(held, done), reply.usage)
        return status

    def _said_one(self, held: Held, done: Prepared, reply: Reply) -> int | None:
        said = [logprob.token for logprob in reply.logprobs]
        tokens = np.concatenate([done.tokens, np.array(said, np.int32)])
        manifest = done.manifest.going_on(tokens)
        self._hold(
            replace(held, tokens=tokens, n_computed=len(done.tokens), manifest=manifest, is_chat=False), reply.usage
        )
        return said[0] if said else None

    def _dropped(self, done: Prepared) -> int:
        """Tokens that were computed for what the session held, and are not for what it holds from now on."""
        held = self._held
        if held is None:
            return 0
        if held.manifest.identity.difference(done.manifest.identity) is not None:
            return held.n_computed
        return held.n_computed - common_prefix(held.tokens[: held.n_computed], done.tokens)

    def _hold(self, held: Held, usage: Usage) -> None:
        self._held = held
        self._reused += usage.cached_tokens
        self._prefilled += usage.prompt_tokens - usage.cached_tokens

    # -- inside: how it is asked --------------------------------------------------------------------

    @property
    def _state(self) -> Literal["open", "closed", "broken"]:
        return "closed" if self._closed else "open" if self._broken_by is None else "broken"

    def _run(self, make: Callable[[], _Call[R]]) -> R:
        call = self._checked(make)
        with self._watched():
            with self._open(call, LastWord()) as stream:
                reply = stream.reply()
            return call.done(call.step.done, reply)

    async def _arun(self, make: Callable[[], _Call[R]]) -> R:
        call = self._checked(make)
        with self._watched():
            reply = await self._aopen(call).reply()
            return call.done(call.step.done, reply)

    def _checked(self, make: Callable[[], _Call[R]]) -> _Call[R]:
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
                self._pin.release()
            raise

    def _open(self, call: _Call[Any], mailbox: Mailbox) -> EventStream:
        cancel, deadline = self._flag(call)
        self._desk.submit(call.request, mailbox, cancel, deadline, call.step)
        return EventStream(mailbox, cancel, deadline, owner=self)

    def _aopen(self, call: _Call[Any]) -> AsyncEventStream:
        cancel, deadline = self._flag(call)
        start = partial(self._desk.asubmit, call.request, cancel=cancel, deadline=deadline, prepare=call.step)
        return AsyncEventStream(start, cancel, deadline, owner=self)

    def _flag(self, call: _Call[Any]) -> tuple[CancelFlag, float | None]:
        cancel, deadline = self._desk.new_flag(call.request.timeout)
        self._running.add(cancel)
        return cancel, deadline


def _itself(_: Prepared, reply: Reply) -> Reply:
    return reply


def _refuse(sampling: Mapping[str, Any], names: Sequence[str], reason: str) -> None:
    for name in names:
        if name in sampling:
            raise InvalidRequestError(name, sampling[name], reason)


def _ids(tokens: Sequence[int]) -> TokenIds:
    """Raises InvalidRequestError for what are no ids of any vocabulary."""
    if isinstance(tokens, str | bytes) or not len(tokens):
        raise InvalidRequestError("tokens", type(tokens).__name__, "give at least one id")
    wrong = [token for token in tokens if not isinstance(token, int | np.integer) or not 0 <= token < 2**31]
    if wrong:
        raise InvalidRequestError("tokens", wrong[0], "ids are integers from 0 on")
    return np.array(tokens, np.int32)
