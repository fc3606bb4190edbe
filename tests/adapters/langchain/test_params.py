"""The constructor's keywords: complete, checked, and never a reason to load a model."""

import pytest
from pydantic import BaseModel

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings, LlamaWorkerLLM
from langchain_llama_worker._params import ModelFields, SamplingFields
from llama_worker import (
    ConfigError,
    InvalidRequestError,
    ModelConfig,
    SamplingParams,
    WorkerConfig,
)

CLASSES = [ChatLlamaWorker, LlamaWorkerLLM, LlamaWorkerEmbeddings]
NOWHERE = "/nowhere/at-all.gguf"


@pytest.mark.parametrize("settings", [ModelConfig, WorkerConfig])
def test_every_setting_of_the_worker_is_a_keyword(settings: type) -> None:
    assert set(settings.model_fields) <= set(ModelFields.model_fields)


def test_every_sampling_parameter_is_a_keyword_and_nothing_else() -> None:
    assert set(SamplingParams.model_fields) == set(SamplingFields.model_fields)


@pytest.mark.parametrize("settings", [ModelConfig, WorkerConfig, SamplingParams])
def test_the_defaults_of_the_worker_spelt_out_change_nothing(settings: type[BaseModel]) -> None:
    """So the type of each keyword has room for what the worker's own field holds."""
    spelt_out = {name: field.default for name, field in settings.model_fields.items() if name != "model"}
    chat = ChatLlamaWorker(model=NOWHERE, **spelt_out)
    assert chat._identifying_params == ChatLlamaWorker(model=NOWHERE)._identifying_params


@pytest.mark.parametrize("cls", CLASSES)
def test_constructing_loads_nothing(cls: type) -> None:
    """Even a model that does not exist is only missed at the first use."""
    assert cls(model=NOWHERE).model == NOWHERE


@pytest.mark.parametrize("cls", CLASSES)
def test_an_unknown_keyword_is_named_with_the_nearest_known_one(cls: type) -> None:
    with pytest.raises(ConfigError, match=r"n_cxt=99.*did you mean n_ctx"):
        cls(model=NOWHERE, n_cxt=99)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_bad_setting_is_named_with_its_value(cls: type) -> None:
    with pytest.raises(ConfigError, match="n_parallel=0"):
        cls(model=NOWHERE, n_parallel=0)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_value_of_the_wrong_type_is_named(cls: type) -> None:
    with pytest.raises(ConfigError, match="n_ctx='many'"):
        cls(model=NOWHERE, n_ctx="many")


def test_a_bad_sampling_parameter_is_named_with_its_value() -> None:
    with pytest.raises(InvalidRequestError, match=r"temperature=-1\.0"):
        ChatLlamaWorker(model=NOWHERE, temperature=-1)


@pytest.mark.parametrize("cls", CLASSES)
def test_without_model_and_worker_there_is_nothing_to_open(cls: type) -> None:
    with pytest.raises(ConfigError, match="model=None"):
        cls()


@pytest.mark.parametrize("cls", CLASSES)
def test_model_path_is_another_name_for_model(cls: type) -> None:
    assert cls(model_path=NOWHERE).model == NOWHERE


def test_stop_sequences_is_another_name_for_stop() -> None:
    assert ChatLlamaWorker(model=NOWHERE, stop_sequences=["END"]).stop == ["END"]


def test_the_settings_given_reach_the_worker() -> None:
    chat = ChatLlamaWorker(model=NOWHERE, n_ctx=123, type_k="q8_0", tensor_split=[0.5, 0.5], queue_size=3)
    assert chat._settings() == ModelConfig(model=NOWHERE, n_ctx=123, type_k="q8_0", tensor_split=(0.5, 0.5))
    assert chat._worker_settings() == WorkerConfig(queue_size=3)


def test_a_call_adds_its_stops_to_those_of_the_constructor() -> None:
    chat = ChatLlamaWorker(model=NOWHERE, stop=["A", "B"])
    assert chat._sampling(["B", "C"]).stop == ("A", "B", "C")
    assert chat._sampling([]).stop == ("A", "B")


def test_a_call_replaces_the_sampling_of_the_constructor() -> None:
    chat = ChatLlamaWorker(model=NOWHERE, temperature=0, seed=7, top_k=5)
    assert chat._sampling(None, {"temperature": 0.5}) == SamplingParams(temperature=0.5, seed=7, top_k=5)


def test_none_at_a_call_means_the_default() -> None:
    chat = ChatLlamaWorker(model=NOWHERE, temperature=0, seed=7)
    assert chat._sampling(None, {"seed": None, "temperature": None}) == SamplingParams()


def test_api_key_is_accepted_and_leaves_no_trace() -> None:
    chat = ChatLlamaWorker(model=NOWHERE, api_key="sk-secret")
    assert "secret" not in repr(chat)
    assert "api_key" not in chat._identifying_params


def test_the_repr_names_what_was_given() -> None:
    assert (
        repr(ChatLlamaWorker(model=NOWHERE, temperature=0.5)) == f"ChatLlamaWorker(model='{NOWHERE}', temperature=0.5)"
    )


def test_the_repr_of_a_chat_names_its_choices_and_no_schema() -> None:
    chat = ChatLlamaWorker(
        model=NOWHERE, tool_choice="any", enable_thinking=False, response_format={"type": "json_object"}
    )
    assert repr(chat) == f"ChatLlamaWorker(model='{NOWHERE}', enable_thinking=False, tool_choice='any')"


def test_models_that_differ_in_anything_that_matters_have_different_identities() -> None:
    """LangChain's caches are keyed by this."""
    plain = ChatLlamaWorker(model=NOWHERE)
    for change in ({"seed": 1}, {"stop": ["x"]}, {"chat_template": "{{ x }}"}, {"n_ctx": 99}, {"logit_bias": {3: 1.0}}):
        other = ChatLlamaWorker(model=NOWHERE, **change)
        assert other._identifying_params != plain._identifying_params
        assert other._get_llm_string() != plain._get_llm_string()


def test_a_call_with_a_misspelt_keyword_raises() -> None:
    with pytest.raises(InvalidRequestError, match="temprature"):
        ChatLlamaWorker(model=NOWHERE).invoke("hello", temprature=0)


def test_an_unknown_keyword_of_a_call_is_answered_with_what_was_meant() -> None:
    for keyword, hint in (("tool", "did you mean tools"), ("max_new_tokens", "here it is max_tokens")):
        with pytest.raises(InvalidRequestError, match=f"^{keyword}=7: unknown; {hint}"):
            ChatLlamaWorker(model=NOWHERE).invoke("hello", **{keyword: 7})


@pytest.mark.parametrize("cls", CLASSES)
def test_another_library_s_name_is_answered_with_ours(cls: type) -> None:
    with pytest.raises(ConfigError, match="context_window=7: unknown; here it is n_ctx"):
        cls(model=NOWHERE, context_window=7)


def test_what_a_user_said_is_in_no_error() -> None:
    for keywords in ({"stop": {"My PIN": 1}}, {"sytem": "My PIN"}, {"template_variables": "My PIN"}):
        with pytest.raises(ConfigError) as caught:
            ChatLlamaWorker(model=NOWHERE, **keywords)
        assert "PIN" not in str(caught.value)


def test_a_setting_of_the_model_cannot_be_changed_by_a_call() -> None:
    with pytest.raises(InvalidRequestError, match="constructor"):
        ChatLlamaWorker(model=NOWHERE).invoke("hello", n_ctx=8)


def test_tracing_reports_what_the_call_uses() -> None:
    chat = ChatLlamaWorker(model=NOWHERE, temperature=0, max_tokens=9, stop=["A"])
    assert chat._get_ls_params(stop=["B"], max_tokens=5, model="other.gguf") == {
        "ls_provider": "llama_worker",
        "ls_model_name": "other.gguf",
        "ls_model_type": "chat",
        "ls_temperature": 0.0,
        "ls_max_tokens": 5,
        "ls_stop": ["A", "B"],
    }
