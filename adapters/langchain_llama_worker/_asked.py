"""What a chat may be asked for beside its sampling: tools, the choice of them, thoughts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from langchain_llama_worker._model import GenerationFields
from langchain_llama_worker._tools import core_choice, core_tools


class ChatFields(GenerationFields):
    """The keywords of a chat, each for all calls of an object or for one call; a call's None is the object's.

    `tool_choice`: None or "auto", "none", "any" (the same as "required" and True), the name of a tool, or a dict of
    OpenAI's form. As a field it holds for the calls that have tools. `parallel_tool_calls`: may one reply hold
    several calls; by default it may not. `enable_thinking` None leaves it to the model's template;
    `reasoning_budget` is in tokens. `template_variables` are further names for the chat template.
    """

    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    reasoning_budget: int | None = None
    template_variables: dict[str, Any] | None = None

    _asked_names: ClassVar[frozenset[str]] = frozenset(
        {
            "response_format",
            "loras",
            "speculate",
            "strict",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "enable_thinking",
            "reasoning_budget",
            "template_variables",
        }
    )

    def _asked(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        tools = core_tools(kwargs.get("tools"), strict=kwargs.get("strict"))
        asked = {
            **super()._asked(kwargs),
            "tools": tools or None,
            "tool_choice": self._choice(kwargs, bool(tools)),
            **{name: self._said(kwargs, name) for name in _PASSED_ON},
        }
        return {name: value for name, value in asked.items() if value is not None}

    def _choice(self, kwargs: Mapping[str, Any], has_tools: bool) -> Any:
        """The call's own choice holds in any case: without tools the worker refuses it."""
        default = core_choice(self.tool_choice)
        own = core_choice(kwargs.get("tool_choice"))
        return own if own is not None else default if has_tools else None


_PASSED_ON = ("parallel_tool_calls", "enable_thinking", "reasoning_budget", "template_variables")
