"""SessionCalls: what a session asks for, and what it holds when that was done. The half of it that is decisions.

Each call of a session becomes a Call: a request, how it is prepared, and what its reply means. Until it is done
nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from llama_worker._errors import InvalidRequestError
from llama_worker._events import Reply, Usage
from llama_worker._pins import Pin
from llama_worker._prompts import MessageLike, ToolLike, core_messages, core_tools, generation_request
from llama_worker._requests import GenerationRequest, Message, ToolSpec
from llama_worker._session_jobs import Held, Prepared, Step, chat_step, prefix_step, tokens_step
from llama_worker._session_report import PrefixStatus, SuffixStatus
from llama_worker._tokens import TokenIds, common_prefix

R = TypeVar("R")

_OWN = ("enable_thinking", "loras", "messages", "priority", "prompt", "session", "template_variables", "tools")
"""What a reply's keywords cannot say: the session has said it."""

_ONE = ("logprobs", "max_tokens", "stop")
"""What has no meaning for one token."""


@dataclass(frozen=True, slots=True, eq=False)
class Call(Generic[R]):
    """One call of a session: what is asked, and what it means to the session when it is done."""

    step: Step
    request: GenerationRequest
    done: Callable[[Prepared, Reply], R]


class SessionCalls:
    """What one session says, and holds. `asked` is what all its requests have in common."""

    def __init__(self, asked: GenerationRequest) -> None:
        self.asked = asked
        self.today = date.today()
        self.pin = Pin()
        self.held: Held | None = None
        self.reused = self.prefilled = 0

    def prefix(
        self, messages: Sequence[MessageLike], tools: Sequence[ToolLike], timeout: float | None
    ) -> Call[PrefixStatus]:
        said, known = core_messages(messages), core_tools(tools)
        if not said and not known:
            raise InvalidRequestError("messages", "[]", "a prefix has at least a message or a tool")
        request = self._chat(said, known, {}, timeout)
        step = Step(partial(prefix_step, request=request, today=self.today), self.pin)
        return Call(step, request, partial(self._prefixed, said, known))

    def suffix(self, messages: Sequence[MessageLike], timeout: float | None) -> Call[SuffixStatus]:
        held, said = self.holding(), core_messages(messages)
        request = self._chat((*held.prefix, *said), held.tools, {}, timeout)
        step = partial(chat_step, request=request, held=held, today=self.today, says=False)
        return Call(Step(step, self.pin), request, partial(self._suffixed, replace(held, suffix=said, is_chat=True)))

    def reply(self, sampling: Mapping[str, Any], timeout: float | None) -> Call[Reply]:
        held = self.holding()
        _refuse(sampling, _OWN, "the session has its own; give it to worker.session() or ensure_prefix()")
        if not held.is_chat:
            return self._token_call(held.tokens, held, sampling, timeout, says=True, done=_itself)
        request = self._chat((*held.prefix, *held.suffix), held.tools, sampling, timeout)
        step = partial(chat_step, request=request, held=held, today=self.today, says=True)
        return Call(Step(step, self.pin), request, _itself)

    def more(self, tokens: Sequence[int], timeout: float | None) -> Call[SuffixStatus]:
        held, more = self.held, _ids(tokens)
        whole = more if held is None else np.concatenate([held.tokens, more])
        then = None if held is None else replace(held, is_chat=False)
        return self._token_call(whole, held, {}, timeout, says=False, done=partial(self._suffixed, then))

    def one(self, sampling: Mapping[str, Any], timeout: float | None) -> Call[int | None]:
        held = self.holding()
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
    ) -> Call[R]:
        asked = self.asked
        request = generation_request("", timeout, {**sampling, "loras": asked.loras}, asked.session, asked.priority)
        step = partial(tokens_step, request=request, tokens=tokens, held=held, says=says)
        return Call(Step(step, self.pin), request, done)

    def _chat(
        self,
        messages: tuple[Message, ...],
        tools: tuple[ToolSpec, ...],
        sampling: Mapping[str, Any],
        timeout: float | None,
    ) -> GenerationRequest:
        asked = self.asked
        own = {
            "tools": tools,
            "enable_thinking": asked.enable_thinking,
            "template_variables": asked.template_variables,
            "loras": asked.loras,
        }
        return generation_request(messages, timeout, {**sampling, **own}, asked.session, asked.priority)

    def holding(self) -> Held:
        """What is held. Raises InvalidRequestError where nothing is."""
        if self.held is None:
            raise InvalidRequestError(
                "session", self.asked.session, "it holds nothing yet; call ensure_prefix or prefill first"
            )
        return self.held

    # -- what came of it ----------------------------------------------------------------------------

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
        held = self.held
        if held is None:
            return 0
        if held.manifest.identity.difference(done.manifest.identity) is not None:
            return held.n_computed
        return held.n_computed - common_prefix(held.tokens[: held.n_computed], done.tokens)

    def _hold(self, held: Held, usage: Usage) -> None:
        self.held = held
        self.reused += usage.cached_tokens
        self.prefilled += usage.prompt_tokens - usage.cached_tokens


def _itself(_: Prepared, reply: Reply) -> Reply:
    return reply


def _refuse(sampling: Mapping[str, Any], names: Sequence[str], reason: str) -> None:
    for name in names:
        if name in sampling:
            raise InvalidRequestError(name, sampling[name], reason)


def _ids(tokens: Sequence[int]) -> TokenIds:
    """Raises InvalidRequestError for what are no ids of any vocabulary."""
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence | np.ndarray) or not len(tokens):
        raise InvalidRequestError("tokens", type(tokens).__name__, "give at least one id")
    wrong = [token for token in tokens if not isinstance(token, int | np.integer) or not 0 <= token < 2**31]
    if wrong:
        raise InvalidRequestError("tokens", wrong[0], "ids are integers from 0 on")
    return np.array(tokens, np.int32)
