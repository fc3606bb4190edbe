"""Generation: one request that is being served. Its tokens, its slot, and where it stands between them.

`tokens` are all that are known: the prompt and what was sampled. The slot holds the first of them, those
whose KV is computed. The difference is what is left to decode: many rows of a prompt, or the one token
that was sampled last. A generation that lost its slot has simply everything left to decode.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from llama_worker._commands import Generate
from llama_worker._engine.base import Sampler, Vocabulary
from llama_worker._errors import InvalidOutputError
from llama_worker._events import Failed, Finished, FinishReason, TokenLogprob, Usage, reply_of
from llama_worker._reply import ReplyPipeline
from llama_worker._slot import Slot
from llama_worker._speculation import Drafter
from llama_worker._tokens import TokenBuffer, TokenIds, common_prefix


class Generation:
    """One live request. The worker thread's; `slot` is None while it waits for a seat.

    One that `is_prefill` wants its prompt computed and nothing said: no logits, no sampler.
    """

    __slots__ = (
        "asked_disk",
        "cached",
        "cancel",
        "command",
        "disk_until",
        "drafter",
        "guide",
        "is_prefill",
        "kv",
        "n_prompt",
        "order",
        "passed_over",
        "reply",
        "sampler",
        "slot",
        "started_over",
        "tokens",
    )

    def __init__(self, command: Generate, vocabulary: Vocabulary, order: int) -> None:
        job = command.job
        self.command = command
        self.cancel = command.cancel
        self.order = order
        self.tokens = TokenBuffer(job.prompt)
        self.n_prompt = len(job.prompt)
        self.is_prefill = not job.max_tokens
        self.reply = ReplyPipeline(vocabulary.pieces, job.request.params.stop, job.parser, job.check_call)
        self.guide = job.guide
        self.kv = job.kv
        self.slot: Slot | None = None
        self.sampler: Sampler | None = None
        self.drafter: Drafter | None = None  # of those who may be guessed
        self.cached: int | None = None
        self.passed_over = 0
        self.started_over = False
        self.asked_disk = False
        self.disk_until: float | None = None  # when it does without the disk, once that was asked

    def __repr__(self) -> str:
        return f"<Generation {self.order}: {self.n_prompt} + {self.n_sampled} tokens, {self.n_left} left>"

    @property
    def n_sampled(self) -> int:
        return self.tokens.n - self.n_prompt

    @property
    def n_resident(self) -> int:
        """Tokens whose KV is computed."""
        return 0 if self.slot is None else self.slot.tokens.n

    @property
    def n_left(self) -> int:
        """Tokens to decode before the next one can be sampled; at least 1, of a prefill 0 when it is done."""
        slot = self.slot
        return self.tokens.n if slot is None else self.tokens.n - slot.tokens.n

    @property
    def n_ahead(self) -> int:
        """As `n_left`, but not beyond the next boundary of the prompt at which a checkpoint is worth its while."""
        slot, boundaries = self.slot, self.command.job.boundaries
        if slot is None or not boundaries:
            return self.n_left
        following = bisect_left(boundaries, max(slot.n + 1, slot.next_checkpoint))
        return boundaries[following] - slot.n if following < len(boundaries) else self.n_left

    @property
    def is_at_boundary(self) -> bool:
        n, boundaries = self.n_resident, self.command.job.boundaries
        at = bisect_left(boundaries, n)
        return at < len(boundaries) and boundaries[at] == n

    @property
    def is_decoding(self) -> bool:
        slot, n = self.slot, self.tokens.n
        return slot is not None and n > self.n_prompt and slot.tokens.n == n - 1

    @property
    def has_begun(self) -> bool:
        """Whether it ever had a slot."""
        return self.cached is not None

    @property
    def is_cancelled(self) -> bool:
        return self.cancel.cancelled

    @property
    def sampled(self) -> TokenIds:
        return self.tokens.part(self.n_prompt, self.tokens.n)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.n_prompt,
            completion_tokens=self.n_sampled,
            cached_tokens=min(self.cached or 0, self.n_prompt),
            reasoning_tokens=self.reply.n_reasoning,
        )

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self.command.job.max_tokens - self.n_sampled

    def will_share(self, prompt: TokenIds) -> int:
        """How long a prefix of `prompt` this generation holds once its own prompt is decoded."""
        return min(common_prefix(self.tokens.view, prompt), len(prompt) - 1)

    def will_checkpoint(self, prompt: TokenIds) -> int:
        """As `will_share`, up to the last boundary within it."""
        boundaries = self.command.job.boundaries
        count = bisect_right(boundaries, self.will_share(prompt)) if boundaries else 0
        return boundaries[count - 1] if count else 0

    def end_reason(self) -> FinishReason | None:
        """Why it is over after the token that was accepted last, or None."""
        if self.reply.stopped:
            return "stop"
        return "length" if self.tokens.n - self.n_prompt >= self.command.job.max_tokens else None

    def take(self, token: int, logprob: TokenLogprob | None) -> None:
        """`token` is the next of the reply: show what it completes."""
        self.tokens.append(token)
        put = self.command.sink.put
        for event in self.reply.feed(token, logprob):
            put(event)

    def flush(self) -> str:
        """Show what was held back; the whole text."""
        for event in self.reply.flush():
            self.command.sink.put(event)
        return self.reply.text

    def finish(self, reason: FinishReason) -> None:
        """Say the last word, behind what was held back."""
        self.flush()
        job = self.command.job
        end = self.reply.finished(reason, self.usage, job.model)
        wrong = self._wrong(end) if job.check_text is not None else None
        if wrong is None:
            self.command.end(end)
        else:
            self.fail(InvalidOutputError(wrong, reply_of(end)))

    def _wrong(self, end: Finished) -> str | None:
        """What is wrong with a text that its model ended by itself."""
        check = self.command.job.check_text
        if check is None or end.reason != "stop" or self.reply.stopped or end.invalid_tool_calls:
            return None
        return check(end.text)

    def fail(self, error: Exception) -> None:
        reply = self.reply
        self.command.end(Failed(error=error, text=reply.text, reasoning=reply.reasoning, usage=self.usage))
