"""A FunctionAgent with two tools: the demo model is made to use them, then a scripted model chooses them by itself."""

import asyncio
import logging
import sys
from typing import Any, Literal

from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker.testing import fake_worker

TASK = "Is it dry in Bergen, and when does a ferry go there?"
CALLS = [
    '<tool_call>{"name": "weather", "arguments": {"town": "Bergen"}}</tool_call>',
    '<tool_call>{"name": "ferry", "arguments": {"town": "Bergen", "day": "today"}}</tool_call>',
]


def weather(town: Literal["Bergen", "Oslo"]) -> str:
    """Tells the weather of a town."""
    return f"It rains in {town}."


def ferry(town: Literal["Bergen", "Oslo"], day: Literal["today", "tomorrow"]) -> str:
    """Tells when a ferry goes to a town."""
    return f"A ferry goes to {town} {day} at nine."


class InTurn(LlamaWorkerLLM):
    """So small a model decides nothing well: it calls one tool, then the other, then answers in words."""

    async def astream_chat_with_tools(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["tool_choice"] = ["weather", "ferry", "none"][sum(m.role == "tool" for m in kwargs["chat_history"])]
        return await super().astream_chat_with_tools(*args, **kwargs)


async def show(llm: LlamaWorkerLLM) -> None:
    run = FunctionAgent(llm=llm, tools=[weather, ferry], allow_parallel_tool_calls=False).run(user_msg=TASK)
    async for event in run.stream_events():
        if isinstance(event, ToolCallResult):
            print(f"calls {event.tool_name}({event.tool_kwargs}):", event.tool_output)
    print("says:", await run)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="note: %(message)s")
    asyncio.run(show(InTurn(model="demo://smollm2-135m-instruct", temperature=0, max_tokens=48)))
    with fake_worker(*CALLS, "It rains in Bergen. A ferry goes today at nine.") as fake:
        asyncio.run(show(LlamaWorkerLLM(worker=fake)))
