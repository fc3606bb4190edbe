"""Settings, copies and what is known before a model is loaded."""

import copy
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.llms.utils import resolve_llm
from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding
from llama_index.llms.llama_worker import LlamaWorkerLLM, WorkerComponent

from llama_worker import (
    ConfigError,
    InvalidRequestError,
    LlamaWorker,
    ModelConfig,
    ModelNotFoundError,
    SamplingParams,
    WorkerConfig,
)
from llama_worker.testing import fake_loader, fake_worker

from .conftest import HELLO

both = pytest.mark.parametrize("component", [LlamaWorkerLLM, LlamaWorkerEmbedding])


@both
def test_every_setting_of_the_worker_is_a_field_with_its_default(component: type[WorkerComponent]) -> None:
    made = component(model="m.gguf")
    for settings in (ModelConfig(model="m.gguf"), WorkerConfig()):
        assert {name: getattr(made, name) for name in type(settings).model_fields} == dict(settings)


def test_every_sampling_parameter_is_a_field_with_its_default() -> None:
    llm = LlamaWorkerLLM(model="m.gguf")
    assert {name: getattr(llm, name) for name in SamplingParams.model_fields} == dict(SamplingParams())


@both
@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"n_ctxx": 1}, "n_ctxx"),
        ({"n_ctx": -5}, "n_ctx"),
        ({"on_full": "explode"}, "on_full"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_a_keyword_that_cannot_work_is_named(
    component: type[WorkerComponent], keywords: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError, match=field):
        component(model="m.gguf", **keywords)


def test_an_unknown_keyword_is_answered_with_what_was_meant() -> None:
    """LlamaIndex's own names for one thing and another are not ours, and a list of sixty helps nobody."""
    for keyword, hint in (
        ("context_window", "here it is n_ctx"),
        ("max_new_tokens", "here it is max_tokens"),
        ("n_gpu_layer", "did you mean n_gpu_layers"),
        ("qqqq", "the fields are those of LlamaWorkerLLM"),
    ):
        with pytest.raises(ConfigError, match=f"^{keyword}=7: unknown; {hint}") as caught:
            LlamaWorkerLLM(model="m.gguf", **{keyword: 7})
        assert len(str(caught.value)) < 100


def test_an_unknown_keyword_of_a_call_is_answered_with_what_was_meant(worker: LlamaWorker) -> None:
    llm = LlamaWorkerLLM(worker=worker)
    for keyword, hint in (
        ("response_formt", "did you mean response_format"),
        ("tool", "did you mean tools"),
        ("n_ctx", "belongs to the model"),
        ("max_new_tokens", "here it is max_tokens"),
    ):
        with pytest.raises(InvalidRequestError, match=f"^{keyword}=7: .*{hint}"):
            llm.complete("x", **{keyword: 7})


def test_what_a_user_said_is_in_no_error() -> None:
    for keywords in ({"system_prompt": ["My PIN"]}, {"system_promt": "My PIN"}, {"stop": [["My PIN"]]}):
        with pytest.raises(ConfigError) as caught:
            LlamaWorkerLLM(model="m.gguf", **keywords)
        assert "PIN" not in str(caught.value)


def test_sampling_keywords_are_checked_by_the_constructor() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        LlamaWorkerLLM(model="m.gguf", temperature=-1)


def test_stops_and_biases_come_in_any_form(worker: LlamaWorker) -> None:
    assert LlamaWorkerLLM(worker=worker, stop="there").complete("x").text == "Hi "
    llm = LlamaWorkerLLM(worker=worker, stop=["there"], logit_bias={7: 1.0})
    assert (llm.stop, llm.logit_bias) == (("there",), ((7, 1.0),))
    llm.stop = ["!"]
    assert llm.complete("x").text == "Hi there"


@both
def test_a_model_or_a_worker_must_be_given(component: type[WorkerComponent]) -> None:
    with pytest.raises(ConfigError, match="model"):
        component()


@both
def test_a_worker_brings_its_settings(component: type[WorkerComponent], worker: LlamaWorker) -> None:
    made = component(worker=worker)
    assert made.model == worker.config.model
    assert component(worker=worker, n_ctx=worker.config.n_ctx).n_ctx == worker.config.n_ctx
    for other in ({"n_ctx": 17}, {"queue_size": 1}):
        with pytest.raises(ConfigError, match="worker="):
            component(worker=worker, **other)


@both
def test_constructing_reads_no_file(component: type[WorkerComponent]) -> None:
    assert component(model="/no/such/model.gguf").model == "/no/such/model.gguf"


def test_a_missing_model_is_a_typed_error() -> None:
    llm = LlamaWorkerLLM(model="/no/such/model.gguf")
    with pytest.raises(ModelNotFoundError):
        _ = llm.metadata
    with pytest.raises(ModelNotFoundError):
        llm.chat(HELLO)


def test_the_frameworks_keywords_are_taken(worker: LlamaWorker) -> None:
    manager = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
    llm = LlamaWorkerLLM(worker=worker, callback_manager=manager, rate_limiter=None, system_prompt="Be brief.")
    assert llm.callback_manager is manager
    assert LlamaWorkerLLM(worker=worker, callback_manager=None).callback_manager.handlers == []


def test_settings_may_assign_to_it(llm: LlamaWorkerLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", None)
    monkeypatch.setattr(Settings, "_callback_manager", None)
    manager = CallbackManager([])
    Settings.llm = llm
    assert resolve_llm(llm, callback_manager=manager).callback_manager is manager


@both
def test_class_names_are_ours_alone(component: type[WorkerComponent]) -> None:
    assert "llamaworker" in component.class_name().lower().replace("_", "")


def test_metadata_is_the_limit_of_one_request() -> None:
    with fake_worker(n_ctx=1024, n_kv_cells=512) as worker:
        metadata = LlamaWorkerLLM(worker=worker, max_tokens=99).metadata
        assert (metadata.context_window, metadata.num_output) == (worker.n_ctx, 99) == (512, 99)
        assert LlamaWorkerLLM(worker=worker).metadata.num_output == -1


def test_metadata_follows_a_reload(worker: LlamaWorker) -> None:
    llm = LlamaWorkerLLM(worker=worker)
    worker.reload(model="fake://other", n_ctx=512)
    assert (llm.metadata.model_name, llm.metadata.context_window) == ("other", 512)


@pytest.fixture
def loading(smollm2_path: Path) -> Iterator[LlamaWorker]:
    """A worker that does not get past loading until the test is over."""
    done, load = threading.Event(), fake_loader()

    def slowly(config: ModelConfig) -> Any:
        done.wait(60)
        return load(config)

    worker = LlamaWorker.begin(ModelConfig(model=str(smollm2_path), n_ctx=2048, n_kv_cells=1024), loader=slowly)
    yield worker
    done.set()
    worker.close()


@pytest.mark.engine
def test_metadata_does_not_wait_for_loading(loading: LlamaWorker, smollm2_path: Path) -> None:
    metadata = LlamaWorkerLLM(worker=loading).metadata
    assert loading.status().state == "loading"
    assert (metadata.model_name, metadata.context_window) == (smollm2_path.stem, 1024)


@both
def test_a_dictionary_holds_every_setting_and_is_deterministic(
    component: type[WorkerComponent], worker: LlamaWorker
) -> None:
    """It is a key of the ingestion cache, and what an index is saved with."""
    made = component(worker=worker, timeout=5)
    data = made.to_dict()
    assert data == component(worker=worker, timeout=5).to_dict() == copy.deepcopy(made).to_dict()
    assert data["class_name"] == component.class_name()
    restored = component.from_dict(json.loads(json.dumps(data)))
    assert restored.to_dict() == data
    assert restored.worker is None


def test_unusual_settings_survive_json() -> None:
    llm = LlamaWorkerLLM(model="m.gguf", tensor_split=(0.5, 0.5), stop=["a"], logit_bias={3: -1.0}, mirostat=2)
    assert LlamaWorkerLLM.from_json(llm.to_json()).to_dict() == llm.to_dict()


@both
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: c.model_copy(deep=True)])
def test_copies_share_the_worker(component: type[WorkerComponent], copied: Any, worker: LlamaWorker) -> None:
    twin = copied(component(worker=worker))
    assert twin._connect() is worker


def test_a_copy_has_its_own_settings(llm: LlamaWorkerLLM) -> None:
    twin = copy.deepcopy(llm)
    twin.max_tokens = 2
    assert twin.complete("x").text == "Hi"
    assert llm.complete("x").text == "Hi there!"


@both
def test_a_pickle_carries_settings_and_no_worker(component: type[WorkerComponent]) -> None:
    """Another process opens the model at its first use, not while it unpickles."""
    made = component(model="/no/such/model.gguf", n_ctx=99, timeout=3)
    twin = pickle.loads(pickle.dumps(made))
    assert twin.to_dict() == made.to_dict()
    assert twin._handle is made._handle
    assert twin._handle.opened is None


def test_pickling_changes_nothing(worker: LlamaWorker) -> None:
    """The framework's own method would delete what does not pickle from the object itself."""
    llm = LlamaWorkerLLM(worker=worker, messages_to_prompt=lambda messages: "abc", max_tokens=2)
    pickle.dumps(llm)
    assert llm.worker is worker
    assert llm.chat(HELLO).raw["usage"]["prompt_tokens"] == len("abc") + 1


@both
def test_the_repr_shows_settings_and_no_texts(component: type[WorkerComponent]) -> None:
    texts: dict[str, Any] = {"chat_template": "secret {{ messages }}"}
    texts |= {"system_prompt": "secret"} if component is LlamaWorkerLLM else {"query_instruction": "secret"}
    shown = repr(component(model="m.gguf", n_ctx=99, **texts))
    assert "n_ctx=99" in shown
    assert "secret" not in shown
