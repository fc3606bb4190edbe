"""The thread of a conversation, as LangGraph calls it, and how a model comes to know it.

`configurable["thread_id"]` of a RunnableConfig reaches a model by contextvar where a chain or a graph calls it.
Called directly it would get lost: there it goes into the run's metadata, or the keywords. For the worker it is a
session: a hint which slot to prefer, and whose turn it is. It changes no answer, and nothing is required of who has
none.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import RunnableConfig, ensure_config

_LONGEST = 256
"""Characters of a session's name."""


class Threaded:
    """A model whose calls know the thread that they belong to. Goes before LangChain's own class."""

    if not TYPE_CHECKING:  # for which the signatures are those of LangChain

        def invoke(self, input, config=None, **kwargs):
            return super().invoke(input, with_thread(config), **kwargs)

        async def ainvoke(self, input, config=None, **kwargs):
            return await super().ainvoke(input, with_thread(config), **kwargs)

        # LangChain gives `_stream` no run, but the keywords.
        def stream(self, input, config=None, **kwargs):
            return super().stream(input, config, **self._with_session(config, kwargs))

        def astream(self, input, config=None, **kwargs):
            return super().astream(input, config, **self._with_session(config, kwargs))

        def _with_session(self, config, kwargs):
            given = kwargs.get("session_id") is not None or self.session_id is not None
            name = None if given else _name(_thread_in(config))
            return kwargs if name is None else {**kwargs, "session_id": name}


def with_thread(config: RunnableConfig | None) -> RunnableConfig | None:
    """`config` with its thread in the metadata, too."""
    thread = _thread_in(config)
    if config is None or thread is None or "thread_id" in (config.get("metadata") or {}):
        return config
    return {**config, "metadata": {**(config.get("metadata") or {}), "thread_id": thread}}


def session_of(run_manager: Any) -> str | None:
    """The name of the worker's session for the run of `run_manager`: that of its thread, None where it has none."""
    metadata = getattr(run_manager, "metadata", None) or {}
    thread = metadata.get("thread_id")
    return _name(_thread_in(ensure_config()) if thread is None else thread)


def _name(thread: Any) -> str | None:
    name = "" if thread is None else str(thread)
    if len(name) > _LONGEST:  # nobody asked for a session: what a graph takes for a thread fails no call
        return blake2b(name.encode("utf-8", "replace")).hexdigest()
    return name or None


def _thread_in(config: RunnableConfig | None) -> Any:
    return None if config is None else (config.get("configurable") or {}).get("thread_id")
