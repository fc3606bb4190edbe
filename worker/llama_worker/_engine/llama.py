"""LlamaEngine: `base.Engine` over llama.cpp.

llama.cpp answers misuse with abort(): a row too many, a sequence id out of range, a sample from a row
without logits end the process. So the engine keeps each sequence's length and the last decode's output
rows in Python, and refuses before C is reached.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np

from llama_worker._config import ModelConfig
from llama_worker._engine.base import (
    DecodeStatus,
    EngineLimits,
    Floats,
    LoadedModel,
    LoraInfo,
    Mask,
    ModelInfo,
    Sampler,
    SavedState,
    Span,
    StateError,
    TokenIds,
    outputs_of,
)
from llama_worker._engine.batch import Batch
from llama_worker._engine.context import AbortSwitch, new_context, threads
from llama_worker._engine.embedding import Embedder, can_embed, embedding_limits
from llama_worker._engine.library import Library, Pointer, library
from llama_worker._engine.log import collected_log, error_lines, thread_log
from llama_worker._engine.loras import Loras, most_loras
from llama_worker._engine.masking import Masks, nothing_left
from llama_worker._engine.progress import current_progress
from llama_worker._engine.rows import RowScan, require_number
from llama_worker._engine.sampler import LlamaSampler, SamplerFactory, SamplingVocab
from llama_worker._engine.state import ContextStates, fingerprint
from llama_worker._engine.vocabulary import LlamaVocabulary
from llama_worker._errors import ConfigError, ModelLoadError, UnsupportedFeatureError
from llama_worker._fitting import fit_to_memory
from llama_worker._identity import BASE, KVIdentity
from llama_worker._models import read_info, resolve
from llama_worker._requests import SamplingParams

_SPLIT_MODES: Final = {"none": 0, "layer": 1, "row": 2}
_LOAD_MODES: Final = {"auto": -1, "none": 0, "mmap": 1, "mlock": 2, "mmap_mlock": 3, "direct_io": 4}
_FLASH_ATTN: Final = {"auto": -1, "off": 0, "on": 1}
_KV_TYPES: Final = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_0": 6, "q5_1": 7, "q4_0": 2, "q4_1": 3, "iq4_nl": 20,
}  # fmt: skip


def load(config: ModelConfig) -> LoadedModel:
    """Load `config.model` on the calling thread, which then owns the engine. Blocks.

    Raises ModelLoadError (also ModelNotFoundError, InsufficientMemoryError), EngineVersionError, and
    ConfigError for what only the installed library can tell.
    """
    path = resolve(config.model)
    info = read_info(path)
    config = fit_to_memory(info, config)
    vocabulary = LlamaVocabulary(path)
    try:
        engine = LlamaEngine(config, path, info)
    finally:
        library().let_team_go()  # this thread's, which computed to probe the memory
    return LoadedModel(engine=engine, vocabulary=vocabulary, info=info, config=config)


class LlamaEngine:
    """One loaded model. Every method belongs to the thread that constructed it (RuntimeError elsewhere).

    The constructor blocks until the weights are read and raises what `load` raises.
    """

    def __init__(self, config: ModelConfig, path: Path, info: ModelInfo) -> None:
        self._thread = threading.get_ident()
        self._config, self._info = config, info
        self._lib = library()
        self.abort_flag = AbortSwitch()
        with ExitStack() as stack:
            self._model = _load_model(self._lib, stack, config, path)
            _require_supported(self._lib.api, self._model, info)
            self._n_vocab = _n_vocab(self._lib.api, self._model)
            self._generator = self._new_generator(stack)
            self._stack = stack.pop_all()
        self._embedder: Embedder | None = None
        self._loras: Loras | None = None
        # An engine that is dropped gives its memory back; at exit another thread may still be in it.
        self._free = weakref.finalize(self, self._stack.close)
        self._free.atexit = False
        self._closed = False
        self.limits = self._limits()

    def decode(self, spans: Sequence[Span]) -> DecodeStatus:
        """See `base.Engine`."""
        return self._require_generator().decode(spans)

    def sample(self, row: int, sampler: Sampler, mask: Mask | None = None) -> int:
        """See `base.Engine`. Raises GenerationError when no token can be chosen."""
        generator = self._require_generator()
        if not isinstance(sampler, LlamaSampler) or sampler.closed or sampler.owner is not generator.samplers:
            raise ValueError("sampler: closed, or not one of this engine's")
        return generator.sample(row, sampler) if mask is None else generator.sample_masked(row, sampler, mask)

    def logits(self, row: int) -> Floats:
        """See `base.Engine`."""
        return self._require_generator().logits(row)

    def new_sampler(self, params: SamplingParams, history: TokenIds) -> LlamaSampler:
        """See `base.Engine`."""
        return self._require_generator().samplers.new(params, history)

    def seq_end(self, seq: int) -> int:
        """See `base.Engine`."""
        return self._require_generator().seq_end(seq)

    def seq_trim(self, seq: int, length: int) -> bool:
        """See `base.Engine`."""
        return self._require_generator().seq_trim(seq, length)

    def seq_clear(self, seq: int) -> None:
        """See `base.Engine`."""
        self._require_generator().seq_clear(seq)

    def seq_share(self, source: int, target: int, length: int) -> None:
        """See `base.Engine`."""
        self._require_generator().seq_share(source, target, length)

    def seq_save(self, seq: int, *, partial: bool = False) -> SavedState:
        """See `base.Engine`."""
        return self._require_generator().seq_save(seq, partial=partial)

    def seq_restore(self, seq: int, state: SavedState | bytes, length: int, *, donor: int | None = None) -> None:
        """See `base.Engine`."""
        self._require_generator().seq_restore(seq, state, length, donor)

    def load_lora(self, path: str) -> LoraInfo:
        """See `base.Engine`."""
        generator = self._require_generator()
        if self._loras is None:
            self._loras = Loras(self._lib, self._model, generator.context, self._info)
        return self._loras.load(path)

    def free_lora(self, digest: str) -> None:
        """See `base.Engine`."""
        generator = self._require_generator()
        if self._loras is not None:
            if digest in dict(generator.kv.loras):
                self.use_loras(BASE)
            self._loras.free(digest)

    def use_loras(self, kv: KVIdentity) -> bool:
        """See `base.Engine`."""
        generator = self._require_generator()
        if kv == generator.kv:
            return False
        if len(kv.loras) > self.limits.n_loras:
            raise ValueError(f"{len(kv.loras)} adapters at once: at most {self.limits.n_loras}")
        if self._loras is None:
            raise ValueError("no adapter is loaded")
        self._loras.use(kv)
        generator.kv, generator.kv_mark = kv, kv.mark
        return True

    def embed(self, texts: Sequence[TokenIds]) -> Floats:
        """See `base.Engine`. The first call creates the embedding context (ModelLoadError if it cannot)."""
        self._enter()
        if not self.limits.embeds:
            raise UnsupportedFeatureError("embedding", "this model scores pairs; use one that pools to a vector")
        _check_texts(texts, self.limits)
        if not texts:
            return np.empty((0, self.limits.n_embd), np.float32)
        if self._embedder is None:
            self._embedder = self._new_embedder()
        return self._embedder.embed(texts)

    def rest(self) -> None:
        """See `base.Engine`."""
        self._lib.let_team_go()

    def adopt(self) -> None:
        """See `base.Engine`."""
        self._thread = threading.get_ident()

    def close(self) -> None:
        """See `base.Engine`."""
        if not self._closed:
            self._enter()
            self._closed = True
            self._free()

    def _enter(self) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError("an engine may only be used by the thread that owns it")
        if self._closed:
            raise RuntimeError("the engine is closed")

    def _require_generator(self) -> _Generator:
        self._enter()
        if self._generator is None:
            raise UnsupportedFeatureError("generation", "this is an embedding model; use embed()")
        return self._generator

    def _new_generator(self, stack: ExitStack) -> _Generator | None:
        if self._info.is_embedding or not self._lib.api.llama_model_has_decoder(self._model):
            return None
        return _Generator(self._lib, stack, self._model, self._config, self._info, self.abort_flag)

    def _new_embedder(self) -> Embedder:
        with ExitStack() as stack:
            embedder = Embedder(self._lib, stack, self._model, self._config, self._info, self.abort_flag)
            self._stack.push(stack.pop_all())
        return embedder

    def _limits(self) -> EngineLimits:
        n_embed_tokens, n_embed_text, n_embed_seq = embedding_limits(self._config, self._info)
        generator = self._generator
        return EngineLimits(
            n_ctx=generator.n_ctx if generator else 0,
            n_batch=generator.n_batch if generator else 0,
            n_ubatch=generator.n_ubatch if generator else 0,
            n_seq=generator.n_seq if generator else 0,
            n_outputs=generator.n_outputs if generator else 0,
            n_vocab=self._n_vocab,
            n_embd=self._lib.api.llama_model_n_embd_out(self._model),
            can_trim=generator.can_trim_anywhere if generator else False,
            can_share=generator.can_share if generator else False,
            generates=generator is not None,
            embeds=can_embed(self._config, self._info),
            n_embed_tokens=n_embed_tokens,
            n_embed_text=n_embed_text,
            n_embed_seq=n_embed_seq,
            can_save=generator.can_save if generator else False,
            can_trim_restored=generator.can_trim_restored if generator else False,
            needs_checkpoints=generator.needs_checkpoints if generator else False,
            n_loras=most_loras(self._info) if generator else 0,
            state_mark=generator.state_mark if generator else b"",
        )


class _Generator:
    """The generation context and what llama.cpp does not check of it. The engine's thread."""

    def __init__(
        self,
        lib: Library,
        stack: ExitStack,
        model: Pointer,
        config: ModelConfig,
        info: ModelInfo,
        abort: AbortSwitch,
    ) -> None:
        api = lib.api
        params = _generation_params(api, config)
        self._lib = lib
        self._context = self.context = new_context(lib, stack, model, params, abort)
        self._memory: Pointer = api.llama_get_memory(self._context)
        if not self._memory:
            raise ModelLoadError(f"{info.name} ({info.architecture}) keeps no context; it cannot generate")
        self.n_ctx: int = api.llama_n_ctx(self._context)
        self.n_batch: int = api.llama_n_batch(self._context)
        self.n_ubatch: int = api.llama_n_ubatch(self._context)
        self.n_seq: int = api.llama_n_seq_max(self._context)
        self.n_outputs: int = params.n_outputs_max
        vocab = _sampling_vocab(lib, model, self.n_ctx)
        self._n_vocab = vocab.n_tokens
        self._batch = Batch(lib, self.n_batch, self.n_seq)
        stack.callback(self._batch.free)
        self.samplers = SamplerFactory(lib, vocab)
        stack.callback(self.samplers.close)
        self._window = int(api.llama_model_n_swa(model))
        if self._window:
            # Of a batch of several ubatches llama.cpp finds places for all before it computes the first, and gives
            # up cells that the first one's rows still attend to (0.3.36): their logits are wrong, by 0.2 and more.
            self.n_batch = min(self.n_batch, api.llama_n_ubatch(self._context))
        self._ends = [0] * self.n_seq
        self.kv, self.kv_mark = BASE, BASE.mark  # what is computed with from now on
        self._marks = [BASE.mark] * self.n_seq  # what each sequence was computed with
        self._spoiled: dict[int, int] = {}  # sequences without a valid state, and how many tokens' other cells are
        self._rows: dict[int, Floats] = {}
        self._scan = RowScan()
        self._masks: Masks | None = None  # made when first needed
        self._address = 0
        self._views: list[Floats] = []
        # A device computes on after llama_decode returns. Waiting for it gives the GIL up once more, which a
        # busy Python thread keeps for 5 ms; a CPU is done by then.
        self._is_async: bool = api.llama_supports_gpu_offload()
        stateful = api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model)
        self.state_mark = _state_mark(lib, config, info, self.n_ctx)
        self._states = ContextStates(lib, self._context, self.state_mark)
        self.can_trim = self.can_save = self.needs_checkpoints = False  # until the memory has shown that it can
        self.can_trim = self._probe_trim() and not stateful
        drops = bool(self._window) and not config.swa_full
        # A window that drops cells can go back a little, but nobody can count on it.
        self.can_trim_anywhere = self.can_trim and not drops
        self.can_share = not stateful and not drops
        self.can_trim_restored = self.can_save and self.can_trim and not self._window
        self.needs_checkpoints = self.can_save and not self.can_trim_anywhere and self._probe_checkpoint()
        self.seq_clear(0)
        lib.short.llama_memory_clear(self._memory, True)

    def decode(self, spans: Sequence[Span]) -> DecodeStatus:
        ends, outputs = self._checked(spans)
        for seq in [span.seq for span in spans if span.seq in self._spoiled] if self._spoiled else ():
            self._clear(seq)
        self._rows = {}  # the next call overwrites the logits, whatever comes of it
        self._batch.fill(spans)
        log = thread_log()
        log.hold()
        code = self._lib.api.llama_decode(self._context, self._batch.native)
        log.release(expected=code >= 0)
        if code == 0:
            self._ends = ends
            if outputs:
                self._rows = dict(zip(outputs, self._logits(), strict=False))
            return DecodeStatus.OK
        self._resync(spans, code)
        return DecodeStatus(code) if code in _KNOWN_CODES else DecodeStatus.COMPUTE_FAILED

    def sample(self, row: int, sampler: LlamaSampler) -> int:
        logits = self.logits(row)
        if sampler.takes_greatest:
            greatest = self._scan.greatest(logits)
            if greatest is not None and greatest not in sampler.banned:
                return greatest
        else:
            self._scan.require_finite(logits)
        token: int = self._lib.short.llama_sampler_sample(sampler.pointer, self._context, row)
        require_number(logits[token])
        if token in sampler.banned:
            raise nothing_left()
        return token

    def sample_masked(self, row: int, sampler: LlamaSampler, mask: Mask) -> int:
        logits = self.logits(row)
        masks = self._masks = self._masks or Masks(self._lib, self._n_vocab)
        few = masks.narrow(mask, sampler.permitted(masks))
        if few is not None and sampler.takes_greatest:
            return masks.greatest(logits, few)
        if few is None and sampler.weighs_all:
            few = masks.everything()
        if few is not None:
            return masks.sample(sampler.pointer, logits, few)
        self._scan.require_finite(logits)
        masks.apply(logits)
        token = self.sample(row, sampler)
        if not masks.leaves(token):
            raise nothing_left()
        return token

    def logits(self, row: int) -> Floats:
        logits = self._rows.get(row)
        if logits is None:
            raise ValueError(f"row={row}: the last decode computed logits for {sorted(self._rows)}")
        return logits

    def seq_end(self, seq: int) -> int:
        self._check_seq(seq)
        return self._ends[seq]

    def seq_trim(self, seq: int, length: int) -> bool:
        self._check_seq(seq)
        end = self._ends[seq]
        if not 0 <= length <= end:
            raise ValueError(f"length={length}: sequence {seq} holds {end} tokens")
        if length == end:
            return True
        if length == 0:
            self.seq_clear(seq)
            return True
        if not self.can_trim or not self._window_holds(seq, length):
            return False
        if not self._lib.short.llama_memory_seq_rm(self._memory, seq, length, -1):
            return False
        self._ends[seq] = length
        return True

    def seq_clear(self, seq: int) -> None:
        self._check_seq(seq)
        self._clear(seq)

    def _clear(self, seq: int) -> None:
        self._lib.short.llama_memory_seq_rm(self._memory, seq, -1, -1)
        self._spoiled.pop(seq, None)
        self._ends[seq] = 0

    def seq_share(self, source: int, target: int, length: int) -> None:
        self._check_seq(source)
        self._check_seq(target)
        if not self.can_share:
            raise ValueError("this model cannot share a prefix (limits.can_share)")
        if source == target or self._ends[target]:
            raise ValueError(f"target={target}: must be another sequence and empty, it holds {self._ends[target]}")
        if not 0 < length <= self._ends[source]:
            raise ValueError(f"length={length}: sequence {source} holds {self._ends[source]} tokens")
        if not self._window_holds(source, length):
            raise StateError(f"sequence {source} lacks the window behind its first {length} tokens")
        self._lib.short.llama_memory_seq_cp(self._memory, source, target, 0, length)
        self._ends[target] = length
        self._marks[target] = self._marks[source]

    def seq_save(self, seq: int, *, partial: bool) -> SavedState:
        self._check_seq(seq)
        if (partial and not self.needs_checkpoints) or not self.can_save:
            raise ValueError("this model has no such states (limits.can_save, limits.needs_checkpoints)")
        if not self._ends[seq]:
            raise ValueError(f"seq={seq}: it is empty")
        return self._states.save(seq, self._ends[seq], partial=partial, kv=self._marks[seq])

    def seq_restore(self, seq: int, state: SavedState | bytes, length: int, donor: int | None) -> None:
        self._check_seq(seq)
        if donor is not None:
            self._check_seq(donor)
            if donor == seq or self._ends[seq]:
                raise ValueError(f"seq={seq}: must be another than the donor and empty, it holds {self._ends[seq]}")
        try:
            self._restore(seq, state, length, donor)
        except StateError:
            self.seq_clear(seq)
            raise

    def _restore(self, seq: int, state: SavedState | bytes, length: int, donor: int | None) -> None:
        saved = self._states.open(state)
        if saved.length != length:
            raise StateError(f"the state is of {saved.length} tokens, not of {length}")
        short = self._lib.short
        if not saved.partial:
            self.seq_clear(seq)
        elif (self._spoiled.get(seq, self._ends[seq]) if donor is None else self._ends[donor]) < length:
            raise StateError(f"a state of {length} tokens lacks their other cells")
        elif saved.kv != self._marks[seq if donor is None else donor]:
            raise StateError(f"a state of {length} tokens belongs to cells of other adapters")
        elif donor is not None:
            short.llama_memory_seq_cp(self._memory, donor, seq, 0, length)
        self._states.load(seq, saved)
        if saved.partial and not short.llama_memory_seq_rm(self._memory, seq, length, -1):
            raise StateError(f"what follows the {length} tokens could not be removed")
        if short.llama_memory_seq_pos_max(self._memory, seq) != length - 1:
            raise StateError(f"the state did not lead back to {length} tokens")
        self._spoiled.pop(seq, None)
        self._ends[seq] = length
        self._marks[seq] = saved.kv

    def _checked(self, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """Each sequence's length after `spans`, and the output rows. Raises ValueError."""
        ends = self._ends.copy()
        outputs: list[int] = []
        rows = 0
        for seq, start, tokens, output in spans:
            self._check_seq(seq)
            n = len(tokens)
            if start != ends[seq] or not n:
                raise ValueError(f"span of {n} rows at {start}: sequence {seq} continues at {ends[seq]}")
            if self._marks[seq] != self.kv_mark:
                if start:
                    raise ValueError(f"sequence {seq}: its {start} tokens were computed with other adapters")
                self._marks[seq] = self.kv_mark
            low, high = (tokens[0], tokens[0]) if n == 1 else (tokens.min(), tokens.max())
            if low < 0 or high >= self._n_vocab:
                raise ValueError(f"token ids {low} … {high}: the model has 0 … {self._n_vocab - 1}")
            ends[seq] = start + n
            rows += n
            if output == 1:
                outputs.append(rows - 1)
            elif output:
                if not 0 < output <= n:
                    raise ValueError(f"output={output}: the span has {n} rows")
                outputs.extend(range(rows - output, rows))
        if not 0 < rows <= self.n_batch or len(outputs) > self.n_outputs:
            raise ValueError(
                f"{rows} rows, {len(outputs)} outputs: at most {self.n_batch} rows and {self.n_outputs} outputs a call"
            )
        return ends, outputs

    def _check_seq(self, seq: int) -> None:
        if not 0 <= seq < self.n_seq:
            raise ValueError(f"seq={seq}: out of range 0 … {self.n_seq - 1}")

    def _resync(self, spans: Sequence[Span], code: int) -> None:
        """Learn what a failed decode left. KV_FULL and INVALID leave everything as it was."""
        if code in (DecodeStatus.KV_FULL, DecodeStatus.INVALID):
            return
        for seq in {span.seq for span in spans}:
            before = self._ends[seq]
            self._ends[seq] = self._lib.short.llama_memory_seq_pos_max(self._memory, seq) + 1
            # A state that was half updated, or a window that lost cells, continues nothing. The cells of what
            # was there before are whole: a checkpoint among them can still be gone back to.
            if not self.can_trim or not self._window_holds(seq, self._ends[seq]):
                self._ends[seq] = 0
                self._spoiled[seq] = before

    def _window_holds(self, seq: int, length: int) -> bool:
        """Whether the cells that a token at `length` attends to are all there (sliding windows drop them)."""
        if not self._window:
            return True
        first: int = self._lib.short.llama_memory_seq_pos_min(self._memory, seq)
        return first <= max(0, length - self._window)

    def _probe_trim(self) -> bool:
        """Ask the memory itself: decode two tokens and take one away. Save them first, and read them back."""
        self._probe_decode(2)
        self.can_save = self._probe_restore(partial=False)
        if not self.can_save:
            self._probe_decode(2)
        trimmed = bool(self._lib.short.llama_memory_seq_rm(self._memory, 0, 1, -1))
        self.seq_clear(0)
        return trimmed

    def _probe_checkpoint(self) -> bool:
        """Save two tokens, partially, and come back to them from a third."""
        self.needs_checkpoints = True
        self._probe_decode(2)
        return self._probe_restore(partial=True)

    def _probe_restore(self, *, partial: bool) -> bool:
        self.can_save = True
        length = self._ends[0]
        try:
            state = self.seq_save(0, partial=partial)
            if partial:
                self._probe_decode(1)
            self.seq_restore(0, state, length, None)
        except StateError:
            return False
        return True

    def _probe_decode(self, n_tokens: int) -> None:
        tokens = np.zeros(n_tokens, np.int32)
        if self.decode([Span(seq=0, start=self._ends[0], tokens=tokens, output=True)]) != DecodeStatus.OK:
            raise ModelLoadError("the model does not compute: decoding two tokens failed")
        self._rows = {}

    def _logits(self) -> list[Floats]:
        """Views of the output buffer: one row of logits for each output of the last decode, in its order."""
        if self._is_async:
            self._lib.api.llama_synchronize(self._context)
        address = self._lib.short.llama_get_logits(self._context)
        if address != self._address:
            self._address = address
            self._views = _rows(address, self.n_outputs, self._n_vocab)
        return self._views


def _rows(address: int, n_rows: int, n_vocab: int) -> list[Floats]:
    array = (ctypes.c_float * (n_rows * n_vocab)).from_address(address)
    return list(np.frombuffer(memoryview(array).cast("B"), dtype=np.float32).reshape(n_rows, n_vocab))


_KNOWN_CODES: Final = frozenset(int(status) for status in DecodeStatus)


def _load_model(lib: Library, stack: ExitStack, config: ModelConfig, path: Path) -> Pointer:
    params, keep_alive = _model_params(lib.api, config)
    progress = current_progress()
    # A C callback cannot raise; its result says whether to go on.
    told = lib.api.llama_progress_callback(lambda fraction, _: progress.tell(fraction))
    params.progress_callback = told
    with collected_log() as lines:
        model = lib.api.llama_model_load_from_file(os.fsencode(path), params)
    del keep_alive
    if progress.is_cancelled and not model:
        raise ModelLoadError(f"loading {path.name} was cancelled")
    if not model:
        raise ModelLoadError(f"{path.name} could not be loaded: {error_lines(lines)}")
    stack.callback(lib.api.llama_model_free, model)
    return model


def _model_params(api: Any, config: ModelConfig) -> tuple[Any, object]:
    """The parameters, and what must stay alive while they are used."""
    params = api.llama_model_default_params()
    params.n_gpu_layers = config.n_gpu_layers
    params.main_gpu = config.main_gpu
    params.split_mode = _SPLIT_MODES[config.split_mode]
    params.load_mode = _LOAD_MODES[config.load_mode]
    if config.tensor_split is None:
        return params, None
    n_devices = api.llama_max_devices()
    if len(config.tensor_split) > n_devices:
        raise ConfigError("tensor_split", config.tensor_split, f"at most {n_devices} devices")
    shares = (ctypes.c_float * n_devices)(*config.tensor_split)
    params.tensor_split = shares
    return params, shares


def _generation_params(api: Any, config: ModelConfig) -> Any:
    params = api.llama_context_default_params()
    n_cells = config.n_kv_cells or config.n_ctx  # 0 means the trained context
    params.n_ctx = -(-n_cells // 256) * 256
    params.n_batch = config.n_batch
    params.n_ubatch = min(config.n_ubatch, config.n_batch)
    params.n_seq_max, params.n_outputs_max = config.n_parallel, outputs_of(config)
    params.n_threads, params.n_threads_batch = threads(config)
    params.flash_attn_type = _FLASH_ATTN[config.flash_attn]
    params.type_k = _KV_TYPES[config.type_k]
    params.type_v = _KV_TYPES[config.type_v]
    params.swa_full = config.swa_full
    params.offload_kqv = config.offload_kqv
    params.rope_freq_base, params.rope_freq_scale = config.rope_freq_base, config.rope_freq_scale
    params.kv_unified = True
    return params


def _require_supported(api: Any, model: Pointer, info: ModelInfo) -> None:
    """Kinds of models that decode in another way; called like the others, they abort."""
    if api.llama_model_has_encoder(model) and api.llama_model_has_decoder(model):
        raise ModelLoadError(f"{info.name} ({info.architecture}) is an encoder-decoder model; open a decoder-only one")
    if api.llama_model_is_diffusion(model):
        raise ModelLoadError(f"{info.name} ({info.architecture}) is a diffusion model; open a causal one")


def _state_mark(lib: Library, config: ModelConfig, info: ModelInfo, n_ctx: int) -> bytes:
    """What decides how a state is read, and what it means: the model, the types of its cells and how they are laid
    out, what they were rotated by (some models look at the size of the context), and the code that computed them.
    """
    cells = (config.type_k, config.type_v, config.flash_attn, config.swa_full, config.offload_kqv)
    rotation = (config.rope_freq_base, config.rope_freq_scale, n_ctx)
    return fingerprint(info.digest, cells, rotation, lib.build, config.n_gpu_layers if lib.offloads else 0)


def _n_vocab(api: Any, model: Pointer) -> int:
    return int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))


def _sampling_vocab(lib: Library, model: Pointer, n_ctx: int) -> SamplingVocab:
    vocab: Pointer = lib.api.llama_model_get_vocab(model)
    n_tokens = _n_vocab(lib.api, model)
    return SamplingVocab(
        pointer=vocab,
        n_tokens=n_tokens,
        n_ctx=n_ctx,
        end_tokens=frozenset(token for token in range(n_tokens) if lib.short.llama_vocab_is_eog(vocab, token)),
        suppressed=_suppressed(lib.api, vocab),
    )


def _suppressed(api: Any, vocab: Pointer) -> frozenset[int]:
    if not hasattr(api, "llama_vocab_get_suppress_tokens"):
        return frozenset()
    n = ctypes.c_int32(0)
    tokens = api.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(n))
    return frozenset(tokens[: n.value]) if tokens and n.value > 0 else frozenset()


def _check_texts(texts: Sequence[TokenIds], limits: EngineLimits) -> None:
    lengths = [len(text) for text in texts]
    if len(texts) > limits.n_embed_seq or sum(lengths) > limits.n_embed_tokens:
        raise ValueError(
            f"{len(texts)} texts of {sum(lengths)} tokens: at most {limits.n_embed_seq} texts "
            f"and {limits.n_embed_tokens} tokens a call"
        )
    if lengths and not 0 < min(lengths) <= max(lengths) <= limits.n_embed_text:
        raise ValueError(f"texts of {min(lengths)} … {max(lengths)} tokens: must be 1 … {limits.n_embed_text}")
    for text in texts:
        if text.min() < 0 or text.max() >= limits.n_vocab:
            raise ValueError(f"token ids {text.min()} … {text.max()}: the model has 0 … {limits.n_vocab - 1}")
