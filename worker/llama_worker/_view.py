"""ModelView: what callers may know of the loaded model, and what they prepare requests with.

The worker thread owns the model and the context; nothing else touches them. What others need is
published as one immutable value, held by reference and freed when the last reader drops it. Preparing
(render, tokenize, check that it fits) happens with it on the caller's thread or on the worker's
preparer, so it neither delays a generation nor races a reload: a request that was prepared for a view
that is no longer served is prepared again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date

import numpy as np

from llama_worker._chat.segments import ControlTextGuard, Span
from llama_worker._chat.template import CHATML, ChatTemplate
from llama_worker._config import ModelConfig
from llama_worker._engine.base import EngineLimits, LoadedModel, ModelInfo, Vocabulary
from llama_worker._errors import ContextOverflowError, InvalidRequestError, UnsupportedFeatureError
from llama_worker._jobs import EmbedJob, GenerationJob
from llama_worker._replies import KnownReplies, PrefixDigest, covering, digest_of
from llama_worker._requests import EmbedRequest, GenerationRequest, Message
from llama_worker._tokens import TokenIds

logger = logging.getLogger("llama_worker")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelView:
    """One loaded model, as seen from outside the worker thread. Every method: any thread, never waits."""

    epoch: int
    config: ModelConfig
    info: ModelInfo
    limits: EngineLimits
    vocabulary: Vocabulary
    template: ChatTemplate
    guard: ControlTextGuard
    n_ctx: int
    replies: KnownReplies = field(default_factory=KnownReplies)

    @classmethod
    def of(cls, loaded: LoadedModel, config: ModelConfig, epoch: int) -> ModelView:
        vocabulary, limits, info = loaded.vocabulary, loaded.engine.limits, loaded.info
        source = config.chat_template or info.chat_template
        if source is None and limits.generates:
            logger.info("%s has no chat template; ChatML is used", info.name)
        wanted = config.n_ctx or info.n_ctx_train or limits.n_ctx
        return cls(
            epoch=epoch,
            config=config,
            info=info,
            limits=limits,
            vocabulary=vocabulary,
            template=ChatTemplate(source or CHATML, bos_text=vocabulary.bos_text, eos_text=vocabulary.eos_text),
            guard=ControlTextGuard(vocabulary.control_texts),
            n_ctx=min(wanted, limits.n_ctx) if limits.generates else limits.n_embed_text,
        )

    def tokenize(self, text: str) -> TokenIds:
        """The ids of plain text: no BOS, and what looks like a control token stays text."""
        return self.vocabulary.tokenize(text, add_special=False, parse_special=False)

    def detokenize(self, ids: Sequence[int]) -> str:
        pieces = self.vocabulary.pieces
        unknown = next((token for token in ids if not 0 <= token < len(pieces)), None)
        if unknown is not None:
            raise InvalidRequestError("ids", unknown, f"the vocabulary has ids 0 to {len(pieces) - 1}")
        return b"".join(pieces[token] for token in ids).decode("utf-8", "replace")

    def chat_tokens(self, messages: Sequence[Message]) -> TokenIds:
        """The ids of a rendered conversation, ready for the model to answer.

        Text of the messages never becomes a control token, and replies of this model keep the ids that
        were sampled. Raises TemplateError and InvalidRequestError.
        """
        guarded = [self._guarded(message) for message in messages]
        layout = self.template.lay_out(guarded, add_generation_prompt=True, today=date.today())
        known = [
            (span, message.content)
            for span, message in zip(layout.spans, messages, strict=True)
            if span is not None and message.role == "assistant" and self.replies.knows(message.content)
        ]
        return self._spliced(layout.text, known)

    def _guarded(self, message: Message) -> Message:
        name = message.name and self.guard.protect(message.name)
        return message.model_copy(update={"content": self.guard.protect(message.content), "name": name})

    def prompt_tokens(self, prompt: str) -> TokenIds:
        """The ids of a raw prompt: with BOS as the model wants it, control tokens in it are parsed."""
        return self.vocabulary.tokenize(prompt, add_special=True, parse_special=True)

    def prepare_generation(self, request: GenerationRequest) -> GenerationJob:
        """Tokens that fit. Raises RequestError."""
        if not self.limits.generates:
            raise UnsupportedFeatureError("generation", f"{self.info.name} is an embedding model; open a chat model")
        if request.messages is not None:
            prompt = self.chat_tokens(request.messages)
        else:
            prompt = self.prompt_tokens(request.prompt or "")
        if not len(prompt):
            raise InvalidRequestError("prompt", "", "it has no tokens, and this model has no BOS to begin with")
        return GenerationJob(
            request=request,
            epoch=self.epoch,
            model=self.info.name,
            prompt=prompt,
            max_tokens=self._room(len(prompt), request.params.max_tokens),
            prefix_digest=digest_of(prompt) if request.messages is not None else None,
        )

    def prepare_embedding(self, request: EmbedRequest) -> EmbedJob:
        """Tokens of each text, within what one batch takes. Raises RequestError."""
        if not self.limits.embeds:
            raise UnsupportedFeatureError("embedding", f"{self.info.name} cannot embed; open an embedding model")
        return EmbedJob(
            request=request,
            epoch=self.epoch,
            texts=tuple(self._embed_tokens(text, request.overlong == "truncate") for text in request.texts),
        )

    def _room(self, n_prompt: int, max_tokens: int | None) -> int:
        if n_prompt >= self.n_ctx:
            raise ContextOverflowError(stage="prompt", resident=0, additional=n_prompt + 1, n_ctx=self.n_ctx)
        if max_tokens is None:
            return self.n_ctx - n_prompt
        if n_prompt + max_tokens > self.n_ctx:
            raise ContextOverflowError(stage="max_tokens", resident=n_prompt, additional=max_tokens, n_ctx=self.n_ctx)
        return max_tokens

    def _embed_tokens(self, text: str, truncate: bool) -> TokenIds:
        tokens = self.vocabulary.tokenize(text, add_special=True, parse_special=False)
        limit = self.limits.n_embed_text
        if not len(tokens):
            raise InvalidRequestError(
                "texts", text, "it has no tokens; this model has no BOS, so there is nothing to embed"
            )
        if len(tokens) <= limit:
            return tokens
        if not truncate:
            raise ContextOverflowError(stage="embed", resident=0, additional=len(tokens), n_ctx=limit)
        # Keep the closing token (SEP, EOS) where the vocabulary adds one: the model was trained to see it.
        closing = tokens[-1:] if self._closes(tokens) else tokens[limit - 1 : limit]
        return np.concatenate([tokens[: limit - 1], closing])

    def _closes(self, tokens: TokenIds) -> bool:
        return int(tokens[-1]) in self.vocabulary.end_tokens or self.info.is_embedding

    def _segment_tokens(self, rendered: str, after: int | None = None) -> TokenIds:
        parts: list[TokenIds] = []
        for segment in self.guard.split(rendered):
            ids = self.vocabulary.tokenize(segment.text, add_special=False, parse_special=segment.special, after=after)
            parts.append(ids)
            after = int(ids[-1]) if len(ids) else after
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def _spliced(self, rendered: str, replies: Sequence[tuple[Span, str]]) -> TokenIds:
        parts: list[TokenIds] = []
        digest, cursor, after = PrefixDigest(), 0, None
        for (start, stop), text in replies:
            before = self._segment_tokens(rendered[cursor:start], after)
            here = digest.copy()
            here.update(before)
            ids = self.replies.find(here.value(), text)
            if ids is None:  # this text, but not after this prompt: it is tokenized with what surrounds it
                continue
            # As it stands in the prompt: the template may have trimmed it, the guard put marks into it.
            count, length = covering(ids, rendered[start:stop], self.vocabulary.pieces)
            if not count:
                continue
            parts += [before, ids[:count]]
            here.update(ids[:count])
            digest, cursor, after = here, start + length, int(ids[count - 1])
        return np.concatenate([*parts, self._segment_tokens(rendered[cursor:], after)])
