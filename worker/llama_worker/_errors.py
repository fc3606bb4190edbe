"""What can go wrong, arranged by who must act.

LlamaWorkerError
├── ConfigError                 mend the configuration; nothing was started
├── EngineVersionError          install a llama-cpp-python that this package knows
├── ModelLoadError              the model could not be loaded; says whether another still serves
│   ├── ModelNotFoundError      there is no such file or package
│   ├── InsufficientMemoryError it would not fit; carries the arithmetic
│   └── LoraLoadError           an adapter is damaged, or not one for this model
├── RequestError                mend the request; the same request fails again
│   ├── InvalidRequestError     a field has a value that cannot work
│   ├── ContextOverflowError    the tokens do not fit into n_ctx
│   ├── TemplateError           the chat template refused the messages
│   ├── ManifestMismatchError   what a session computed is of no use now; ensure its prefix again
│   └── UnsupportedFeatureError the loaded model cannot do this
├── QueueFull                   try later
├── DeadlineExceeded            it took longer than the caller allowed
├── StreamStalled               the reader stopped reading; `stall_timeout` freed its slot
├── GenerationCancelled         the caller cancelled; raised by the non-streaming calls only
├── GenerationError             the engine failed this request; the worker serves on
│   ├── InvalidOutputError      the reply is complete and not what it had to be; carries it
│   └── StateError              a saved state is damaged, another model's, or could not be made
├── SessionClosedError          the session was closed; open another
│   └── SessionFatalError       it broke, and stays so; `__cause__` is what broke it first
└── WorkerClosed                the worker was closed; open another
    └── WorkerDied              it broke; `__cause__` is the original exception

Messages name the field, the value and the way out. They never carry prompt or reply text, only lengths: the value of
a field whose type admits text is shown as its type and size (`Settings`, `Hidden`).
"""

from __future__ import annotations

from collections.abc import Collection, Container
from typing import TYPE_CHECKING, Any, Self, TypeVar

from llama_worker._keywords import unknown_keyword

if TYPE_CHECKING:
    from llama_worker._events import Reply


E = TypeVar("E", bound=Exception)


class LlamaWorkerError(Exception):
    """The base of every error that this package raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors with keyword-only fields would not survive pickling by their args alone.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[E], args: tuple[Any, ...], state: dict[str, Any]) -> E:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def copy_of(error: E) -> E:
    """The same error as another object: each waiter raises its own, for frameworks write into them."""
    twin = _rebuild(type(error), error.args, error.__dict__)
    twin.__cause__ = error.__cause__
    return twin


def shown(value: object, limit: int = 60) -> str:
    """`value` as an error may show it: short, and for long text only its length."""
    text = repr(value)
    return text if len(text) <= limit else f"<{type(value).__name__}, {len(text)} characters>"


class Hidden:
    """What an error shows instead of a value that may be, or hold, a user's text: its type and its size."""

    def __init__(self, value: object) -> None:
        self._shown = f"<{type(value).__name__}{_size(value)}>"

    def __repr__(self) -> str:
        return self._shown


def _size(value: object) -> str:
    if isinstance(value, str):
        return f", {len(value)} characters"
    return f" of {len(value)}" if isinstance(value, list | tuple | dict | set | frozenset | bytes) else ""


class FieldError(LlamaWorkerError):
    """`field` holds `value`, which cannot work because of `reason`.

    The text shows `value`: whoever raises it for what may be a user's text gives it Hidden.
    """

    def __init__(self, field: str, value: object, reason: str) -> None:
        super().__init__(f"{field}={shown(value)}: {reason}")
        self.field = field
        self.reason = reason

    @classmethod
    def unknown(
        cls, name: str, value: object, known: Collection[str], *, described: str, of_model: Container[str] = ()
    ) -> Self:
        """There is no field `name`, the last of a path: which of `known` was meant, or what there is.

        `value` is shown if it is a number only: under an unknown name there can be anything. `of_model` are names of
        a model's fields, which are no call's.
        """
        shown = value if value is None or isinstance(value, int | float) else Hidden(value)
        return cls(name, shown, unknown_keyword(name.rpartition(".")[2], known, described=described, of_model=of_model))

    def within(self, place: str) -> Self:
        """The same error of something that stands at `place`; one that says so already does not change."""
        if self.field.partition(".")[0] == place.partition(".")[0]:
            return self
        placed = copy_of(self)
        placed.field = f"{place}.{self.field}"
        placed.args = (f"{place}.{self}",)
        return placed


class ConfigError(FieldError):
    """A configuration field has a value that cannot work. Raised before any thread starts."""


class EngineVersionError(LlamaWorkerError):
    """The installed llama-cpp-python differs from what this package was verified against."""


class ModelLoadError(LlamaWorkerError):
    """A model could not be loaded.

    `previous_restored` is True when a failed reload put the former model back into service. `crashed`: native
    code crashed while it loaded (`WorkerConfig.contain_crashes`); the memory that it had is lost.
    """

    def __init__(self, message: str, *, previous_restored: bool = False, crashed: bool = False) -> None:
        super().__init__(message)
        self.previous_restored = previous_restored
        self.crashed = crashed


class ModelNotFoundError(ModelLoadError):
    """The model names a file, or a bundled package, that is not there."""


class InsufficientMemoryError(ModelLoadError):
    """Weights, KV cache and buffers would need more memory than is free. Sizes are in bytes."""

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class LoraLoadError(ModelLoadError):
    """The LoRA adapter in the file `name` could not be loaded, because of `reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"the LoRA adapter {name} cannot be used: {reason}")
        self.name = name
        self.reason = reason


class RequestError(LlamaWorkerError):
    """The request cannot be served as it is; sending it again fails again."""


class InvalidRequestError(FieldError, RequestError):
    """A field of the request has a value that cannot work."""


_OVERFLOW_WAY_OUT = "shorten the input, lower max_tokens or open the model with a larger n_ctx"
_OVERFLOW_WAYS_OUT = {"embed": "split the text into smaller chunks, or cut it with overlong='truncate'"}


class ContextOverflowError(RequestError):
    """The request needs more tokens than the context offers.

    `stage` is "prompt" (the prompt alone does not fit), "max_tokens" (prompt and the requested
    completion together do not), "decode" (the cells of all slots are full although one reply alone runs), "embed" (one
    text is longer than the model reads) or "import" (a session's state).
    `resident` tokens are there already, `additional` were asked for, `n_ctx` is the limit.
    """

    def __init__(self, *, stage: str, resident: int, additional: int, n_ctx: int) -> None:
        way_out = _OVERFLOW_WAYS_OUT.get(stage, _OVERFLOW_WAY_OUT)
        super().__init__(f"{stage}: {resident} + {additional} tokens exceed the limit of {n_ctx}; {way_out}")
        self.stage = stage
        self.resident = resident
        self.additional = additional
        self.n_ctx = n_ctx


class TemplateError(RequestError):
    """The model's chat template could not render the messages."""


class ManifestMismatchError(RequestError):
    """What a session, or an exported state, was computed with is not what there is now. `reason` says what differs.

    Nothing was changed. A session goes on when `ensure_prefix` has been called again.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"what was computed is of no use now: {reason}; call ensure_prefix again")
        self.reason = reason


class UnsupportedFeatureError(RequestError):
    """The loaded model, or this version of the package, does not offer `feature`."""

    def __init__(self, feature: str, hint: str) -> None:
        super().__init__(f"{feature} is not supported: {hint}")
        self.feature = feature


class QueueFull(LlamaWorkerError):
    """The command channel is full and `on_full="reject"`. `capacity` requests wait already."""

    def __init__(self, capacity: int) -> None:
        super().__init__(f"{capacity} requests wait already; try again later or use on_full='wait'")
        self.capacity = capacity


class DeadlineExceeded(LlamaWorkerError):
    """The request took longer than its `timeout` in seconds, time in the queue included.

    `timeout` is None when the deadline was that of a cancel_scope.
    """

    def __init__(self, timeout: float | None) -> None:
        limit = "the deadline of its cancel_scope" if timeout is None else f"timeout={timeout:g} s"
        super().__init__(f"not finished within {limit}; allow more time or ask for fewer tokens")
        self.timeout = timeout


class StreamStalled(LlamaWorkerError):
    """The stream's reader took nothing for `stall_timeout` seconds although events waited; what came so far is kept."""

    def __init__(self, stall_timeout: float) -> None:
        super().__init__(
            f"nothing was read for stall_timeout={stall_timeout:g} s; read the stream on, close it, or allow more"
        )
        self.stall_timeout = stall_timeout


class GenerationCancelled(LlamaWorkerError):
    """The request was cancelled. `partial` is the reply as far as it had come; None if nothing had begun."""

    def __init__(self, partial: Reply | None = None) -> None:
        super().__init__(f"cancelled after {partial.usage.completion_tokens if partial else 0} tokens")
        self.partial = partial


class GenerationError(LlamaWorkerError):
    """The engine failed this request. The worker serves others on."""


class InvalidOutputError(GenerationError):
    """The reply ended and is not valid by `response_format`, in a way that could not be enforced while it was sampled.

    `reason` says what is wrong, without its text; `reply` is what there is. Another try may succeed.
    """

    def __init__(self, reason: str, reply: Reply | None = None) -> None:
        super().__init__(f"the reply is not what response_format asks for: {reason}; try again, or loosen the schema")
        self.reason = reason
        self.reply = reply


class StateError(GenerationError):
    """A sequence could not be saved or restored, or what is to be restored is damaged or another model's."""


def took_too_long(limit: float) -> GenerationError:
    return GenerationError(f"a step took longer than step_timeout={limit:g} s; allow more, or lower n_batch")


class SessionClosedError(LlamaWorkerError):
    """The session was closed. Its worker serves on."""

    def __init__(self, message: str = "the session is closed; open another with worker.session()") -> None:
        super().__init__(message)


class SessionFatalError(SessionClosedError):
    """The session broke: what it holds cannot be trusted any more. `__cause__` is the first thing that went wrong."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"the session was broken by {type(cause).__name__}; open another with worker.session()")
        self.__cause__ = cause


class WorkerClosed(LlamaWorkerError):
    """The worker is closed, or was closed before it could answer."""

    def __init__(self, message: str = "the worker is closed; open a new LlamaWorker") -> None:
        super().__init__(message)


class WorkerDied(WorkerClosed):
    """The worker thread ended by an exception, which is this error's `__cause__`, or it was given up.

    It is given up, and there is no `__cause__`, when llama.cpp crashed (`contain_crashes`) or hung (`step_timeout`).

    `retry_after`: seconds until get_worker starts another one; None when it does so at once.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
