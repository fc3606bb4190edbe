"""WithRaw: a model and a parser, whose answer is the reply and what became of it, be it good or not."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from langchain_core.runnables.utils import AddableDict
from pydantic import ConfigDict

from langchain_llama_worker._replies import message_of, rest_of
from llama_worker import InvalidOutputError


class WithRaw(RunnableSerializable[LanguageModelInput, dict[str, Any]]):
    """Gives `raw`, `parsed` and `parsing_error`: the last two say what the parser made of the reply, or why nothing.

    A reply that the worker itself found invalid is told in the same way. Streamed, `raw` comes in chunks and the
    other two once, at the end: a sum of the chunks is what `invoke` gives. Whatever else the model raises is raised.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: Runnable[Any, Any]
    parser: Runnable[Any, Any]
    in_blocks: bool = False

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        return self._call_with_config(self._answer, input, config, **kwargs)

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return await self._acall_with_config(self._aanswer, input, config, **kwargs)

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        yield from self._transform_stream_with_config(iter([input]), self._told, config, **kwargs)

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[dict[str, Any]]:
        told = self._atransform_stream_with_config(_only(input), self._atold, config, **kwargs)
        async with aclosing(cast("AsyncGenerator[dict[str, Any], None]", told)) as chunks:
            async for chunk in chunks:
                yield chunk

    def _answer(
        self, input: LanguageModelInput, run_manager: CallbackManagerForChainRun, config: RunnableConfig, **kwargs: Any
    ) -> dict[str, Any]:
        try:
            raw = self.model.invoke(input, config, **kwargs)
        except InvalidOutputError as error:
            return {"raw": self._raw(error), **_failed(error)}
        return {"raw": raw, **self._parsed(raw, config)}

    async def _aanswer(
        self,
        input: LanguageModelInput,
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> dict[str, Any]:
        try:
            raw = await self.model.ainvoke(input, config, **kwargs)
        except InvalidOutputError as error:
            return {"raw": self._raw(error), **_failed(error)}
        return {"raw": raw, **await self._aparsed(raw, config)}

    def _told(
        self,
        inputs: Iterator[LanguageModelInput],
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> Iterator[dict[str, Any]]:
        said: Any = None
        try:
            for piece in self.model.stream(next(inputs), config, **kwargs):
                said = piece if said is None else said + piece
                yield AddableDict(raw=piece)
        except InvalidOutputError as error:
            yield AddableDict(raw=self._raw(error, said))
            yield AddableDict(_failed(error))
        else:
            yield AddableDict(self._parsed(said, config))

    async def _atold(
        self,
        inputs: AsyncIterator[LanguageModelInput],
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> AsyncIterator[dict[str, Any]]:
        said: Any = None
        told = self.model.astream(await anext(inputs), config, **kwargs)
        try:
            async with aclosing(cast("AsyncGenerator[Any, None]", told)) as pieces:
                async for piece in pieces:
                    said = piece if said is None else said + piece
                    yield AddableDict(raw=piece)
        except InvalidOutputError as error:
            yield AddableDict(raw=self._raw(error, said))
            yield AddableDict(_failed(error))
        else:
            yield AddableDict(await self._aparsed(said, config))

    def _parsed(self, raw: AIMessage, config: RunnableConfig) -> dict[str, Any]:
        try:
            return {"parsed": self.parser.invoke(raw, config), "parsing_error": None}
        except Exception as error:  # noqa: BLE001 - what a class's own validators raise is an answer here too
            return _failed(error)

    async def _aparsed(self, raw: AIMessage, config: RunnableConfig) -> dict[str, Any]:
        try:
            return {"parsed": await self.parser.ainvoke(raw, config), "parsing_error": None}
        except Exception as error:  # noqa: BLE001 - as above
            return _failed(error)

    def _raw(self, error: InvalidOutputError, said: AIMessageChunk | None = None) -> AIMessage:
        """The reply that `error` has, or what of it was not `said` yet."""
        if error.reply is None:
            raise error
        return message_of(error.reply, in_blocks=self.in_blocks) if said is None else rest_of(error.reply, said)


def _failed(error: Exception) -> dict[str, Any]:
    return {"parsed": None, "parsing_error": error}


async def _only(input: LanguageModelInput) -> AsyncIterator[LanguageModelInput]:
    yield input
