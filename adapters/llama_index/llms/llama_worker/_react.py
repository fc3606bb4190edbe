"""ReAct: agents that call tools by text. The model writes an action, and the agent what the tool observed."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import ChatMessage

REACT_STOP = "Observation:"
"""What the agent writes. A model that is not stopped here goes on and invents what the tool said."""


def teaches_react(messages: Sequence[ChatMessage]) -> bool:
    """Whether the first message explains the format, as the one of a ReActAgent does."""
    told = (messages[0].content or "") if messages else ""
    return "Action Input:" in told and REACT_STOP in told
