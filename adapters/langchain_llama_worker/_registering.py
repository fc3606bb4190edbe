"""Makes this package known to `init_chat_model` and `init_embeddings`, which take no providers but LangChain's own.

They read one private table each. So this is a step that a user takes in so many words, and it changes nothing
if a table is not what it was when this was written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from langchain_llama_worker._params import PROVIDER
from llama_worker import UnsupportedFeatureError

T = TypeVar("T")

_TABLES = (("langchain.chat_models.base", "ChatLlamaWorker"), ("langchain.embeddings.base", "LlamaWorkerEmbeddings"))
_PACKAGE = __name__.partition(".")[0]


def register() -> None:
    """Let `init_chat_model("llama_worker:/models/m.gguf")` and `init_embeddings("llama_worker:…")` find us.

    For this process; any number of times. Raises UnsupportedFeatureError, having changed nothing, if langchain is
    not installed or keeps its providers otherwise than it used to.
    """
    tables = [(_table(module), cls) for module, cls in _TABLES]
    for table, cls in tables:
        table.setdefault(PROVIDER, (_PACKAGE, cls, _construct))


def _table(module: str) -> dict[str, tuple[str, str, Callable[..., Any]]]:
    try:
        table: Any = getattr(importlib.import_module(module), "_BUILTIN_PROVIDERS", None)
    except ImportError as exc:
        raise UnsupportedFeatureError("register()", "install langchain") from exc
    if not isinstance(table, dict) or not table or not all(map(_is_entry, table.values())):
        raise UnsupportedFeatureError(
            f"register() with this version of {module}", "construct ChatLlamaWorker or LlamaWorkerEmbeddings yourself"
        )
    if PROVIDER in table and table[PROVIDER][0] != _PACKAGE:
        raise UnsupportedFeatureError("register()", f"{PROVIDER} is the name of {table[PROVIDER][0]} there")
    return table


def _is_entry(entry: object) -> bool:
    match entry:
        case (str(), str(), maker):
            return callable(maker)
    return False


def _construct(cls: Callable[..., T], **kwargs: Any) -> T:
    return cls(**kwargs)
