"""An agent with two tools: the demo model is made to use them, then a scripted model chooses them by itself."""

from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain.tools import tool

from langchain_llama_worker import ChatLlamaWorker
from llama_worker.testing import fake_worker

TASK: Any = {"messages": [{"role": "user", "content": "Is it dry in Bergen, and when does a ferry go there?"}]}
SCRIPT = [
    '<tool_call>\n{"name": "weather", "arguments": {"town": "Bergen"}}\n</tool_call>',
    '<tool_call>\n{"name": "ferry", "arguments": {"town": "Bergen", "day": "today"}}\n</tool_call>',
    "It rains in Bergen. A ferry goes today at nine.",
]


@tool
def weather(town: Literal["Bergen", "Oslo"]) -> str:
    """Tells the weather of a town."""
    return f"It rains in {town}."


@tool
def ferry(town: Literal["Bergen", "Oslo"], day: Literal["today", "tomorrow"]) -> str:
    """Tells when a ferry goes to a town."""
    return f"A ferry goes to {town} {day} at nine."


@wrap_model_call
def in_turn(request: Any, handler: Any) -> Any:
    """So small a model decides nothing well: it calls one tool, then the other, then answers in words."""
    return handler(request.override(tool_choice=["weather", "ferry", "none"][len(request.messages) // 2]))


def show(state: dict[str, Any]) -> None:
    for message in state["messages"][1:]:
        print(*(f"calls {call['name']}({call['args']})" for call in getattr(message, "tool_calls", ())), message.text)


if __name__ == "__main__":
    chat = ChatLlamaWorker(model="demo://smollm2-135m-instruct", temperature=0, max_tokens=48)
    show(create_agent(chat, [weather, ferry], middleware=[in_turn]).invoke(TASK))
    with fake_worker(*SCRIPT) as worker:
        show(create_agent(ChatLlamaWorker(worker=worker), [weather, ferry]).invoke(TASK))
