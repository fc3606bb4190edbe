"""Tools, choices and calls, translated."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ContentBlock, TextBlock, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import FunctionTool, ToolMetadata
from llama_index.llms.llama_worker import LlamaWorkerLLM, UnusableReply
from llama_index.llms.llama_worker._tools import calls_of, core_choice, core_tools, openai_tool, wanted_choice
from pydantic import BaseModel

from llama_worker import InvalidRequestError, LlamaWorkerError, ToolName, ToolSpec
from llama_worker.testing import Gate

from .conftest import HELLO


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


ADD = FunctionTool.from_defaults(add)
DOTTED = FunctionTool.from_defaults(add, name="my.tool[int]")
FORCED = {"type": "function", "function": {"name": "add"}}


def test_a_tool_keeps_its_name() -> None:
    """LlamaIndex looks the tool up by it, and its own description has another one: my_tool_int_."""
    assert openai_tool(DOTTED)["function"]["name"] == "my.tool[int]"


def test_a_tool_is_described_with_its_schema() -> None:
    spec = ToolSpec.model_validate(openai_tool(ADD))
    assert (spec.name, spec.parameters["required"]) == ("add", ["a", "b"])
    assert spec.description.endswith("Add two numbers.")


def test_a_description_may_be_long() -> None:
    """LlamaIndex's own check would refuse more than 1,024 characters."""
    tool = FunctionTool.from_defaults(add, description="x" * 10_000)
    assert len(ToolSpec.model_validate(openai_tool(tool)).description) == 10_000


def test_a_tool_without_a_schema_takes_one_text() -> None:
    tool = FunctionTool.from_defaults(add)
    tool.metadata.fn_schema = None
    assert list(ToolSpec.model_validate(openai_tool(tool)).parameters["properties"]) == ["input"]


def test_tools_come_in_the_frameworks_form_or_in_ours() -> None:
    ours = ToolSpec(name="f")
    assert core_tools([ADD, ours, {"name": "g"}]) == [openai_tool(ADD), ours, {"name": "g"}]


def test_of_a_function_a_tool_is_made_as_agents_do(llm: LlamaWorkerLLM) -> None:
    assert core_tools([add]) == [openai_tool(ADD)]
    assert llm._prepare_chat_with_tools([add], "Hello")["tools"] == [openai_tool(ADD)]


def wait(gate: Gate) -> None:
    """Its argument is of a class that no JSON becomes."""


@pytest.mark.parametrize("tool", [7, "add", None, object(), partial(add, 1), wait])
def test_what_is_no_tool_is_refused(tool: Any, llm: LlamaWorkerLLM) -> None:
    for ask in (llm.chat_with_tools, llm.stream_chat_with_tools, llm.predict_and_call):
        with pytest.raises(InvalidRequestError, match="a BaseTool"):
            ask([tool], "Hello")
    with pytest.raises(InvalidRequestError, match="a BaseTool"):
        llm.chat(HELLO, tools=[tool])


def test_arguments_that_no_schema_describes_are_refused(llm: LlamaWorkerLLM) -> None:
    def later(then: Callable[[], None]) -> None: ...

    for tool in (later, FunctionTool.from_defaults(later)):
        with pytest.raises(InvalidRequestError, match=r"later.*fn_schema"):
            llm.chat_with_tools([tool], "Hello")


def test_what_is_run_here_is_a_tool_or_a_function(llm: LlamaWorkerLLM) -> None:
    for tool in (ToolSpec(name="f"), {"name": "f"}):
        assert len(llm._prepare_chat_with_tools([tool], "Hello")["tools"]) == 1  # type: ignore[list-item]
        with pytest.raises(InvalidRequestError, match="called here"):
            llm.predict_and_call([tool], "Hello")  # type: ignore[list-item]


class Tagged(BaseModel):
    tags: set[str]
    others: list[frozenset[int]]


def test_a_set_may_be_told_with_an_element_twice() -> None:
    """Its class makes one of it. A schema that is no class's own stays as it is."""

    class Raw(ToolMetadata):
        def get_parameters_dict(self) -> dict[str, Any]:
            return Tagged.model_json_schema()

    tool = FunctionTool.from_defaults(add, fn_schema=Tagged)
    assert "uniqueItems" in str(tool.metadata.get_parameters_dict())
    assert "uniqueItems" not in str(openai_tool(tool))
    assert openai_tool(tool)["function"]["parameters"].keys() == tool.metadata.get_parameters_dict().keys()
    raw = FunctionTool(add, Raw(name="add", description="", fn_schema=Tagged))
    own = {"name": "add", "parameters": Tagged.model_json_schema()}
    assert "uniqueItems" in str(openai_tool(raw))
    assert core_tools([own]) == [own]


@pytest.mark.parametrize("tools", [7, "add", {"name": "add"}, True])
def test_tools_are_many(tools: object, llm: LlamaWorkerLLM) -> None:
    with pytest.raises(InvalidRequestError, match="a list of tools"):
        llm.chat(HELLO, tools=tools)


@pytest.mark.parametrize("name", [None, ""])
def test_a_tool_has_a_name(name: str | None, llm: LlamaWorkerLLM) -> None:
    tool = FunctionTool.from_defaults(add)
    tool.metadata.name = name
    with pytest.raises(InvalidRequestError, match="no name"):
        llm.chat_with_tools([tool], "Hello")


def test_two_tools_have_two_names(llm: LlamaWorkerLLM) -> None:
    with pytest.raises(InvalidRequestError, match="two tools"):
        llm.chat_with_tools([ADD, ADD], "Hello")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ("any", "required"),
        ("add", ToolName(name="add")),
        (FORCED, ToolName(name="add")),
        ({"name": "add"}, ToolName(name="add")),
        (ToolName(name="add"), ToolName(name="add")),
    ],
)
def test_a_choice_comes_in_many_forms(given: object, meant: object) -> None:
    assert core_choice(given) == meant


@pytest.mark.parametrize("given", [7, True, ["add"], "", {"type": "tool"}])
def test_what_is_no_choice_is_refused(given: object) -> None:
    with pytest.raises(InvalidRequestError):
        core_choice(given)


@pytest.mark.parametrize(
    ("choice", "required", "wanted"),
    [
        (None, False, "auto"),
        (None, True, "required"),
        ("auto", True, "required"),
        ("add", True, FORCED),
        (FORCED, False, FORCED),
        ("none", False, "none"),
    ],
)
def test_a_choice_and_a_requirement_are_one_wish(choice: object, required: bool, wanted: object) -> None:
    assert wanted_choice(choice, required=required) == wanted


def test_a_required_call_of_none_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="tool_required"):
        wanted_choice("none", required=True)


def test_what_is_prepared_is_plain_json(llm: LlamaWorkerLLM) -> None:
    """Telemetry and workflows write it down."""
    history = [ChatMessage("Before", role="user"), ChatMessage("Yes", role="assistant")]
    asked = llm._prepare_chat_with_tools([ADD], "Hello", history, allow_parallel_tool_calls=True, tool_choice="add")
    assert [message.content for message in asked.pop("messages")] == ["Before", "Yes", "Hello"]
    assert asked == {"tools": [openai_tool(ADD)], "tool_choice": FORCED, "parallel_tool_calls": True}
    assert json.loads(json.dumps(asked)) == asked
    assert len(history) == 2


def test_the_users_message_may_be_a_message(llm: LlamaWorkerLLM) -> None:
    asked = llm._prepare_chat_with_tools([ADD], HELLO[0])
    assert asked["messages"] == HELLO
    assert (asked["tool_choice"], asked["parallel_tool_calls"]) == ("auto", False)


def test_no_tools_ask_for_nothing(llm: LlamaWorkerLLM) -> None:
    """A FunctionAgent without tools passes an empty list."""
    assert llm._prepare_chat_with_tools([], "Hello", seed=1) == {"messages": HELLO, "seed": 1}


@pytest.mark.parametrize("asked", [{"tool_required": True}, {"tool_choice": "add"}])
def test_a_call_of_no_tool_is_refused(asked: dict[str, object], llm: LlamaWorkerLLM) -> None:
    with pytest.raises(InvalidRequestError, match="tool_choice"):
        llm.chat_with_tools([], "Hello", **asked)  # type: ignore[arg-type]


def block(call_id: str | None = "1", name: str = "add", arguments: dict[str, object] | str = "") -> ToolCallBlock:
    return ToolCallBlock(tool_call_id=call_id, tool_name=name, tool_kwargs=arguments or {"a": 1})


def response(*blocks: ContentBlock, calls: object = None) -> ChatResponse:
    kwargs = {} if calls is None else {"tool_calls": calls}
    return ChatResponse(message=ChatMessage(blocks=list(blocks), role="assistant", additional_kwargs=kwargs))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"a": 1, "b": [2', {"a": 1, "b": [2]}),
        ('{"a": "x', {"a": "x"}),
        ('{"a": "x", "b', {"a": "x"}),
        ("{", {}),
        ("", {}),
        ("nothing", {}),
        ("[1]", {}),
    ],
)
def test_a_call_that_is_being_written_is_read_as_far_as_it_goes(
    written: str, read: dict[str, object], llm: LlamaWorkerLLM
) -> None:
    entry = {"id": "1", "type": "function", "function": {"name": "add", "arguments": written}}
    [call] = llm.get_tool_calls_from_response(response(calls=[entry]))
    assert (call.tool_id, call.tool_name, call.tool_kwargs) == ("1", "add", read)


def test_complete_calls_come_before_the_one_that_is_being_written(llm: LlamaWorkerLLM) -> None:
    entries = [{"id": i, "type": "function", "function": {"name": "add", "arguments": "{"}} for i in ("1", "2")]
    calls = llm.get_tool_calls_from_response(response(block(), calls=entries))
    assert [(call.tool_id, call.tool_kwargs) for call in calls] == [("1", {"a": 1}), ("2", {})]


def test_calls_without_ids_get_one_each_and_keep_it() -> None:
    message = response(block(None), block(None), block("x")).message
    assert [call.id for call in calls_of(message)] == ["call_0", "call_1", "x"]
    assert [call.id for call in calls_of(message)] == ["call_0", "call_1", "x"]


@pytest.mark.parametrize("calls", [None, [], "nothing", 7])
def test_a_response_may_have_no_calls(calls: object, llm: LlamaWorkerLLM) -> None:
    assert llm.get_tool_calls_from_response(response(calls=calls), error_on_no_tool_call=False) == []


def test_no_call_where_one_was_expected_is_an_error_that_both_sides_know(llm: LlamaWorkerLLM) -> None:
    with pytest.raises(UnusableReply, match="tool_required") as caught:
        llm.get_tool_calls_from_response(response(TextBlock(text="secret")))
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, LlamaWorkerError)
    assert "secret" not in str(caught.value)


def test_a_call_that_was_cut_off_is_named_as_the_reason(llm: LlamaWorkerLLM) -> None:
    cut = response().model_copy(update={"raw": {"finish_reason": "length"}})
    with pytest.raises(UnusableReply, match="max_tokens"):
        llm.get_tool_calls_from_response(cut)


def test_one_call_is_kept_where_one_was_allowed(llm: LlamaWorkerLLM) -> None:
    entries = [ToolSelection(tool_id=i, tool_name="add", tool_kwargs={}) for i in ("1", "2")]
    many = response(TextBlock(text="x"), block("1"), block("2"), calls=entries)
    kept = llm._validate_chat_with_tools_response(many, [ADD])
    assert [b.block_type for b in kept.message.blocks] == ["text", "tool_call"]
    assert kept.message.additional_kwargs["tool_calls"] == entries[:1]
    assert [call.tool_id for call in llm.get_tool_calls_from_response(kept)] == ["1"]
    assert len(llm.get_tool_calls_from_response(many)) == 2
    assert llm._validate_chat_with_tools_response(many, [ADD], allow_parallel_tool_calls=True) is many
