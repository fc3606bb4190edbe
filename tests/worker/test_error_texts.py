"""What an error shows: the field and the way out, and never what a user said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Any

import pytest

from llama_worker import (
    ConfigError,
    EmbedRequest,
    GenerationRequest,
    InvalidRequestError,
    LlamaWorker,
    Message,
    ModelConfig,
    ResponseFormat,
    SamplingParams,
    ToolCall,
    ToolSpec,
)
from llama_worker._config import NAME, Settings, holds_text
from llama_worker._constraint.answer import Answer
from llama_worker._errors import FieldError
from llama_worker.testing import fake_worker

PIN = "My PIN is 1234"
BLOCKS = [{"type": "text", "text": PIN}]
REQUESTS = [GenerationRequest, EmbedRequest, SamplingParams, Message, ToolCall, ToolSpec, ResponseFormat]


def said_by(worker: LlamaWorker, **turn: Any) -> object:
    return worker.generate([{"role": "user", "content": "x", **turn}])


def asked(worker: LlamaWorker, **keywords: Any) -> object:
    return worker.generate([{"role": "user", "content": "x"}], **keywords)


def called(worker: LlamaWorker, arguments: object) -> object:
    return said_by(worker, role="assistant", tool_calls=[{"id": "a", "name": "b", "arguments": arguments}])


SAID: dict[str, tuple[str, Callable[[LlamaWorker], object]]] = {
    "content in blocks": ("messages.0.content", lambda w: said_by(w, content=BLOCKS)),
    "content in bytes": ("messages.0.content", lambda w: said_by(w, content=PIN.encode())),
    "a number for content": ("messages.0.content", lambda w: said_by(w, content=1234)),
    "content under another name": ("messages.0.contents", lambda w: w.generate([{"role": "user", "contents": PIN}])),
    "no role": ("messages.0.role", lambda w: w.generate([{"content": PIN}])),
    "a thought in blocks": ("messages.0.reasoning", lambda w: said_by(w, reasoning=BLOCKS)),
    "a text among messages": ("messages", lambda w: GenerationRequest(messages=(PIN,))),  # type: ignore[arg-type]
    "a text for messages": ("messages", lambda w: GenerationRequest(messages=PIN)),  # type: ignore[arg-type]
    "a list of texts for a prompt": ("prompt", lambda w: GenerationRequest(prompt=[PIN])),  # type: ignore[arg-type]
    "arguments in a list": ("messages.0.tool_calls.0.arguments", lambda w: called(w, [PIN])),
    "arguments that are no JSON": ("messages.0.tool_calls.0.arguments", lambda w: called(w, PIN)),
    "a number for arguments": ("messages.0.tool_calls.0.arguments", lambda w: called(w, 1234)),
    "texts to embed": ("texts", lambda w: w.embed([[PIN]])),  # type: ignore[list-item]
    "a tool's description": ("tools.0.description", lambda w: asked(w, tools=[{"name": "a", "description": [PIN]}])),
    "a tool's schema": ("tools.0.parameters", lambda w: asked(w, tools=[{"name": "a", "parameters": PIN}])),
    "a stop": ("stop", lambda w: asked(w, stop=[[PIN]])),
    "a regex": ("response_format.regex", lambda w: asked(w, response_format={"type": "regex", "regex": [PIN]})),
    "a choice": ("response_format.choices", lambda w: asked(w, response_format={"type": "choice", "choices": PIN})),
    "a choice of half a character": (
        "response_format.choices",
        lambda w: Answer(ResponseFormat(type="choice", choices=(f"{PIN} \ud800",))),
    ),
    "a grammar": ("response_format.grammar", lambda w: asked(w, response_format={"type": "gbnf", "grammar": [PIN]})),
    "a variable": ("template_variables", lambda w: asked(w, template_variables=PIN)),
    "a list for a number": ("temperature", lambda w: asked(w, temperature=[PIN])),
    "a bias": ("logit_bias", lambda w: asked(w, logit_bias={"3": PIN})),
    "an unknown keyword": ("sytem", lambda w: asked(w, sytem=PIN)),
}


@pytest.mark.parametrize(("field", "call"), SAID.values(), ids=SAID)
def test_what_a_user_said_is_in_no_error(
    field: str, call: Callable[[LlamaWorker], object], caplog: pytest.LogCaptureFixture
) -> None:
    with fake_worker() as worker, caplog.at_level(logging.DEBUG), pytest.raises(FieldError) as caught:
        call(worker)
    assert caught.value.field == field
    for text in (str(caught.value), repr(caught.value), caplog.text):
        assert "PIN" not in text
        assert "1234" not in text


def test_names_and_words_and_numbers_are_shown() -> None:
    """They are what a program says, and seeing them is what helps."""
    with fake_worker() as worker:
        for wrong, keywords in (
            ("temperature='hot'", {"temperature": "hot"}),
            ("top_k=-1", {"top_k": -1}),
            ("response_format.type='xml'", {"response_format": {"type": "xml"}}),
            ("tool_choice='perhaps'", {"tool_choice": "perhaps"}),
            ("priority=9", {"priority": 9}),
        ):
            with pytest.raises(InvalidRequestError, match=f"^{wrong}: "):
                asked(worker, **keywords)
        with pytest.raises(InvalidRequestError, match=r"^messages\.0\.role='narrator': "):
            said_by(worker, role="narrator")


def test_what_holds_text_is_told_by_the_type() -> None:
    """So a new field needs no entry anywhere: one that admits text is not shown unless it is declared a NAME."""

    class Asked(Settings):
        anything: Any = None
        text: str = ""
        many: tuple[str, ...] = ()
        schema_: dict[str, Any] | bool | None = None
        turn: Message | None = None
        name: Annotated[str, NAME] = ""
        names: tuple[tuple[Annotated[str, NAME], float], ...] = ()
        number: int | None = None

    holding = {name for name, field in Asked.model_fields.items() if holds_text(field)}
    assert holding == {"anything", "text", "many", "schema_", "turn"}


def test_the_fields_of_requests_that_are_shown_are_these() -> None:
    """Texts among them are names: look twice at a change of this list."""
    shown = {
        f"{cls.__name__}.{name}"
        for cls in REQUESTS
        for name, field in cls.model_fields.items()
        if not holds_text(field) and "str" in str(field.annotation)
    }
    assert shown == {
        "GenerationRequest.loras",
        "GenerationRequest.session",
        "EmbedRequest.session",
        "Message.name",
        "Message.tool_call_id",
        "ToolCall.id",
        "ToolCall.name",
        "ToolSpec.name",
    }


MISSPELT: dict[str, tuple[dict[str, Any], str]] = {
    "response_format": ({"response_formt": 3}, "did you mean response_format?"),
    "tools": ({"tool": []}, "did you mean tools?"),
    "session": ({"session_id": "a"}, "did you mean session?"),
    "temperature": ({"temprature": 0}, "did you mean temperature?"),
    "a model's": ({"n_ctx": 9}, "belongs to the model"),
    "another library's": ({"max_new_tokens": 9}, "here it is max_tokens"),
    "another library's of a model": ({"context_window": 9}, "here it is n_ctx, which belongs to the model"),
    "like nothing": ({"qqqq": 9}, "a call takes the fields of SamplingParams and of GenerationRequest"),
}


@pytest.mark.parametrize(("keywords", "hint"), MISSPELT.values(), ids=MISSPELT)
def test_an_unknown_keyword_of_a_call_is_answered_with_what_was_meant(keywords: dict[str, Any], hint: str) -> None:
    with fake_worker() as worker:
        for ask in (worker.generate, worker.stream):
            with pytest.raises(InvalidRequestError) as caught:
                ask("x", **keywords)
            assert caught.value.field == next(iter(keywords))
            assert hint in caught.value.reason


def test_every_keyword_that_is_known_is_taken() -> None:
    """What is offered as meant must not be refused then."""
    for name in ("tools", "tool_choice", "response_format", "enable_thinking", "loras", "speculate", "timeout"):
        default = GenerationRequest.model_fields[name].get_default(call_default_factory=True)
        with fake_worker() as worker:
            assert asked(worker, **{name: default}, max_tokens=2)


def test_an_unknown_field_of_a_configuration_is_answered_with_what_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"^n_gpu_layer=5: unknown; did you mean n_gpu_layers\?$"):
        ModelConfig(model="x", n_gpu_layer=5)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"num_ctx=5: unknown; here it is n_ctx$"):
        ModelConfig(model="x", num_ctx=5)  # type: ignore[call-arg]


def test_an_error_of_our_own_begins_with_no_word_of_pydantic() -> None:
    with pytest.raises(ConfigError, match=r"names must be unique$") as caught:
        ModelConfig(model="x", lora_paths=[("a", "b"), ("a", "c")])  # type: ignore[arg-type]
    assert "Value error" not in str(caught.value)


def test_more_shares_than_there_can_be_devices_never_reach_a_reload() -> None:
    """llama.cpp knows 16: found out while it loads, the former model would be gone already."""
    with fake_worker() as worker:
        with pytest.raises(ConfigError, match="tensor_split"):
            worker.reload(tensor_split=(1.0,) * 17)
        assert (worker.status().state, worker.status().epoch) == ("ready", 1)
    assert ModelConfig(model="x", tensor_split=(1.0,) * 16).tensor_split == (1.0,) * 16
