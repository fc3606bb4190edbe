"""The constructor's keywords, declared once and shared by the three classes.

Every field of ModelConfig, WorkerConfig and SamplingParams is here under its own name, and None always
means "the default of llama_worker". What a value may be is decided there too: here it is only passed on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SecretStr,
    ValidationError,
    model_validator,
)

from langchain_llama_worker._retry import RetryPolicy
from llama_worker import (
    ConfigError,
    LlamaWorker,
    ModelConfig,
    SamplingParams,
    WorkerConfig,
    WorkerHandle,
    get_handle,
)

PROVIDER = "llama_worker"
"""The name of this provider in traces and in `response_metadata["model_provider"]`."""

_log = logging.getLogger(__name__)


@cache
def log_inert(keyword: str) -> None:
    """Say once in a process that `keyword` is accepted for compatibility and does nothing."""
    _log.info("%s has no effect here and is ignored", keyword)


class ModelFields(BaseModel):
    """Which model, in which worker, and how the caller waits for it.

    Give `model` (a GGUF path or demo://…; `model_path` is the same) and what else of ModelConfig and
    WorkerConfig is needed: all objects of a process with equal settings share one worker, which is
    opened at the first use and ends when the last of them is gone. Or give `worker`, which is then used
    as it is.

    `timeout` is in seconds and includes the time in the queue. `priority` (-3 to 3) goes before lower ones, which get
    their turns too. `max_retries`: further attempts when the
    queue is full (on_full="reject") or the worker died and is started anew.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: str | None = Field(default=None, validation_alias=AliasChoices("model", "model_path"))
    worker: LlamaWorker | None = Field(default=None, exclude=True)
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    priority: int = Field(default=0, ge=-3, le=3)
    max_retries: int = Field(default=2, ge=0)
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)

    n_ctx: int | None = None
    n_parallel: int | None = None
    n_kv_cells: int | None = None
    cache_ram: int | None = None
    cache_dir: str | None = None
    cache_disk: int | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int | None = None
    main_gpu: int | None = None
    split_mode: str | None = None
    tensor_split: tuple[float, ...] | None = None
    type_k: str | None = None
    type_v: str | None = None
    flash_attn: str | None = None
    load_mode: str | None = None
    swa_full: bool | None = None
    offload_kqv: bool | None = None
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    speculation: str | None = None
    draft_model: str | None = None
    pooling: str | None = None
    lora_paths: dict[str, str] | tuple[tuple[str, str], ...] | None = None
    chat_template: str | None = None
    fit: str | None = None
    n_ctx_min: int | None = None

    queue_size: int | None = None
    on_full: str | None = None
    step_budget_ms: float | None = None
    keep_alive: float | None = None
    contain_crashes: bool | None = None
    step_timeout: float | None = None
    stall_timeout: float | None = None

    # By the name of the model: our own from the beginning, so that what is configured anew for each call
    # shares its worker, and those that calls have named. Replaced, never changed: copies have it too.
    _handles: dict[str, WorkerHandle] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _raise_config_error(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as invalid:
            error = _typed(cls, invalid)
        raise error

    @model_validator(mode="after")
    def _check_model_fields(self) -> Self:
        if self.api_key is not None:
            log_inert("api_key")
        if self.worker is not None:
            self._check_worker_alone(self.worker)
        elif self.model is None:
            raise ConfigError("model", None, "name a GGUF file or a demo:// model, or give worker=")
        else:
            self._handle()
        self._worker_settings()
        return self

    def _check_worker_alone(self, worker: LlamaWorker) -> None:
        model = ModelConfig(**{"model": worker.config.model, **_given(self, ModelConfig)})
        given = {**model.model_dump(exclude_unset=True), **_given(self, WorkerConfig)}
        for name, value in given.items():
            if getattr(worker.config, name, None) != value:
                raise ConfigError(name, value, "worker= is given and was opened otherwise; leave one of them out")

    @property
    def _model_name(self) -> str:
        return self.worker.config.model if self.worker is not None else str(self.model)

    def _settings(self, model: str | None = None) -> ModelConfig:
        base = self.worker.config.model_dump() if self.worker is not None else _given(self, ModelConfig)
        return ModelConfig(**(base if model is None else {**base, "model": model}))

    def _worker_settings(self) -> WorkerConfig:
        return WorkerConfig(**_given(self, WorkerConfig))

    def _connect(self, model: str | None = None) -> LlamaWorker:
        """The worker of `model`, by default our own. Returns at once; loading goes on behind it.

        The handle is asked each time: it keeps the worker open, and replaces one that has ended.
        """
        if self.worker is not None and model in (None, self._model_name):
            return self.worker
        return self._handle(model).worker()

    def _handle(self, model: str | None = None) -> WorkerHandle:
        handle = get_handle(self._settings(model), self._worker_settings())
        name = model or self._model_name
        if self._handles.get(name) is not handle:
            self._handles = {**self._handles, name: handle}
        return handle

    def _served(self, model: str | None) -> str:
        """The name of the model that `_connect(model)` serves, as far as is known without opening it."""
        own = self.worker is not None and model in (None, self._model_name)
        worker = self.worker if own else self._handle(model).opened
        return self._settings(model).model if worker is None else worker.config.model

    @property
    def _retry(self) -> RetryPolicy:
        return RetryPolicy(self.max_retries, restarts=self.worker is None)

    def __repr_args__(self) -> Any:
        return [(name, value) for name, value in _set_fields(self) if name != "chat_template"]


class SamplingFields(BaseModel):
    """How to generate, unless a call says otherwise; each is a keyword of every call too.

    `max_tokens` None means as many as fit. `temperature` 0 is greedy. `stop` (or `stop_sequences`) adds
    to what a call gives. `logprobs`: how many alternatives to report beside each token.
    """

    temperature: float | None = None
    max_tokens: int | None = None
    stop: list[str] | str | None = Field(default=None, validation_alias=AliasChoices("stop", "stop_sequences"))
    seed: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: list[str] | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    logit_bias: dict[int, float] | tuple[tuple[int, float], ...] | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None

    @model_validator(mode="after")
    def _check_sampling_fields(self) -> Self:
        self._sampling()
        return self

    def _sampling(self, stop: list[str] | None = None, changes: Mapping[str, Any] | None = None) -> SamplingParams:
        """What a call samples with: `changes` replace our fields, `stop` adds to them."""
        fields = {**_given(self, SamplingParams), **(changes or {}), "stop": merged_stops(self.stop, stop)}
        return SamplingParams(**{name: value for name, value in fields.items() if value is not None})


def merged_stops(*stops: list[str] | str | None) -> list[str]:
    """All of them, each once, in order."""
    return list(dict.fromkeys(text for stop in stops for text in _strings(stop)))


def _strings(stop: list[str] | str | None) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop or ())


def _given(fields: BaseModel, settings: type[BaseModel]) -> dict[str, Any]:
    return {name: value for name in settings.model_fields if (value := getattr(fields, name)) is not None}


def _set_fields(fields: ModelFields) -> list[tuple[str, Any]]:
    names = (*ModelFields.model_fields, *SamplingFields.model_fields)
    shown = (n for n in names if n in type(fields).model_fields and type(fields).model_fields[n].repr)
    return [(n, v) for n in shown if (v := getattr(fields, n)) != type(fields).model_fields[n].default]


_SETTINGS = {**ModelConfig.model_fields, **WorkerConfig.model_fields, **SamplingParams.model_fields}


def _showable(field: str, value: object) -> object:
    """`value`, or its type where it may hold what a user said. A str that is wrong for a setting is not text at all."""
    if value is None or isinstance(value, int | float) or (isinstance(value, str) and field in _SETTINGS):
        return value
    return type(value).__name__


def _typed(cls: type[BaseModel], invalid: ValidationError) -> ConfigError:
    first = invalid.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else cls.__name__
    if first["type"] != "extra_forbidden":
        return ConfigError(field, _showable(field, first["input"]), first["msg"].removeprefix("Value error, "))
    described = "the keywords are those of ModelConfig, WorkerConfig, SamplingParams"
    return ConfigError.unknown(field, first["input"], cls.model_fields, described=described)
