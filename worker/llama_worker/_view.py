"""ModelView: what callers may know of the loaded model, and what they prepare requests with.

The worker thread owns the model and the context; nothing else touches them. What others need is
published as one immutable value, held by reference and freed when the last reader drops it. Preparing
(render, tokenize, check that it fits) happens with it on the caller's thread or on the worker's
preparer, so it neither delays a generation nor races a reload: a request that was prepared for a view
that is no longer served is prepared again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from operator import index
from pathlib import Path
from typing import Any, Final

import numpy as np

from llama_worker._boundaries import chat_boundaries, common_text, raw_boundaries
from llama_worker._chat.analysis import format_of
from llama_worker._chat.format import ChatFormat
from llama_worker._chat.segments import ControlTextGuard
from llama_worker._chat.template import CHATML, ChatTemplate
from llama_worker._config import ModelConfig
from llama_worker._engine.base import EngineLimits, LoadedModel, LoraInfo, ModelInfo, Vocabulary
from llama_worker._errors import (
    ConfigError,
    ContextOverflowError,
    Hidden,
    InvalidRequestError,
    TemplateError,
    UnsupportedFeatureError,
)
from llama_worker._guarding import guarded_message, guarded_tool, guarded_variables
from llama_worker._identity import BASE, KVIdentity
from llama_worker._jobs import EmbedJob, GenerationJob
from llama_worker._loras import chosen
from llama_worker._planning import PLAIN, LazyCompiler, check_request, plan_reply
from llama_worker._replies import KnownReplies, covering
from llama_worker._requests import EmbedRequest, GenerationRequest, Message, ToolSpec
from llama_worker._tokens import TokenIds

logger = logging.getLogger("llama_worker")

_NAMES_OF_OURS: Final = frozenset(
    {"self", "messages", "tools", "format", "enable_thinking", "add_generation_prompt", "today"}
)


_OTHER: Final = Message(role="user", content="\u241f")
"""Stands for whatever else a user may say."""

_REPLY: Final = Message(role="assistant", content="\u241f")
"""Stands for whatever is replied."""


def template_source(given: str | None) -> str | None:
    """The Jinja text of `ModelConfig.chat_template`, which is that text or the path of a file with it.

    Raises ConfigError for what is neither.
    """
    if given is None or "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        reason = f"neither Jinja text nor a file that can be read as such ({type(exc).__name__})"
        raise ConfigError("chat_template", given, reason) from None


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
    replies: KnownReplies
    compiler: LazyCompiler
    loras: Mapping[str, LoraInfo]

    @classmethod
    def of(
        cls, loaded: LoadedModel, config: ModelConfig, epoch: int, loras: Mapping[str, LoraInfo] | None = None
    ) -> ModelView:
        vocabulary, limits, info = loaded.vocabulary, loaded.engine.limits, loaded.info
        source = template_source(config.chat_template) or info.chat_template
        if source is None and limits.generates:
            logger.info("%s has no chat template; ChatML is used", info.name)
        wanted = config.n_ctx or info.n_ctx_train or limits.n_ctx
        guard = ControlTextGuard(vocabulary.control_texts)
        return cls(
            epoch=epoch,
            config=config,
            info=info,
            limits=limits,
            vocabulary=vocabulary,
            template=ChatTemplate(source or CHATML, bos_text=vocabulary.bos_text, eos_text=vocabulary.eos_text),
            guard=guard,
            n_ctx=min(wanted, limits.n_ctx) if limits.generates else limits.n_embed_text,
            replies=KnownReplies(guard.protect),
            compiler=LazyCompiler(vocabulary),
            loras=loras or {},
        )

    def with_loras(self, loras: Mapping[str, LoraInfo], config: ModelConfig) -> ModelView:
        """The same model with these adapters, as `config` says; what was prepared for this view is good for that."""
        return replace(self, loras=loras, config=config)

    def tokenize(self, text: str) -> TokenIds:
        """The ids of plain text: no BOS, and what looks like a control token stays text."""
        if not isinstance(text, str):
            raise InvalidRequestError("text", type(text).__name__, "give a str")
        return self.vocabulary.tokenize(text, add_special=False, parse_special=False)

    def detokenize(self, ids: Sequence[int]) -> str:
        pieces = self.vocabulary.pieces
        try:
            tokens = [index(token) for token in ids]
        except TypeError:
            raise InvalidRequestError("ids", type(ids).__name__, "give a list of ints") from None
        unknown = next((token for token in tokens if not 0 <= token < len(pieces)), None)
        if unknown is not None:
            raise InvalidRequestError("ids", unknown, f"the vocabulary has ids 0 to {len(pieces) - 1}")
        return b"".join(pieces[token] for token in tokens).decode("utf-8", "replace")

    @property
    def format(self) -> ChatFormat:
        """How the chat template writes thoughts and calls. Milliseconds the first time."""
        return format_of(self.template)

    def chat_tokens(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> TokenIds:
        """The ids of a rendered conversation, ready for the model to answer.

        Text of the messages never becomes a control token, and replies of this model keep the ids that
        were sampled. Raises TemplateError and InvalidRequestError.
        """
        return self.tokens_of(self.rendered(messages, tools))

    def rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        *,
        enable_thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        today: date | None = None,
    ) -> str:
        """The prompt as the template writes it, with the guard's marks. Raises TemplateError, InvalidRequestError."""
        taken = _NAMES_OF_OURS & set(variables or ())
        if taken:
            raise InvalidRequestError("template_variables", min(taken), "this name is not free; it has its own field")
        return self.template.lay_out(
            [guarded_message(message, self.guard.protect) for message in messages],
            tools=[guarded_tool(tool, self.guard.protect) for tool in tools],
            format=self.format,
            enable_thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt,
            today=today or date.today(),
            **guarded_variables(variables or {}, self.guard.protect),
        ).text

    def prompt_tokens(self, prompt: str) -> TokenIds:
        """The ids of a raw prompt: with BOS as the model wants it, control tokens in it are parsed."""
        return self.vocabulary.tokenize(prompt, add_special=True, parse_special=True)

    def prepare_generation(
        self,
        request: GenerationRequest,
        *,
        tokens: TokenIds | None = None,
        today: date | None = None,
        says: bool = True,
    ) -> GenerationJob:
        """Tokens that fit. Raises RequestError.

        `tokens` stand in place of the request's prompt, `today` in that of the clock's day. Unless it `says` anything,
        the job is to compute the prompt and no more.
        """
        if not self.limits.generates:
            raise UnsupportedFeatureError("generation", f"{self.info.name} is an embedding model; open a chat model")
        if request.speculate:
            self._require_speculation()
        format = PLAIN if request.messages is None else self.format
        check_request(request, format)
        kv = chosen(request, self.loras, self.limits)
        rendered = None if request.messages is None else self._rendered_for(request, request.messages, today=today)
        prompt = self.prompt_tokens(request.prompt or "") if rendered is None else self.tokens_of(rendered, kv)
        prompt = prompt if tokens is None else tokens
        if not len(prompt):
            raise InvalidRequestError("prompt", "", "it has no tokens, and this model has no BOS to begin with")
        max_tokens = self._room(len(prompt), request.params.max_tokens)
        boundaries = self._boundaries(request, rendered, prompt, today) if self.limits.needs_checkpoints else ()
        job = GenerationJob(
            request=request,
            epoch=self.epoch,
            model=self.info.name,
            prompt=prompt,
            max_tokens=0,
            rendered=rendered,
            boundaries=boundaries,
            kv=kv,
        )
        if not says:
            return job
        plan = plan_reply(request, format, rendered, self.vocabulary, self.compiler, room=max_tokens)
        return replace(
            job,
            max_tokens=max_tokens,
            opening=plan.opening,
            guide=plan.guide,
            parser=plan.parser,
            check_call=plan.check_call,
            check_text=plan.check_text,
        )

    def _require_speculation(self) -> None:
        if self.config.speculation == "off":
            raise InvalidRequestError("speculate", True, "the model was opened with speculation='off'; use 'auto'")
        if not self.limits.can_trim:
            raise UnsupportedFeatureError("speculate", f"{self.info.name} cannot take tokens back; leave it out")

    def _rendered_for(
        self,
        request: GenerationRequest,
        messages: Sequence[Message],
        *,
        asks: bool = True,
        today: date | None = None,
    ) -> str:
        return self.rendered(
            messages,
            request.tools,
            enable_thinking=request.enable_thinking,
            variables=request.template_variables,
            add_generation_prompt=asks,
            today=today,
        )

    def _boundaries(
        self, request: GenerationRequest, rendered: str | None, prompt: TokenIds, today: date | None
    ) -> tuple[int, ...]:
        """See `_boundaries`. What stays the same is seen by rendering the chat with something else behind it."""
        messages = request.messages
        if messages is None or rendered is None:
            return raw_boundaries(len(prompt))
        roles = [message.role for message in messages]
        heads = {next((i for i, role in enumerate(roles) if role != "system"), len(roles)), _last(roles, "user")}

        def stable(chat: Sequence[Message], *, asks: bool) -> int | None:
            try:
                return common_text(rendered, self._rendered_for(request, chat, asks=asks, today=today))
            except TemplateError:
                return None  # it does not take such a chat: then this place is not known

        places = {stable((*messages[:head], _OTHER), asks=True) for head in heads}
        places.add(stable((*messages, _REPLY), asks=False) or stable(messages, asks=False))
        before = [self.n_bytes(rendered[:place]) for place in places if place is not None]
        return chat_boundaries(prompt, self.vocabulary.pieces, before, self.n_bytes(rendered))

    def n_bytes(self, rendered: str) -> int:
        """How long a part of what `rendered` returned is in UTF-8, without the guard's marks."""
        return sum(len(segment.text.encode("utf-8", "replace")) for segment in self.guard.split(rendered))

    def warm(self) -> None:
        """Do now what is done once: read the template, make the vocabulary ready for constraints. Blocks."""
        if self.limits.generates:
            self.compiler.warm(self.format)

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
                "texts", Hidden(text), "it has no tokens; this model has no BOS, so there is nothing to embed"
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

    def tokens_of(self, rendered: str, kv: KVIdentity = BASE) -> TokenIds:
        """The ids of what `rendered` returned; replies that this model, with `kv`, gave keep theirs."""
        turn = self.replies.find(rendered, kv)
        if turn is None:
            return self._segment_tokens(rendered)
        # As it stands in the prompt: the template may have trimmed it, the guard put marks into it.
        region = rendered[turn.length : turn.length + max(map(len, turn.forms))]
        count, length = covering(turn.ids, region, self.vocabulary.pieces)
        known = np.concatenate([turn.prompt, turn.ids[:count]])
        return np.concatenate([known, self._segment_tokens(rendered[turn.length + length :], int(known[-1]))])


def _last(roles: Sequence[str], role: str) -> int:
    return next((i for i in range(len(roles) - 1, -1, -1) if roles[i] == role), 0)
