"""What a session asks the worker for: ordinary jobs, prepared with a view as every other.

A prefix is what two conversations that begin with its messages have in common, as tokens: templates write things
between messages, and behind the last, that depend on what follows. A suffix, and what is given as ids, is computed
but for its last token, for whoever decodes next needs that token's logits.

Everything here is pure, and called by the caller's thread or by the preparer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Final

import numpy as np

from llama_worker._errors import InvalidRequestError, ManifestMismatchError, TemplateError
from llama_worker._identity import KVIdentity
from llama_worker._jobs import GenerationJob
from llama_worker._manifest import End, Manifest, RuntimeIdentity
from llama_worker._pins import Pin
from llama_worker._requests import GenerationRequest, Message, Role, ToolSpec
from llama_worker._tokens import TokenIds, common_prefix
from llama_worker._view import ModelView

_FOLLOWERS: Final[tuple[tuple[Role, str], ...]] = (
    ("user", "\u241f"),
    ("assistant", "\u241f"),
    ("user", "0"),
    ("assistant", "0"),
)
"""Messages that may follow a prefix. The first two that the template takes differ from their beginning on."""

_BETWEEN: Final = 32
"""Tokens from a boundary to the end of a prefix: a nearer one is not worth a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A job, and what the session is when it is done: all `tokens`, described by `manifest`."""

    job: GenerationJob
    tokens: TokenIds
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """What a session holds: the messages and tools of its prefix, its suffix, and their tokens. Replaced as a whole.

    The first `n_computed` of `tokens` were computed. `is_chat`: they are what the messages render to, nothing else.
    """

    tokens: TokenIds
    n_computed: int
    manifest: Manifest
    prefix: tuple[Message, ...] = ()
    tools: tuple[ToolSpec, ...] = ()
    suffix: tuple[Message, ...] = ()
    is_chat: bool = True

    @classmethod
    def following(cls, held: Held | None, done: Prepared) -> Held:
        """`held`, or a session of ids alone, when `done` was done."""
        base = cls(tokens=done.tokens, n_computed=0, manifest=done.manifest, is_chat=False) if held is None else held
        return replace(base, tokens=done.tokens, n_computed=len(done.job.prompt), manifest=done.manifest)

    @property
    def stable(self) -> TokenIds:
        return self.tokens[: self.manifest.n_prefix]

    def check(self, view: ModelView, kv: KVIdentity | None = None) -> None:
        """Raises ManifestMismatchError when `view`, or with the adapters `kv`, is another runtime than it was."""
        identity = self.manifest.identity
        reason = identity.difference(RuntimeIdentity.of(view, identity.loras if kv is None else kv.loras))
        if reason is not None:
            raise ManifestMismatchError(reason)


class Step:
    """One call of a session on its way: prepared for a view, and again if a reload makes that stale.

    `prepared` is what it was prepared as last, which is what will be done.
    """

    def __init__(self, prepare: Callable[[ModelView], Prepared], pin: Pin | None = None) -> None:
        self._prepare = prepare
        self._pin = pin
        self.prepared: Prepared | None = None

    def __call__(self, view: ModelView) -> GenerationJob:
        self.prepared = prepared = self._prepare(view)
        return replace(prepared.job, again=self, pin=self._pin, n_pinned=prepared.manifest.n_prefix)

    @property
    def done(self) -> Prepared:
        assert self.prepared is not None, "it was answered before it was prepared"
        return self.prepared


def prefix_step(view: ModelView, request: GenerationRequest, today: date) -> Prepared:
    """Compute what is common to all that begins with the messages of `request`. Raises RequestError."""
    one, other = _two_that_follow(view, request, today)
    length = common_prefix(one.prompt, other.prompt)
    if not length:
        raise InvalidRequestError("messages", f"<{len(request.messages or ())}>", "they have no tokens of their own")
    boundaries = (*(place for place in one.boundaries if place <= length - _BETWEEN), length)
    tokens = one.prompt[:length]
    job = replace(one, prompt=tokens, boundaries=boundaries if view.limits.needs_checkpoints else ())
    ends = list(_message_ends(view, request.messages or (), one.rendered or "", tokens))
    manifest = Manifest.of(RuntimeIdentity.of(view, one.kv.loras), tokens, length, _closed(ends, length))
    return Prepared(job=job, tokens=tokens, manifest=manifest)


def chat_step(view: ModelView, request: GenerationRequest, held: Held, today: date, *, says: bool) -> Prepared:
    """Compute the conversation of `request`, which begins with the prefix that is `held`; or answer it.

    Raises RequestError, ManifestMismatchError among them.
    """
    held.check(view)
    job = view.prepare_generation(request, today=today, says=says)
    held.check(view, job.kv)
    n_prefix = held.manifest.n_prefix
    if common_prefix(job.prompt, held.stable) < n_prefix:
        raise ManifestMismatchError("with what follows it, the template writes the prefix otherwise")
    ends = list(_message_ends(view, request.messages or (), job.rendered or "", job.prompt))
    n_stable = len(held.prefix)
    ends = _closed(_closed(ends[:n_stable], n_prefix) + ends[n_stable:], len(job.prompt))
    manifest = Manifest.of(held.manifest.identity, job.prompt, n_prefix, ends)
    return Prepared(job=job if says else _but_one(job), tokens=job.prompt, manifest=manifest)


def tokens_step(
    view: ModelView, request: GenerationRequest, tokens: TokenIds, held: Held | None, *, says: bool
) -> Prepared:
    """Compute `tokens`, which begin with those that are `held`; or answer them. Raises as `chat_step`."""
    if held is not None:
        held.check(view)
    check_ids(view, tokens)
    job = view.prepare_generation(request, tokens=tokens, says=says)
    if held is not None:
        held.check(view, job.kv)
    identity = RuntimeIdentity.of(view, job.kv.loras)
    known = Manifest.of(identity, tokens[:0], 0, ()) if held is None else held.manifest
    manifest = known.going_on(tokens)
    return Prepared(job=job if says else _but_one(job), tokens=tokens, manifest=manifest)


def _but_one(job: GenerationJob) -> GenerationJob:
    """As many as there are to compute before the last token, which is for a reply to decode."""
    return replace(job, prompt=job.prompt[:-1])


def _two_that_follow(view: ModelView, request: GenerationRequest, today: date) -> tuple[GenerationJob, GenerationJob]:
    """Two conversations that begin with the messages and have no more than them in common."""
    jobs: list[GenerationJob] = []
    refused: TemplateError | None = None
    for role, content in _FOLLOWERS:
        following = (*(request.messages or ()), Message(role=role, content=content))
        try:
            asked = request.model_copy(update={"messages": following})
            jobs.append(view.prepare_generation(asked, today=today, says=False))
        except TemplateError as exc:
            refused = exc
        if len(jobs) == 2:
            return jobs[0], jobs[1]
    assert refused is not None, "a template either takes a message or refuses it"
    raise refused


def _message_ends(view: ModelView, messages: Sequence[Message], rendered: str, tokens: TokenIds) -> Iterator[End]:
    """Each message's role, and how many tokens end with its content."""
    pieces = view.vocabulary.pieces
    ends = np.cumsum([len(pieces[token]) for token in tokens.tolist()])
    at = n_bytes = 0
    for message in messages:
        content = view.guard.protect(message.content).strip()
        found = rendered.find(content, at) if content else -1
        if found >= 0:
            n_bytes += view.n_bytes(rendered[at : found + len(content)])
            at = found + len(content)
        yield message.role, int(np.searchsorted(ends, n_bytes, side="right"))


def _closed(ends: Sequence[End], length: int) -> list[End]:
    """None behind `length`, and the last there."""
    within = [(role, min(end, length)) for role, end in ends]
    return [*within[:-1], (within[-1][0], length)] if within else []


def check_ids(view: ModelView, tokens: TokenIds) -> None:
    """Raises InvalidRequestError for ids that are none of the vocabulary's."""
    n_vocab = view.limits.n_vocab
    wrong = tokens[(tokens < 0) | (tokens >= n_vocab)]
    if len(wrong):
        raise InvalidRequestError("tokens", int(wrong[0]), f"the vocabulary has ids 0 to {n_vocab - 1}")
