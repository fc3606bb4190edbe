"""What LangChain completes of a call that was cut off, it must not take for a call."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk

from langchain_llama_worker._cut import begun_arguments, spoiler

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(['"', "\\", '\\"', "]", "}", "\\u00e9"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=6), VALUES, max_size=3)


def parsed(arguments: str) -> AIMessageChunk:
    piece = tool_call_chunk(name="pay", args=arguments, id="1", index=0)
    return AIMessageChunk(content="", tool_call_chunks=[piece], chunk_position="last")


@given(value=OBJECTS, ascii=st.booleans(), data=st.data())
def test_no_beginning_of_any_arguments_is_a_call_when_it_is_spoilt(
    value: dict[str, Any], ascii: bool, data: st.DataObject
) -> None:
    text = json.dumps(value, ensure_ascii=ascii)
    cut = text[: data.draw(st.integers(0, len(text)))]
    message = parsed(cut + spoiler(cut))
    assert message.tool_calls == []
    assert [call["name"] for call in message.invalid_tool_calls] == ["pay"]
    with pytest.raises(ValueError):  # so that the v3 events, which read strictly, agree
        json.loads(cut + spoiler(cut))


@given(text=st.text())
def test_any_text_can_be_spoilt_and_read_again(text: str) -> None:
    assert parsed(text + spoiler(text)).tool_calls == []
    assert isinstance(begun_arguments(text + spoiler(text)), dict)


@given(value=OBJECTS)
def test_whole_arguments_that_were_refused_are_read_as_they_were(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    assert begun_arguments(text) == value == begun_arguments(text + spoiler(text))


@given(value=OBJECTS, data=st.data())
def test_a_beginning_is_read_back_as_it_was_before_it_was_spoilt(value: dict[str, Any], data: st.DataObject) -> None:
    """But for one that ends in a quote or a backslash: there, two beginnings may have the same spoilt text."""
    text = json.dumps(value)
    cut = text[: data.draw(st.integers(0, len(text)))]
    if not cut.endswith(("\\", '"')):
        assert begun_arguments(cut + spoiler(cut)) == begun_arguments(cut)


def test_without_it_langchain_makes_a_payment_of_what_was_cut_off() -> None:
    """Why all this is needed; when it fails, it is not any more."""
    assert parsed('{"to": "bob", "amount": 10').tool_calls[0]["args"] == {"to": "bob", "amount": 10}
    assert parsed("").tool_calls[0]["args"] == {}
