"""Tools, choices and formats in every form that LangChain and its users have for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from langchain_core.exceptions import LangChainException
from langchain_core.runnables import RunnableBinding
from langchain_core.tools import BaseTool, StructuredTool, tool
from pydantic import BaseModel, Field, RootModel
from pydantic.v1 import BaseModel as BaseModelV1
from typing_extensions import TypedDict

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerLLM
from langchain_llama_worker._tools import core_choice, core_format, core_tools, json_schema, openai_tool, schema_tool
from llama_worker import ConfigError, InvalidRequestError, ResponseFormat, ToolName, ToolSpec, UnsupportedFeatureError

NOWHERE = "/nowhere/at-all.gguf"
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


class Add(BaseModel):
    """Adds one."""

    a: int = Field(description="what to add to")


class AddV1(BaseModelV1):
    """Adds one."""

    a: int


class AddDict(TypedDict):
    """Adds one."""

    a: Annotated[int, ..., "what to add to"]


class Tree(BaseModel):
    """A tree."""

    name: str
    children: list[Tree] = []


@tool
def add(a: int) -> int:
    """Adds one."""
    return a + 1


def add_plainly(a: int) -> int:
    """Adds one.

    Args:
        a: what to add to
    """
    return a + 1


OPENAI = {"type": "function", "function": {"name": "add", "description": "Adds one.", "parameters": SCHEMA}}
TOOLS: dict[str, tuple[Any, str]] = {
    "pydantic": (Add, "Add"),
    "pydantic.v1": (AddV1, "AddV1"),
    "TypedDict": (AddDict, "AddDict"),
    "BaseTool": (add, "add"),
    "function": (add_plainly, "add_plainly"),
    "openai": (OPENAI, "add"),
    "openai's function": (OPENAI["function"], "add"),
    "openai's responses": (
        {"type": "function", "name": "add", "description": "Adds one.", "parameters": SCHEMA},
        "add",
    ),
    "anthropic": ({"name": "add", "description": "Adds one.", "input_schema": SCHEMA}, "add"),
    "json schema": ({"title": "add", "description": "Adds one.", **SCHEMA}, "add"),
    "ToolSpec": (ToolSpec(name="add", description="Adds one.", parameters=SCHEMA), "add"),
    "schema as args": (StructuredTool(name="add", description="Adds one.", args_schema=SCHEMA), "add"),
}


@pytest.mark.parametrize(("given", "name"), TOOLS.values(), ids=TOOLS)
def test_every_form_of_a_tool_becomes_its_spec(given: Any, name: str) -> None:
    [spec] = core_tools([given])
    assert (spec.name, spec.description) == (name, "Adds one.")
    assert spec.parameters["properties"]["a"]["type"] == "integer"
    assert spec.parameters["required"] == ["a"]
    assert spec.strict is None


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("given", "name"), TOOLS.values(), ids=TOOLS)
def test_strict_reaches_the_spec_whatever_the_form(given: Any, name: str, strict: bool) -> None:
    assert core_tools([given], strict=strict)[0].strict is strict


@tool
def plant(tree: Tree, deep: int = 1) -> str:
    """Plants a tree."""
    return tree.name


@pytest.mark.parametrize(
    "given",
    [
        Tree,
        plant,
        StructuredTool(name="t", description="", args_schema=Tree.model_json_schema()),
        Tree.model_json_schema()["$defs"]["Tree"] | Tree.model_json_schema(),
    ],
    ids=["class", "tool", "schema as args", "schema"],
)
def test_a_schema_that_refers_to_itself_stays_closed(given: Any) -> None:
    """LangChain's conversion leaves `items: {}` at the turn, and the model could write anything there."""
    [spec] = core_tools([given])
    text = json.dumps(spec.parameters)
    assert "properties" in spec.parameters
    assert '"$ref": "#/$defs/Tree"' in text
    assert '"items": {}' not in text


def test_a_schema_with_definitions_and_no_circle_is_written_out() -> None:
    class Two(BaseModel):
        """Two."""

        one: Add
        other: Add

    assert "$ref" not in json.dumps(core_tools([Two])[0].parameters)


class Inner(BaseModel):
    """Holds what looks like the keyword."""

    uniqueItems: set[int]
    kind: dict[str, bool] = {"uniqueItems": True}


class Bag(BaseModel):
    """Sets everywhere."""

    tags: set[str]
    deeper: list[frozenset[int]]
    inner: Inner
    perhaps: set[int] | None = None


class BagV1(BaseModelV1):
    """Sets of the old kind."""

    tags: set[str]
    deeper: list[set[int]]


class TreeBag(BaseModel):
    """A tree of sets."""

    tags: set[str]
    children: list[TreeBag] = []


class BagDict(TypedDict):
    """Nothing validates it."""

    tags: set[str]


@tool
def keep(tags: set[str], bag: Bag) -> str:
    """Keeps."""
    return ",".join(sorted(tags))


def keywords(schema: Any) -> set[str]:
    """The keywords of a schema and of those in it, not the names of properties nor what stands in values."""
    if isinstance(schema, list):
        return {word for part in schema for word in keywords(part)}
    if not isinstance(schema, dict):
        return set()
    found = set(schema)
    for key, part in schema.items():
        if key in ("properties", "$defs", "definitions"):
            found |= {word for inner in part.values() for word in keywords(inner)}
        elif key not in ("default", "enum", "const"):
            found |= keywords(part)
    return found


@pytest.mark.parametrize("given", [Bag, BagV1, TreeBag, keep], ids=lambda g: getattr(g, "__name__", "tool"))
def test_a_class_that_drops_doubles_itself_may_be_given_them(given: Any) -> None:
    """No grammar holds `uniqueItems`: a reply that pydantic takes would be refused at its end."""
    assert "uniqueItems" not in keywords(core_tools([given])[0].parameters)
    assert "tags" in core_tools([given])[0].parameters["properties"]
    if isinstance(given, type):
        assert "uniqueItems" not in keywords(json_schema(given))
        assert "uniqueItems" not in keywords(schema_tool(given)["function"]["parameters"])
        wanted = core_format(given)
        assert wanted is not None
        assert "uniqueItems" not in keywords(wanted.json_schema)


def test_only_the_keyword_is_left_out_and_no_property_or_default_of_that_name() -> None:
    inner = json_schema(Bag)["$defs"]["Inner"]["properties"]
    assert inner["uniqueItems"]["type"] == "array"
    assert inner["kind"]["default"] == {"uniqueItems": True}


@pytest.mark.parametrize(
    "given",
    [
        Bag.model_json_schema(),
        BagDict,
        StructuredTool(name="t", description="", args_schema=Bag.model_json_schema()),
        {"name": "t", "parameters": Bag.model_json_schema()},
    ],
    ids=["schema", "TypedDict", "schema as args", "dict"],
)
def test_a_schema_that_no_class_stands_behind_keeps_what_it_says(given: Any) -> None:
    assert "uniqueItems" in keywords(core_tools([given])[0].parameters)
    if not isinstance(given, BaseTool):
        assert "uniqueItems" in keywords(json_schema(given))


@pytest.mark.parametrize("given", [BaseModel, list, RootModel], ids=repr)
def test_a_class_without_fields_is_no_tool(given: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"tools='{given.__name__}'.*give a pydantic class"):
        core_tools([given])


@pytest.mark.parametrize(
    "given",
    [
        "add",
        7,
        {},
        {"type": "web_search"},
        {"type": "function"},
        {"type": "object", "properties": {}},
        {"type": "function", "function": {"name": 7}},
        {"type": "function", "function": {"name": ""}},
        {"name": "add", "parameters": {}, "strict": "yes"},
    ],
    ids=str,
)
def test_what_is_no_tool_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequestError):
        core_tools([given])


def deep(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(n):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


class Uncallable(BaseModel):
    """Has no schema."""

    what: Callable[[], int]


@pytest.mark.parametrize("given", [deep(100_000) | {"title": "t"}, Uncallable], ids=["deep", "no schema"])
def test_a_schema_that_breaks_the_conversion_is_refused_in_words(given: Any) -> None:
    with pytest.raises(InvalidRequestError):
        core_tools([given])
    if isinstance(given, type):
        with pytest.raises(InvalidRequestError):
            json_schema(given)


def test_long_words_of_a_tool_are_kept() -> None:
    [spec] = core_tools([{"name": "t", "description": "x" * 1_000_000, "parameters": SCHEMA}])
    assert len(spec.description) == 1_000_000


@pytest.mark.parametrize("given", ["add", {"name": "add"}, 7])
def test_what_is_no_list_of_tools_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequestError, match="give a list of tools"):
        core_tools(given)


def test_a_schema_that_is_nothing_but_itself_does_not_hang() -> None:
    assert openai_tool({"name": "f", "parameters": {"$ref": "#"}})["function"]["name"] == "f"
    looped = {"title": "t", "properties": {}, "$ref": "#"}
    assert core_tools([StructuredTool(name="t", description="", args_schema=looped)])[0].parameters == looped


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        (None, None),
        (False, None),
        ("auto", "auto"),
        ("none", "none"),
        ("any", "required"),
        ("required", "required"),
        (True, "required"),
        ("add", ToolName(name="add")),
        (ToolName(name="add"), ToolName(name="add")),
        ({"type": "function", "function": {"name": "add"}}, ToolName(name="add")),
        ({"type": "function", "name": "add"}, ToolName(name="add")),
        ({"type": "tool", "name": "add"}, ToolName(name="add")),
        ({"name": "any"}, ToolName(name="any")),
        ({"type": "any"}, "required"),
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "required"}, "required"),
    ],
    ids=str,
)
def test_every_form_of_a_choice_is_understood(given: Any, choice: Any) -> None:
    assert core_choice(given) == choice


@pytest.mark.parametrize("given", [7, 1.0, [], {}, {"type": "function"}, {"type": "allowed_tools"}, ""], ids=str)
def test_what_is_no_choice_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequestError):
        core_choice(given)


def test_a_response_format_is_taken_in_all_its_forms() -> None:
    wanted = ResponseFormat(type="json_schema", json_schema=Add.model_json_schema())
    assert core_format(Add) == wanted == core_format(wanted)
    assert core_format({"type": "json_schema", "json_schema": {"name": "a", "schema": wanted.json_schema}}) == wanted
    assert core_format({"type": "json_object"}) == ResponseFormat(type="json_object")
    assert core_format({"type": "regex", "regex": "[a-z]+"}) == ResponseFormat(type="regex", regex="[a-z]+")
    assert core_format({"type": "text"}) is core_format(None) is None


@pytest.mark.parametrize("given", ["json", 7, {}, {"type": "xml"}, {"type": "json_schema"}, SCHEMA], ids=str)
def test_what_is_no_response_format_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequestError):
        core_format(given)


@pytest.mark.parametrize(
    "given",
    [Add, AddV1, AddDict, SCHEMA, OPENAI, OPENAI["function"], TOOLS["anthropic"][0], {"name": "a", "schema": SCHEMA}],
    ids=lambda g: getattr(g, "__name__", "dict"),
)
def test_every_form_of_a_schema_is_one(given: Any) -> None:
    assert json_schema(given)["properties"]["a"]["type"] == "integer"


# -- bind_tools -------------------------------------------------------------------------------------


def bound(**kwargs: Any) -> RunnableBinding[Any, Any]:
    binding = ChatLlamaWorker(model=NOWHERE).bind_tools([add, Tree], **kwargs)
    assert isinstance(binding, RunnableBinding)
    return binding


def test_tools_are_bound_under_that_name_and_as_plain_data() -> None:
    """LangChain looks for the key `tools`, and saves and traces what is bound."""
    assert list(bound().kwargs) == ["tools"]
    assert [t["function"]["name"] for t in json.loads(json.dumps(bound().kwargs["tools"]))] == ["add", "Tree"]


def test_what_is_given_is_bound_and_what_is_not_is_not() -> None:
    kwargs = bound(tool_choice="any", parallel_tool_calls=False, response_format={"type": "json_object"}, seed=3).kwargs
    assert {k: v for k, v in kwargs.items() if k != "tools"} == {
        "tool_choice": "any",
        "parallel_tool_calls": False,
        "response_format": {"type": "json_object"},
        "seed": 3,
    }


def test_a_tool_that_is_none_is_refused_when_it_is_bound_by_an_error_of_both_families() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatLlamaWorker(model=NOWHERE).bind_tools([{"type": "web_search"}])
    assert isinstance(caught.value, LangChainException)
    with pytest.raises(InvalidRequestError):
        bound(tool_choice=7)


# -- what reaches the worker ------------------------------------------------------------------------


def asked(_call: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    options = ChatLlamaWorker(model=NOWHERE, **fields)._chat_call([], None, _call or {}).options
    return {name: value for name, value in options.items() if value is not None}


def test_a_call_without_any_of_it_asks_for_nothing() -> None:
    assert asked() == asked({"tools": [], "tool_choice": None, "response_format": None, "parallel_tool_calls": None})
    assert not set(asked()) & {"tools", "tool_choice", "response_format", "parallel_tool_calls"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parallel_tool_calls", True),
        ("parallel_tool_calls", False),
        ("enable_thinking", False),
        ("reasoning_budget", 0),
        ("template_variables", {"x": 1}),
        ("speculate", False),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_each_keyword_is_one_of_the_constructor_and_of_each_call(name: str, value: Any) -> None:
    expected = core_format(value) if name == "response_format" else value
    assert asked({name: value})[name] == asked(**{name: value})[name] == expected
    assert asked({name: None}, **{name: value})[name] == expected


def test_a_call_has_the_last_word() -> None:
    assert asked({"enable_thinking": True}, enable_thinking=False)["enable_thinking"] is True
    assert asked({"tools": [add], "tool_choice": "auto"}, tool_choice="any")["tool_choice"] == "auto"


def test_the_constructors_choice_holds_where_there_are_tools_to_choose() -> None:
    assert asked({"tools": [add]}, tool_choice="any")["tool_choice"] == "required"
    assert asked({"tools": [add], "tool_choice": None}, tool_choice="any")["tool_choice"] == "required"
    assert "tool_choice" not in asked(tool_choice="any")
    assert asked({"tool_choice": "any"})["tool_choice"] == "required"  # for the worker to refuse


def test_strict_of_a_call_holds_for_its_tools_and_its_format() -> None:
    options = asked({"tools": [add], "response_format": Add, "strict": True})
    assert options["tools"][0].strict is True
    assert options["response_format"].strict is True


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("tool_choice", 7, InvalidRequestError),
        ("response_format", {"type": "xml"}, InvalidRequestError),
        ("reasoning_budget", "much", ConfigError),
        ("enable_thinking", "perhaps", ConfigError),
    ],
)
def test_a_bad_value_is_named_when_the_model_is_made(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=field if field != "response_format" else "type='xml'"):
        ChatLlamaWorker(model=NOWHERE, **{field: value})


@pytest.mark.parametrize("old", ["functions", "function_call"])
def test_what_openai_had_before_tools_is_refused_with_the_way_out(old: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"give tool"):
        ChatLlamaWorker(model=NOWHERE).invoke("hello", **{old: [{"name": "f"}]})


def test_a_completion_has_a_format_and_no_tools() -> None:
    model = LlamaWorkerLLM(model=NOWHERE, response_format={"type": "regex", "regex": "[0-9]+"})
    assert model._text_call("one", None, {}).options["response_format"].regex == "[0-9]+"
    with pytest.raises(UnsupportedFeatureError, match="use ChatLlamaWorker"):
        model.invoke("one", tools=[add])


def test_models_that_ask_for_different_things_have_different_identities() -> None:
    plain = ChatLlamaWorker(model=NOWHERE)
    for change in (
        {"tool_choice": "any"},
        {"enable_thinking": False},
        {"response_format": Add},
        {"reasoning_budget": 9},
    ):
        other = ChatLlamaWorker(model=NOWHERE, **change)
        assert other._identifying_params != plain._identifying_params
        assert other._get_llm_string() != plain._get_llm_string()


def test_the_tool_of_the_tests_is_one() -> None:
    assert isinstance(add, BaseTool)


LONG = {"name": "a" * 300, "description": "", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (lambda: core_format({"type": "verse"}), "response_format.type"),
        (lambda: core_format({"type": "regex", "regexp": "a"}), "response_format.regexp"),
        (lambda: core_format({"type": "regex"}), "response_format"),
        (lambda: core_tools([ToolSpec(name="b"), {"type": "function", "function": LONG}]), "tools.1.name"),
    ],
)
def test_an_error_names_the_whole_way_to_a_field(asked: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        asked()
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}=")
