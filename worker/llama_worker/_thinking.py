"""can_think: what may be known of a model's thoughts before it is loaded."""

from __future__ import annotations

from functools import lru_cache

from llama_worker._chat.analysis import format_of
from llama_worker._chat.template import CHATML, ChatTemplate
from llama_worker._engine.base import ModelInfo
from llama_worker._errors import TemplateError
from llama_worker._view import template_source


def can_think(info: ModelInfo, chat_template: str | None = None) -> bool:
    """Whether the replies of a model may have thoughts (`Reply.reasoning`), read off what its chat template renders.

    `chat_template` is that of ModelConfig: Jinja text, or the path of a file with it, in place of the model's own.
    Any thread; blocks for some milliseconds the first time. Raises ConfigError for a path that cannot be read.
    """
    if info.is_embedding:
        return False
    return _thinks(template_source(chat_template) or info.chat_template or CHATML)


@lru_cache(64)  # adapters ask each time they are made, and LangChain makes one for each call
def _thinks(source: str) -> bool:
    try:
        return format_of(ChatTemplate(source, bos_text="", eos_text="")).reasoning is not None
    except TemplateError:
        return False
