"""What the worker's loop needs of an engine, and what it may know of a model.

An Engine is one loaded model and its contexts. Every method of an Engine and of its Samplers must be
called by the thread that owns it: the one that loaded it, until another adopts it. Only
`AbortFlag.raise_` may be called from anywhere. A Vocabulary is a handle of its own that any thread may
use and that outlives the weights.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llama_worker._config import ModelConfig
from llama_worker._errors import GenerationError
from llama_worker._errors import StateError as StateError
from llama_worker._identity import KVIdentity
from llama_worker._requests import SamplingParams

TokenIds: TypeAlias = NDArray[np.int32]
Floats: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.uint8]
"""One bit for each token, set where it is allowed: bit i of byte j is token 8j+i; (n_vocab + 7) // 8 bytes."""
MOST_DRAFTS: Final = 15
"""Tokens in one decode that are only guessed; with the row in front of them 16, which suits every kernel."""
MOST_SEQUENCES: Final = 256
"""LLAMA_MAX_SEQ: a context has no more."""
SavedState: TypeAlias = NDArray[np.uint8]
"""A sequence as bytes, sealed (see `_engine/state.py`) and not to be written to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a GGUF header says of a model; read in milliseconds, without loading tensors.

    `name` is the file's stem, never a path. `size` is in bytes. `digest` identifies the file's content
    (header, tensor layout, size). `n_ctx_train` and the sizes below are 0 where the header is silent.
    """

    name: str
    path: str
    architecture: str
    size: int
    n_params: int
    n_vocab: int
    n_ctx_train: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    chat_template: str | None
    pooling: str | None
    is_recurrent: bool
    is_hybrid: bool
    n_swa: int
    is_embedding: bool
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraInfo:
    """What the GGUF file of a LoRA adapter says. `digest` identifies its whole content; `size` is in bytes.

    `alpha` scales it together with `rank`, the largest that a matrix of it has; 0 means that the scale counts alone.
    """

    path: str
    digest: str
    size: int
    rank: int
    alpha: float


class DecodeStatus(enum.IntEnum):
    """The return code of llama_decode."""

    OK = 0
    KV_FULL = 1
    ABORTED = 2
    INVALID = -1
    ALLOC_FAILED = -2
    COMPUTE_FAILED = -3


class Span(NamedTuple):
    """Consecutive rows of one sequence: `tokens` at positions `start`, `start`+1, …

    The logits of the last `output` rows are computed: True is the last row's.
    """

    seq: int
    start: int
    tokens: TokenIds
    output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What the loaded context offers, read back from it after creation.

    `n_ctx` cells in all, `n_batch` rows a call, `n_seq` sequences (seq ids 0 … n_seq-1), `n_outputs` rows of logits
    a call: one for each sequence, and those of drafts.
    `can_trim`: a sequence's tail can be removed (not so for recurrent and hybrid models).
    `can_share`: `seq_share` of a prefix works and costs no memory.
    `generates` / `embeds`: which of the two kinds of request the model can serve.
    `n_embed_tokens` and `n_embed_seq`: most tokens and texts in one `embed` call;
    `n_embed_text`: most tokens of one text (the trained context of models with absolute positions).

    `can_save`: `seq_save` and `seq_restore` work. `can_trim_restored`: so restored, a sequence can be trimmed
    like any other (a sliding window is saved no longer than it need be). `needs_checkpoints`: a sequence goes back
    to where a partial state was saved, and nowhere else.

    `n_loras`: the most adapters that one sequence can be computed with; 0 where there can be none.
    `state_mark`: differs between two engines of which one cannot read the other's states, also in another process.
    """

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_seq: int
    n_outputs: int
    n_vocab: int
    n_embd: int
    can_trim: bool
    can_share: bool
    generates: bool
    embeds: bool
    n_embed_tokens: int
    n_embed_text: int
    n_embed_seq: int
    can_save: bool = False
    can_trim_restored: bool = False
    needs_checkpoints: bool = False
    n_loras: int = 0
    state_mark: bytes = b""


def outputs_of(config: ModelConfig) -> int:
    """How many rows of logits a decode has at most. Each takes twice the size of the vocabulary in floats."""
    return config.n_parallel + (0 if config.speculation == "off" else MOST_DRAFTS)


def sequences_of(config: ModelConfig, *, window: int, is_stateful: bool) -> int:
    """How many sequences a context has: one a slot, and where a window is to keep all of its cells, a shadow for each.

    See `_engine.shadows`. llama.cpp reserves a row of logits for each.
    """
    shadowed = window and config.swa_full and not is_stateful and 2 * config.n_parallel <= MOST_SEQUENCES
    return config.n_parallel * (2 if shadowed else 1)


class Aborted(GenerationError):
    """The abort flag ended this call; nothing is wrong with what it was given."""


class AbortFlag(Protocol):
    """The switch that ends a running decode. `raise_` may be called from any thread and never blocks."""

    def raise_(self) -> None: ...

    def clear(self) -> None: ...


class Sampler(Protocol):
    """A sampler chain with its state (penalties, RNG). Belongs to one generation."""

    def accept(self, token: int) -> None:
        """Take note of a token that follows without having been sampled."""
        ...

    def close(self) -> None: ...


class Engine(Protocol):
    """One loaded model. See the module for the thread rule.

    A call from another thread, or after close, raises RuntimeError; generating with a model that only
    embeds raises UnsupportedFeatureError.
    """

    @property
    def limits(self) -> EngineLimits: ...

    @property
    def abort_flag(self) -> AbortFlag: ...

    def decode(self, spans: Sequence[Span]) -> DecodeStatus:
        """Compute the rows of `spans`, in order. Blocks. Rows are numbered through all spans from 0.

        Raises ValueError, before anything is touched, for what would abort the process: too many rows
        or outputs, a sequence or token id out of range, positions that do not continue the sequence; and for a
        sequence whose tokens were computed with other adapters than those in use.
        ABORTED and failures may leave a part of the rows in the KV cache: ask `seq_end`. A recurrent or hybrid model
        loses the states of these sequences, and if they are several, those of all others too: then it is 0 for each.
        """
        ...

    def sample(self, row: int, sampler: Sampler, mask: Mask | None = None) -> int:
        """Sample and accept the next token from the logits of `row` of the last decode.

        With a `mask` it is one that the mask allows; the row's logits may be changed, so look at them before.
        Raises ValueError when that row has no logits, the last decode did not return OK, or the mask is
        of another vocabulary; GenerationError when the logits are no finite numbers, or no token is left
        to choose: also when all that the mask allows is banned.
        """
        ...

    def logits(self, row: int) -> Floats:
        """The logits of `row`, float32 of shape (n_vocab,): a view, valid until the next decode."""
        ...

    def new_sampler(self, params: SamplingParams, history: TokenIds) -> Sampler:
        """A fresh chain that has accepted `history` (for penalties). Raises InvalidRequestError."""
        ...

    def seq_end(self, seq: int) -> int:
        """How many tokens `seq` holds: one past its last position."""
        ...

    def seq_trim(self, seq: int, length: int) -> bool:
        """Keep the first `length` tokens. False where the model cannot; then nothing was changed."""
        ...

    def seq_clear(self, seq: int) -> None:
        """Forget the sequence. Always works."""
        ...

    def seq_share(self, source: int, target: int, length: int) -> None:
        """Let the empty `target` hold the first `length` tokens of `source`. Needs `can_share`.

        Raises ValueError for misuse; StateError when a sliding window was dropped there, for want of cells.
        """
        ...

    def seq_save(self, seq: int, *, partial: bool = False) -> SavedState:
        """What `seq` holds, as bytes. Needs `can_save`, and a sequence that is not empty. Blocks (a copy).

        `partial`: only what cannot be cut back (a recurrent state, a sliding window), which is of use where the
        other cells of these tokens are still there. Needs `needs_checkpoints`.

        Raises ValueError for misuse; StateError, MemoryError when it fails: then nothing was changed.
        """
        ...

    def seq_restore(self, seq: int, state: SavedState | bytes, length: int, *, donor: int | None = None) -> None:
        """Let `seq` hold the `length` tokens that `state` was saved of, and nothing else. Blocks (a copy).

        A whole state replaces what `seq` holds. A partial state is put over the first `length` tokens that `seq`
        holds (or held before its state was lost in a decode that was aborted or failed), or, with `donor`, over those
        of the donor, which the empty `seq` shares with it from now on.

        A state remembers the adapters that it was computed with; those in use do not matter.

        Raises ValueError for misuse. Raises StateError for a state that is damaged, another engine's, or not of
        `length` tokens, and when there is no room: then `seq` is empty.
        """
        ...

    def load_lora(self, path: str) -> LoraInfo:
        """Read a LoRA adapter for this model from a GGUF file; it is in use for nothing yet. Blocks.

        The same content again changes nothing. Raises LoraLoadError, which names the file and what is wrong,
        InsufficientMemoryError, UnsupportedFeatureError where `n_loras` is 0.
        """
        ...

    def free_lora(self, digest: str) -> None:
        """Forget an adapter, or do nothing if it is not there. In use, it is so no longer."""
        ...

    def use_loras(self, kv: KVIdentity) -> bool:
        """Compute with these adapters from the next decode on; says whether that is a change, which costs milliseconds.

        Raises ValueError for an adapter that is not loaded, and for more of them than `n_loras`.
        """
        ...

    def embed(self, texts: Sequence[TokenIds]) -> Floats:
        """Pooled embeddings of `texts`, float32 of shape (len(texts), n_embd), not normalised. Blocks.

        Raises ValueError for more than n_embed_seq texts or n_embed_tokens tokens together, or an
        empty text; Aborted; GenerationError when the engine fails; UnsupportedFeatureError for a
        model without text embeddings; ModelLoadError when its context, made at first use, does not fit.
        """
        ...

    def rest(self) -> None:
        """Nothing is computed next: threads that were kept ready beside the calling one may go. Any thread."""
        ...

    def adopt(self) -> None:
        """The calling thread owns the engine from now on; the one that did must not use it any more."""
        ...

    def close(self) -> None:
        """Free everything in the order that llama.cpp needs. Idempotent."""
        ...


class Vocabulary(Protocol):
    """The tokens of a model. Every thread may use it; no call waits for a generation."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def pieces(self) -> Sequence[bytes]:
        """The text of each token as bytes, index = id; control tokens have their text too."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """The ids that end a generation."""
        ...

    @property
    def control_texts(self) -> Sequence[str]:
        """The texts that `parse_special` would turn into control tokens, longest first."""
        ...

    @property
    def bos_text(self) -> str: ...

    @property
    def eos_text(self) -> str: ...

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool, after: int | None = None) -> TokenIds:
        """Text to ids. Raises InvalidRequestError for text that is no valid Unicode.

        `add_special`: with BOS and EOS as the model wants them. `parse_special`: control tokens written
        in the text become control tokens. `after`: the id that this text follows in the same prompt,
        None at the beginning of one; SentencePiece puts a space before a text unless it follows another.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What a loader hands over. `config`: what it was loaded with, where that is not what was asked for.

    `draft`: the engine of the draft model, which has the same vocabulary and can be trimmed.
    """

    engine: Engine
    vocabulary: Vocabulary
    info: ModelInfo
    config: ModelConfig | None = None
    draft: Engine | None = None

    @property
    def engines(self) -> tuple[Engine, ...]:
        return (self.engine,) if self.draft is None else (self.draft, self.engine)

    def adopt(self) -> None:
        """As `Engine.adopt`, of all."""
        for engine in self.engines:
            engine.adopt()

    def close(self) -> None:
        """As `Engine.close`, of all."""
        for engine in self.engines:
            engine.close()


Loader: TypeAlias = Callable[[ModelConfig], LoadedModel]
"""Loads a model; called on the worker thread. Raises ModelLoadError."""
