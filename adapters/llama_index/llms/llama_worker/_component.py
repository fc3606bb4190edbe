"""WorkerComponent: what the LLM and the embedding have in common, their settings and their way to a worker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Self, TypeVar

from llama_index.core.schema import BaseComponent
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from llama_worker import (
    ConfigError,
    LlamaWorker,
    ModelConfig,
    ModelInfo,
    WorkerConfig,
    WorkerHandle,
    get_handle,
    inspect_model,
)

C = TypeVar("C", ModelConfig, WorkerConfig)
_TEXTS = ("chat_template", "system_prompt", "stop")  # no text of a prompt belongs into a log


class WorkerComponent(BaseComponent, ModelConfig, WorkerConfig):
    """A LlamaIndex component on a worker. Its fields are those of ModelConfig and WorkerConfig, by inheritance.

    Give `model` and what else of them is needed: all components of a process with equal settings share
    one worker, which is opened by the first use and not by the constructor, and ends when the last of them
    is gone. Or give `worker`, which is used as it is. An unknown or impossible keyword raises ConfigError.

    `timeout` is in seconds for each request and includes the time in the queue.
    Any number of threads and event loops may use one component at once. Copies, and what is loaded from
    `to_dict` or a pickle, use the same worker; in another process they open one at their first use.
    """

    model_config = ConfigDict(
        # Frameworks assign to components and save them as JSON, which knows no tuples.
        frozen=False,
        strict=False,
        extra="forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )

    model: Annotated[str, Field(min_length=1)] = ""
    worker: LlamaWorker | None = Field(default=None, exclude=True, repr=False)
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    # Our share in the worker. Fields may be assigned to, so which one it is, is asked at each call.
    _handle: WorkerHandle | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _take_settings_of_worker(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        worker = given.get("worker")
        if isinstance(worker, LlamaWorker):
            served = {name: getattr(worker.config, name) for name in ModelConfig.model_fields}
            for name in given.keys() & {*ModelConfig.model_fields, *WorkerConfig.model_fields}:
                if name not in served or given[name] != served[name]:
                    raise ConfigError(name, given[name], "worker= is given and brings its own; leave one of them out")
            return {**served, **given}
        if not given.get("model"):
            raise ConfigError("model", given.get("model"), "name a GGUF file or a demo:// model, or give worker=")
        return given

    @model_validator(mode="after")
    def _take_handle(self) -> Self:
        if self.worker is None:
            self._share()
        return self

    def _connect(self) -> LlamaWorker:
        """The worker to ask now. Returns at once; a fresh one loads in the background."""
        if self.worker is not None:
            return self.worker
        return self._share().worker()

    def _share(self) -> WorkerHandle:
        self._handle = handle = get_handle(_part(self, ModelConfig), _part(self, WorkerConfig))
        return handle

    def _served(self) -> tuple[ModelInfo, int]:
        """The model and the tokens that one request may use. Before it is loaded, what the header says."""
        if self.worker is not None and self.worker.is_closed:
            return self.worker.info, self.worker.n_ctx  # which says so
        opened = None if self._handle is None else self._handle.opened
        worker = self.worker or opened
        if worker is not None and worker.status().state in ("ready", "draining"):
            return worker.info, worker.n_ctx
        info = inspect_model(self.model)
        n_ctx = self.n_ctx or info.n_ctx_train
        return info, min(n_ctx, self.n_kv_cells or n_ctx)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value != field.default and field.repr and not (field.exclude or name in _TEXTS):
                yield name, value

    def __getstate__(self) -> dict[str, Any]:
        # LlamaIndex's own method deletes what cannot be pickled from the very object that is pickled.
        twin = self.model_copy()
        state = super(WorkerComponent, twin).__getstate__()
        if self.worker is not None:  # it brings its settings, and may have been reloaded since
            brought = {*ModelConfig.model_fields, *WorkerConfig.model_fields}
            state["__dict__"] = {name: value for name, value in state["__dict__"].items() if name not in brought}
        return state


def _part(component: WorkerComponent, settings: type[C]) -> C:
    return settings(**{name: getattr(component, name) for name in settings.model_fields})
