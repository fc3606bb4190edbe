"""How a model is opened (ModelConfig) and how its worker behaves (WorkerConfig).

Both are frozen, hashable and validated once, here. Names and defaults follow llama.cpp unless said.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import UnionType
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from llama_worker._errors import ConfigError, FieldError, Hidden, RequestError

T = TypeVar("T")
KVType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl"]
Speculating: TypeAlias = Literal["auto", "off", "on"]
Pooling: TypeAlias = Literal["model", "mean", "cls", "last"]
NAME: Final = "name"
"""Annotates a text that names something, as programs do, or a path. Every other text may be a user's."""
_Path: TypeAlias = Annotated[str, Field(min_length=1), NAME]
LoraName: TypeAlias = Annotated[str, Field(min_length=1, max_length=128), NAME]


class Settings(BaseModel):
    """A frozen pydantic model whose validation errors are ours: they name the field and the value.

    Of a field that admits text, other than a word of a Literal and a NAME, they show no value but its type and size;
    so they do of whatever has parts in a request.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
    error_type: ClassVar[type[FieldError]] = ConfigError

    @model_validator(mode="wrap")
    @classmethod
    def _raise_typed(cls, value: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        if _is_within.get():  # the outermost one knows the whole path
            return handler(value)
        token = _is_within.set(True)
        try:
            return handler(value)
        except ValidationError as invalid:
            error = _typed(cls, invalid)
        finally:
            _is_within.reset(token)
        raise error


_is_within: Final[ContextVar[bool]] = ContextVar("_is_within", default=False)
"""Settings are being read in which others stand."""


def _typed(cls: type[Settings], invalid: ValidationError) -> FieldError:
    # What is missing comes last: it may have been given under an unknown name, and then that is what is wrong.
    errors = sorted(invalid.errors(include_url=False), key=lambda error: error["type"] == "missing")
    # Of several types that were tried for one value, the one that got furthest.
    tried = errors[0]["loc"][:-1] or errors[0]["loc"]
    first = max((error for error in errors if error["loc"][: len(tried)] == tried), key=lambda error: len(error["loc"]))
    inner, path, field = _place(cls, first["loc"])
    if first["type"] == "extra_forbidden":
        name, described = str(first["loc"][-1]), f"the fields are those of {inner.__name__}"
        return cls.error_type.unknown(".".join([*path, name]), first["input"], inner.model_fields, described=described)
    while path and path[-1].isdecimal():
        path.pop()
    value = first["input"]
    is_asked = issubclass(cls.error_type, RequestError)
    if field is None or holds_text(field) or (is_asked and not _is_single(value)):
        value = Hidden(value)
    return cls.error_type(".".join(path) or cls.__name__, value, reason_of(first))


def reason_of(error: Any) -> str:
    """What one of pydantic's errors says, without how pydantic begins what a validator of ours says."""
    return str(error["ctx"]["error"]) if error["type"] == "value_error" else str(error["msg"])


def _is_single(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def holds_text(field: FieldInfo) -> bool:
    """Whether what is given for `field` may be, or hold, a user's text, by its declared type."""
    return NAME not in field.metadata and _admits_text(field.annotation)


def _admits_text(kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return NAME not in parts[1:] and _admits_text(parts[0])
    if origin is Literal:
        return False
    if origin in (tuple, Union, UnionType):
        return any(map(_admits_text, parts))
    if isinstance(kind, type) and issubclass(kind, Settings):
        return any(map(holds_text, kind.model_fields.values()))
    return kind not in (bool, int, float, type(None), Ellipsis)


def _place(cls: type[Settings], loc: tuple[int | str, ...]) -> tuple[type[Settings], list[str], FieldInfo | None]:
    """The innermost Settings that an error is in, the fields and numbers that lead there, and the last of the fields.
    pydantic also names types that it has tried."""
    path: list[str] = []
    field = None
    for part in loc:
        if isinstance(part, int):
            path.append(str(part))
        elif part in cls.model_fields:
            path.append(part)
            field = cls.model_fields[part]
            cls = _settings_in(field.annotation) or cls
    return cls, path, field


def _settings_in(annotation: Any) -> type[Settings] | None:
    """The Settings that a field holds, if it does."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next(filter(None, map(_settings_in, get_args(annotation))), None)


class ModelConfig(Settings):
    """Which model, and with what context.

    docs/options.md has every field, and why one would change it. In short:

    `model`: a path to a GGUF file (text or a path object; kept as text), or `demo://smollm2-135m-instruct` /
    `demo://all-minilm-l6-v2`.
    `n_ctx`: tokens that one request may use, prompt and completion; 0 means the trained context.
    `n_parallel`: sequences decoded at once. `n_kv_cells`: tokens that all sequences share (default: n_ctx).
    `cache_ram`: MiB of RAM for saved states: of sequences that had to make room for others, and what models that
    cannot trim go back to. 0: none are saved.
    `cache_dir`: a folder that keeps such states beyond the process, for whoever opens the same model with the same
    settings (a path; kept as an absolute one); None: nothing leaves RAM. `cache_disk`: MiB that the folder may hold.
    `n_threads`: CPU threads (default: physical cores that this process may use).
    `n_gpu_layers`: layers to offload; negative means all. `rope_freq_*`: 0 means the model's own.
    `speculation`: whether tokens of a reply are guessed from what its text repeats, and several computed at once;
    never what is said, but for how kernels round. "auto" does it where it has been measured to pay, "on" wherever
    there is a guess, "off" never. `draft_model`: a second, small model of the same vocabulary that guesses, too: a path
    or name like `model`'s; it is opened with the same settings.
    `pooling`: how token embeddings become one vector; "model" means what the GGUF says, mean if silent.
    `lora_paths`: LoRA adapters to load with the model, name -> path of a GGUF file (a mapping or pairs; kept as pairs
    in the order of names). They change nothing until a request asks for them (`GenerationRequest.loras`).
    `chat_template`: Jinja text that replaces the model's own, or the path of a file with it.
    `fit`: what becomes of a model that does not fit into memory: "refuse" raises, "auto" makes its KV cache
    smaller, down to `n_ctx_min` tokens, then offloads fewer layers; a warning and `worker.config` tell.
    """

    model: Annotated[str, Field(min_length=1), NAME]
    n_ctx: Annotated[int, Field(ge=0, le=2**24)] = 4096
    n_parallel: Annotated[int, Field(ge=1, le=256)] = 4
    n_kv_cells: Annotated[int | None, Field(ge=1, le=2**26)] = None
    cache_ram: Annotated[int, Field(ge=0, le=2**24)] = 512
    cache_dir: Annotated[str | None, Field(min_length=1), NAME] = None
    cache_disk: Annotated[int, Field(ge=1, le=2**30)] = 4096
    n_batch: Annotated[int, Field(ge=32, le=2**16)] = 2048
    n_ubatch: Annotated[int, Field(ge=1, le=2**16)] = 512
    n_threads: Annotated[int | None, Field(ge=1, le=512)] = None
    n_threads_batch: Annotated[int | None, Field(ge=1, le=512)] = None
    n_gpu_layers: Annotated[int, Field(ge=-1, le=10_000)] = -1
    main_gpu: Annotated[int, Field(ge=0, le=255)] = 0
    split_mode: Literal["none", "layer", "row"] = "layer"
    # 16: how many devices llama.cpp is built for. Found out here, a reload keeps the model that it has.
    tensor_split: Annotated[
        tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None, Field(max_length=16)
    ] = None
    type_k: KVType = "f16"
    type_v: KVType = "f16"
    flash_attn: Literal["auto", "on", "off"] = "auto"
    load_mode: Literal["auto", "none", "mmap", "mlock", "mmap_mlock", "direct_io"] = "auto"
    swa_full: bool = True
    offload_kqv: bool = True
    rope_freq_base: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    rope_freq_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    speculation: Speculating = "off"
    draft_model: Annotated[str | None, Field(min_length=1), NAME] = None
    pooling: Pooling = "model"
    lora_paths: Annotated[tuple[tuple[LoraName, _Path], ...], Field(max_length=64)] = ()
    chat_template: str | None = None
    fit: Literal["refuse", "auto"] = "refuse"
    n_ctx_min: Annotated[int, Field(ge=1, le=2**24)] = 512

    def of_draft(self, n_ctx_train: int) -> ModelConfig | None:
        """How the draft model is opened: as this model, with nothing that is this one's own. None without one.

        `n_ctx_train`: the context that this model was trained for.
        """
        if self.draft_model is None:
            return None
        sizes = {"n_ctx": self.n_ctx or n_ctx_train}
        return self.model_copy(update={"model": self.draft_model, **sizes, **_NOT_THE_DRAFTS})

    @field_validator("model", "draft_model", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return os.fspath(value) if _is_path(value) else value

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _wherever_this_process_goes(cls, value: Any) -> Any:
        return os.path.abspath(os.path.expanduser(os.fspath(value))) if _is_path(value) else value

    @field_validator("lora_paths", mode="before")
    @classmethod
    def _lora_pairs(cls, value: Any) -> Any:
        return () if value is None else named_pairs(value, os.fspath)

    @field_validator("lora_paths")
    @classmethod
    def _distinct_loras(cls, value: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        return distinct(value)


# A window that drops cells could not take wrong guesses back, and its states are kept nowhere.
_NOT_THE_DRAFTS: Final[Mapping[str, Any]] = {
    name: ModelConfig.model_fields[name].default
    for name in (
        "cache_dir",
        "chat_template",
        "draft_model",
        "fit",
        "lora_paths",
        "rope_freq_base",
        "rope_freq_scale",
        "speculation",
        "swa_full",
    )
} | {"cache_ram": 0}


def as_model_config(given: object) -> ModelConfig:
    """`given`; of a path or a name alone, the configuration that says no more. Raises ConfigError for anything else."""
    if isinstance(given, ModelConfig):
        return given
    if isinstance(given, str | os.PathLike):
        return ModelConfig(model=os.fspath(given))
    raise ConfigError("config", type(given).__name__, "give a ModelConfig, or the path or name of a model")


def _is_path(value: Any) -> bool:
    """Of text, and not empty."""
    return isinstance(value, str | os.PathLike) and isinstance(name := os.fspath(value), str) and bool(name)


def named_pairs(value: Any, read: Callable[[Any], Any]) -> Any:
    """A mapping, or pairs, as a tuple of pairs whose second halves were `read`; anything else as it is."""
    items = value.items() if isinstance(value, Mapping) else value
    if isinstance(items, str) or not isinstance(items, Iterable):
        return value
    try:
        return tuple([_read_pair(item, read) for item in items])
    except TypeError as wrong:
        raise ValueError(f"give name -> value, as a mapping or as pairs ({wrong})") from None


def _read_pair(item: Any, read: Callable[[Any], Any]) -> Any:
    return (item[0], read(item[1])) if isinstance(item, list | tuple) and len(item) == 2 else item


def distinct(pairs: tuple[tuple[str, T], ...]) -> tuple[tuple[str, T], ...]:
    """`pairs` in the order of their names, each of which is there once."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice; names must be unique")
    return tuple(sorted(pairs))


class WorkerConfig(Settings):
    """How the worker treats its callers.

    `queue_size`: requests that may wait in the channel. `on_full`: "wait" blocks the caller (or awaits)
    until there is room, "reject" raises QueueFull at once. `step_budget_ms`: how long one step may take
    while somebody is decoding; longer prompts are prefilled in chunks of about this time. `stall_timeout`:
    seconds after which a stream whose reader takes nothing, although events wait, ends with StreamStalled and
    frees its slot. None: never, a slow reader is no error. `keep_alive`:
    seconds after which a model that nobody uses is unloaded; the next request loads it again. None: never.

    `step_timeout`: seconds after which one step, a decode or a batch of embeddings, is taken for hanging; choose
    many times what your longest step takes. It is aborted, and its requests fail with GenerationError. If it does
    not end within as long again the worker is dead: everyone is answered with WorkerDied and the thread is given
    up, with the model's memory. None: never.

    `contain_crashes`: when llama.cpp aborts (a failed GGML_ASSERT, an uncaught C++ exception) on the worker's
    threads, the process lives on. The thread is parked for ever, the memory of its model is lost, and everyone is
    answered with WorkerDied; a new worker can be opened. This concerns the whole process: it replaces ggml's
    abort callback and the C++ terminate handler. Segmentation faults are not contained.
    """

    queue_size: Annotated[int, Field(ge=1, le=100_000)] = 8
    stall_timeout: Annotated[float | None, Field(gt=0, le=1e9, allow_inf_nan=False)] = None
    keep_alive: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    on_full: Literal["wait", "reject"] = "wait"
    step_budget_ms: Annotated[float, Field(ge=1, le=60_000, allow_inf_nan=False)] = 100.0
    step_timeout: Annotated[float | None, Field(gt=0, le=86_400, allow_inf_nan=False)] = None
    contain_crashes: bool = False


def as_worker_config(given: object) -> WorkerConfig:
    """`given`, or the default for None. Raises ConfigError for anything else."""
    if given is None:
        return WorkerConfig()
    if isinstance(given, WorkerConfig):
        return given
    raise ConfigError("worker_config", type(given).__name__, "give a WorkerConfig, or None for the default")
