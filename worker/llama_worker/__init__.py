"""Local GGUF models inside Python agents: one worker thread owns llama.cpp, everything else asks it.

The house, from the outside in:

    _worker        LlamaWorker, from its start to its end. What it can be asked: _worker_requests (generate, stream,
                   embed), _worker_reports (status, metrics), _worker_changes (reload, adapters), and their a-twins
    _registry      one live worker for each configuration; _handle is an adapter's share in it
    _batch         many prompts in one call; _state a worker as JSON
    _session       explicit control of what is computed once; _manifest says what that is, _session_jobs asks for it
    _view          ModelView: what callers prepare requests with (template, vocabulary, limits)
    _channel       the bounded way to the worker thread; _commands is what travels on it, _fairness whose turn it is
    _loop          the worker thread; with _decoding, _kv_ops, _embedding, _reloading and _lora_changes it alone
                   calls an engine
    _service       what that thread works with
    _meter         counts what that thread does; _metrics, _health and _diagnostics say it to others
    _telemetry     says it to OpenTelemetry, _exporter to other processes: _top shows it there
    _scheduler     who is served next; _generation, _prefix_cache, _pace and _foresight are what it decides with
    _prefix_cache  lends each prompt a _slot (a _loan): _start says what to begin with, _eviction who makes room, _reach
                   how far back one can go; _books and _cells say who holds what, _seq_ops what the engine has to do
    _checkpoints   what models that cannot trim go back to; _boundaries of prompts are where they are taken
    _ram_tier      what was evicted, each an _entry of bytes, kept where that pays, says _thrift; _disk_tier beneath it,
                   over _disk and _disk_store; _disk_line: what waits to be written, _superseding: what is needless then
    _saved_prefix  such bytes as they leave the process; _transfers and _cache_transfer take them out and in
    _loras         adapters by name; _identity is what KV depends on because of them, _turns whose batch is next
    _speculation   which tokens are guessed and decoded along, by an index of the text in _ngrams, or by a _draft model
    _reply         token -> text -> events, which wait in _mailboxes; _streams is where the caller reads them, and
                   _loop_door how the worker reaches an event loop
    _chat/         templates, ChatFormat (what one writes) and the parser that reads it back
    _constraint/   tools and schemas as a grammar, and the tokens that it allows next
    _memory        what a model takes of the machine; _fitting makes it fit, by what _free_memory finds
    _engine/       llama.cpp, behind the protocol in _engine/base
    testing        an engine without a model, for your tests and ours
"""

from llama_worker._cancel import CancelScope, cancel_scope
from llama_worker._config import ModelConfig, WorkerConfig
from llama_worker._engine.base import LoraInfo, ModelInfo
from llama_worker._errors import (
    ConfigError,
    ContextOverflowError,
    DeadlineExceeded,
    EngineVersionError,
    GenerationCancelled,
    GenerationError,
    InsufficientMemoryError,
    InvalidOutputError,
    InvalidRequestError,
    LlamaWorkerError,
    LoraLoadError,
    ManifestMismatchError,
    ModelLoadError,
    ModelNotFoundError,
    QueueFull,
    RequestError,
    SessionClosedError,
    SessionFatalError,
    StateError,
    StreamStalled,
    TemplateError,
    UnsupportedFeatureError,
    WorkerClosed,
    WorkerDied,
)
from llama_worker._events import (
    Failed,
    Finished,
    FinishReason,
    InvalidToolCall,
    ReasoningDelta,
    Reply,
    StreamEvent,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
    Usage,
)
from llama_worker._handle import WorkerHandle
from llama_worker._health import Health
from llama_worker._lora_metrics import LoraMetrics
from llama_worker._manifest import Manifest, RuntimeIdentity, Segment
from llama_worker._memory import MemoryPlan, plan_memory
from llama_worker._metrics import CacheMetrics, Distribution, Metrics
from llama_worker._models import inspect_model
from llama_worker._registry import close_all, get_handle, get_worker
from llama_worker._requests import (
    EmbedRequest,
    GenerationRequest,
    Message,
    ResponseFormat,
    SamplingParams,
    ToolCall,
    ToolChoice,
    ToolName,
    ToolSpec,
)
from llama_worker._session import Session
from llama_worker._session_report import ContextReport, PrefixStatus, SuffixStatus
from llama_worker._status import Status
from llama_worker._streams import AsyncEventStream, EventStream
from llama_worker._thinking import can_think
from llama_worker._version import __version__
from llama_worker._worker import LlamaWorker

__all__ = [
    "AsyncEventStream",
    "CacheMetrics",
    "CancelScope",
    "ConfigError",
    "ContextOverflowError",
    "ContextReport",
    "DeadlineExceeded",
    "Distribution",
    "EmbedRequest",
    "EngineVersionError",
    "EventStream",
    "Failed",
    "FinishReason",
    "Finished",
    "GenerationCancelled",
    "GenerationError",
    "GenerationRequest",
    "Health",
    "InsufficientMemoryError",
    "InvalidOutputError",
    "InvalidRequestError",
    "InvalidToolCall",
    "LlamaWorker",
    "LlamaWorkerError",
    "LoraInfo",
    "LoraLoadError",
    "LoraMetrics",
    "Manifest",
    "ManifestMismatchError",
    "MemoryPlan",
    "Message",
    "Metrics",
    "ModelConfig",
    "ModelInfo",
    "ModelLoadError",
    "ModelNotFoundError",
    "PrefixStatus",
    "QueueFull",
    "ReasoningDelta",
    "Reply",
    "RequestError",
    "ResponseFormat",
    "RuntimeIdentity",
    "SamplingParams",
    "Segment",
    "Session",
    "SessionClosedError",
    "SessionFatalError",
    "StateError",
    "Status",
    "StreamEvent",
    "StreamStalled",
    "SuffixStatus",
    "TemplateError",
    "TextDelta",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallEnded",
    "ToolCallStarted",
    "ToolChoice",
    "ToolName",
    "ToolSpec",
    "UnsupportedFeatureError",
    "Usage",
    "WorkerClosed",
    "WorkerConfig",
    "WorkerDied",
    "WorkerHandle",
    "__version__",
    "can_think",
    "cancel_scope",
    "close_all",
    "get_handle",
    "get_worker",
    "inspect_model",
    "plan_memory",
]
