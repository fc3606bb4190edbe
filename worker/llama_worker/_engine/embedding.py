"""Pooled embeddings on a context of their own, over the same weights as generation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

import numpy as np

from llama_worker._config import ModelConfig, Pooling
from llama_worker._engine.base import Aborted, DecodeStatus, EngineLimits, Floats, ModelInfo, TokenIds
from llama_worker._engine.batch import Batch
from llama_worker._engine.context import AbortSwitch, new_context, threads
from llama_worker._engine.library import Library, Pointer
from llama_worker._engine.log import thread_log
from llama_worker._errors import GenerationError

_TEXTS: Final = 64
_TOKENS: Final = 512  # in one batch every token is compared with every other, also across texts: longer costs more
_POOLING: Final[dict[str, int]] = {"mean": 1, "cls": 2, "last": 3}


class Embedder:
    """The embedding context: one text per sequence, every batch from an empty memory. The engine's thread."""

    def __init__(
        self, lib: Library, stack: ExitStack, model: Pointer, config: ModelConfig, info: ModelInfo, abort: AbortSwitch
    ) -> None:
        self._lib = lib
        params = _context_params(lib.api, config, info)
        self._context = new_context(lib, stack, model, params, abort)
        self._memory: Pointer = lib.api.llama_get_memory(self._context) or 0
        self._batch = Batch(lib, params.n_batch, params.n_seq_max)
        stack.callback(self._batch.free)
        self._n_embd: int = lib.api.llama_model_n_embd_out(model)

    def embed(self, texts: Sequence[TokenIds]) -> Floats:
        """One row for each of `texts`, which have been checked. Blocks. Raises GenerationError."""
        self._batch.fill_texts(texts)
        log = thread_log()
        log.hold()
        status = self._run()
        log.release(expected=status >= 0)
        if status != DecodeStatus.OK:
            kind = Aborted if status == DecodeStatus.ABORTED else GenerationError
            raise kind(f"embedding {len(texts)} texts ended with {_status_name(status)}")
        vectors = np.stack([self._vector(seq) for seq in range(len(texts))])
        if not np.isfinite(vectors).all():
            raise GenerationError("the model's embedding is not a number; its weights may be damaged")
        return vectors

    def _run(self) -> int:
        api = self._lib.api
        if not self._memory:
            return int(api.llama_encode(self._context, self._batch.native))
        self._lib.short.llama_memory_clear(self._memory, True)
        return int(api.llama_decode(self._context, self._batch.native))

    def _vector(self, seq: int) -> Floats:
        pointer = self._lib.api.llama_get_embeddings_seq(self._context, seq)
        if not pointer:
            raise GenerationError("the model gave no pooled embedding; open it with pooling='mean'")
        return np.ctypeslib.as_array(pointer, shape=(self._n_embd,)).copy()


def embedding_limits(config: ModelConfig, info: ModelInfo) -> tuple[int, int, int]:
    """Tokens of a batch, tokens of one text, texts of a batch.

    A text must lie in one micro-batch, or its pooling would be cut; and within the trained context,
    because absolute positions end there.
    """
    n_text = min(config.n_batch, info.n_ctx_train or config.n_batch)
    n_tokens = max(n_text, min(config.n_batch, _TOKENS))
    n_seq = config.n_parallel if info.is_recurrent or info.is_hybrid else _TEXTS  # states cost memory each
    return n_tokens, n_text, n_seq


def can_embed(config: ModelConfig, info: ModelInfo) -> bool:
    """Whether pooling yields a vector; a reranker's own pooling yields a score."""
    return config.pooling != "model" or info.pooling != "rank"


def check_texts(texts: Sequence[TokenIds], limits: EngineLimits) -> None:
    """Raises ValueError for texts that the embedding context would abort for."""
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


def _context_params(api: Any, config: ModelConfig, info: ModelInfo) -> Any:
    params = api.llama_context_default_params()
    n_tokens, _, params.n_seq_max = embedding_limits(config, info)
    # llama.cpp reserves the same number of tokens for each sequence and asserts that all of them fit.
    params.n_batch = -(-n_tokens // params.n_seq_max) * params.n_seq_max
    params.n_ctx = params.n_ubatch = params.n_batch
    params.n_threads = params.n_threads_batch = threads(config)[1]
    params.embeddings = True
    params.kv_unified = True
    params.offload_kqv = config.offload_kqv
    params.rope_freq_base, params.rope_freq_scale = config.rope_freq_base, config.rope_freq_scale
    params.pooling_type = _pooling_type(config.pooling, info.pooling)
    return params


def _pooling_type(wanted: Pooling, of_model: str | None) -> int:
    if wanted == "model":
        return -1 if of_model not in (None, "none") else _POOLING["mean"]
    return _POOLING[wanted]


def _status_name(status: int) -> str:
    return DecodeStatus(status).name if status in DecodeStatus.__members__.values() else f"code {status}"
