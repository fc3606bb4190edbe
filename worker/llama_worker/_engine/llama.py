"""LlamaEngine: `base.Engine` over llama.cpp.

llama.cpp answers misuse with abort(): a row too many, a sequence id out of range, a sample from a row
without logits end the process. So the engine keeps each sequence's length and the last decode's output
rows in Python, and refuses before C is reached.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

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
    TokenIds,
)
from llama_worker._engine.context import AbortSwitch
from llama_worker._engine.draft import require_draft, require_same_tokens
from llama_worker._engine.embedding import Embedder, can_embed, check_texts, embedding_limits
from llama_worker._engine.generator import Generator, require_consistent
from llama_worker._engine.library import library
from llama_worker._engine.loras import Loras, most_loras
from llama_worker._engine.progress import Share, current_progress, watched_by
from llama_worker._engine.sampler import LlamaSampler
from llama_worker._engine.vocabulary import LlamaVocabulary
from llama_worker._engine.weights import load_weights, require_supported
from llama_worker._errors import UnsupportedFeatureError
from llama_worker._fitting import fit_to_memory
from llama_worker._identity import BASE, KVIdentity
from llama_worker._models import read_info, resolve
from llama_worker._requests import SamplingParams


def load(config: ModelConfig) -> LoadedModel:
    """Load `config.model` on the calling thread, which then owns the engine. Blocks.

    Raises ModelLoadError (also ModelNotFoundError, InsufficientMemoryError), EngineVersionError, and
    ConfigError for settings that cannot go together and for what only the installed library can tell.
    """
    path = resolve(config.model)
    info = read_info(path)
    require_consistent(config, info)
    drafting = require_draft(config, info)
    config = fit_to_memory(info, config)
    vocabulary = LlamaVocabulary(path)
    if drafting is not None:
        require_same_tokens(config, vocabulary.pieces, LlamaVocabulary(drafting[0]).pieces)
    try:
        engine, draft = _opened(config, (path, info), drafting)
    finally:
        library().let_team_go()  # this thread's, which computed to probe the memory
    return LoadedModel(engine=engine, vocabulary=vocabulary, info=info, config=config, draft=draft)


def _opened(
    config: ModelConfig, model: tuple[Path, ModelInfo], drafting: tuple[Path, ModelInfo] | None
) -> tuple[LlamaEngine, LlamaEngine | None]:
    """The engine of the model, and that of its draft model, if there is one: both, or none."""
    own = config.of_draft(model[1].n_ctx_train)
    if drafting is None or own is None:
        return LlamaEngine(config, *model), None
    whole, part = current_progress(), model[1].size / (model[1].size + drafting[1].size)
    with ExitStack() as undone:
        with watched_by(Share(whole, 0.0, part)):
            engine = LlamaEngine(config, *model)
        undone.callback(engine.close)
        with watched_by(Share(whole, part, 1.0)):
            draft = LlamaEngine(own, *drafting)
        undone.pop_all()
    return engine, draft


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
            self._model = load_weights(self._lib, stack, config, path)
            require_supported(self._lib.api, self._model, info)
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
        return self._require_generator().sequences.end(seq)

    def seq_trim(self, seq: int, length: int) -> bool:
        """See `base.Engine`."""
        return self._require_generator().sequences.trim(seq, length)

    def seq_clear(self, seq: int) -> None:
        """See `base.Engine`."""
        self._require_generator().sequences.clear(seq)

    def seq_share(self, source: int, target: int, length: int) -> None:
        """See `base.Engine`."""
        self._require_generator().sequences.share(source, target, length)

    def seq_save(self, seq: int, *, partial: bool = False) -> SavedState:
        """See `base.Engine`."""
        return self._require_generator().sequences.save(seq, partial=partial)

    def seq_restore(self, seq: int, state: SavedState | bytes, length: int, *, donor: int | None = None) -> None:
        """See `base.Engine`."""
        self._require_generator().sequences.restore(seq, state, length, donor)

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
        check_texts(texts, self.limits)
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

    def _require_generator(self) -> Generator:
        self._enter()
        if self._generator is None:
            raise UnsupportedFeatureError("generation", "this is an embedding model; use embed()")
        return self._generator

    def _new_generator(self, stack: ExitStack) -> Generator | None:
        if self._info.is_embedding or not self._lib.api.llama_model_has_decoder(self._model):
            return None
        return Generator(self._lib, stack, self._model, self._config, self._info, self.abort_flag)

    def _new_embedder(self) -> Embedder:
        with ExitStack() as stack:
            embedder = Embedder(self._lib, stack, self._model, self._config, self._info, self.abort_flag)
            self._stack.push(stack.pop_all())
        return embedder

    def _limits(self) -> EngineLimits:
        n_embed_tokens, n_embed_text, n_embed_seq = embedding_limits(self._config, self._info)
        api, generator = self._lib.api, self._generator
        return EngineLimits(
            n_ctx=generator.n_ctx if generator else 0,
            n_batch=generator.n_batch if generator else 0,
            n_ubatch=generator.n_ubatch if generator else 0,
            n_seq=generator.sequences.n if generator else 0,
            n_outputs=generator.n_outputs if generator else 0,
            n_vocab=api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)),
            n_embd=api.llama_model_n_embd_out(self._model),
            can_trim=generator.sequences.can_trim_anywhere if generator else False,
            can_share=generator.sequences.can_share if generator else False,
            generates=generator is not None,
            embeds=can_embed(self._config, self._info),
            n_embed_tokens=n_embed_tokens,
            n_embed_text=n_embed_text,
            n_embed_seq=n_embed_seq,
            can_save=generator.sequences.can_save if generator else False,
            can_trim_restored=generator.sequences.can_trim_restored if generator else False,
            needs_checkpoints=generator.sequences.needs_checkpoints if generator else False,
            n_loras=most_loras(self._info) if generator else 0,
            state_mark=generator.state_mark if generator else b"",
        )
