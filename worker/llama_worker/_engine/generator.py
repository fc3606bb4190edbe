"""Generator: the context in which text is generated."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

import numpy as np

from llama_worker._config import ModelConfig
from llama_worker._engine.base import DecodeStatus, Floats, Mask, ModelInfo, Span, StateError, outputs_of, sequences_of
from llama_worker._engine.batch import Batch
from llama_worker._engine.context import AbortSwitch, new_context, threads
from llama_worker._engine.library import Library, Pointer
from llama_worker._engine.log import thread_log
from llama_worker._engine.masking import Masks, nothing_left
from llama_worker._engine.outputs import Outputs
from llama_worker._engine.rows import RowScan, require_number
from llama_worker._engine.sampler import LlamaSampler, SamplerFactory, sampling_vocab
from llama_worker._engine.sequences import Sequences
from llama_worker._engine.state import fingerprint
from llama_worker._errors import ConfigError, ModelLoadError
from llama_worker._identity import BASE

_FLASH_ATTN: Final = {"auto": -1, "off": 0, "on": 1}
_KV_TYPES: Final = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_0": 6, "q5_1": 7, "q4_0": 2, "q4_1": 3, "iq4_nl": 20,
}  # fmt: skip
_KNOWN_CODES: Final = frozenset(int(status) for status in DecodeStatus)


class Generator:
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
        window = int(api.llama_model_n_swa(model))
        stateful = bool(api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model))
        n_seq, n_all = config.n_parallel, sequences_of(config, window=window, is_stateful=stateful)
        params = _context_params(api, config, n_all)
        self._lib = lib
        self.context = new_context(lib, stack, model, params, abort)
        memory: Pointer = api.llama_get_memory(self.context)
        if not memory:
            raise ModelLoadError(f"{info.name} ({info.architecture}) keeps no context; it cannot generate")
        self.n_ctx: int = api.llama_n_ctx(self.context)
        self.n_batch: int = api.llama_n_batch(self.context)
        self.n_ubatch: int = api.llama_n_ubatch(self.context)
        self.n_outputs = outputs_of(config)
        vocab = sampling_vocab(lib, model, self.n_ctx)
        self._n_vocab = vocab.n_tokens
        self.state_mark = _state_mark(lib, config, info, self.n_ctx)
        self.kv, self.kv_mark = BASE, BASE.mark  # what is computed with from now on
        self.sequences = Sequences(lib, self.context, memory, n_seq, window, self.state_mark, has_shadows=n_all > n_seq)
        self._outputs = Outputs(lib, self.context, self.n_outputs, self._n_vocab)
        self._scan = RowScan()
        self._masks: Masks | None = None  # made when first needed
        self._batch = Batch(lib, self.n_batch, n_seq)
        stack.callback(self._batch.free)
        self.samplers = SamplerFactory(lib, vocab)
        stack.callback(self.samplers.close)
        if window:
            # Of a batch of several ubatches llama.cpp finds places for all before it computes the first, and gives
            # up cells that the first one's rows still attend to (0.3.36): their logits are wrong, by 0.2 and more.
            self.n_batch = min(self.n_batch, self.n_ubatch)
        self._probe(stateful=stateful, window=window, drops=bool(window) and not config.swa_full)

    def decode(self, spans: Sequence[Span]) -> DecodeStatus:
        """See `base.Engine`."""
        ends, outputs = self._checked(spans)
        self.sequences.clear_spoiled(spans)
        self._outputs.forget()
        self._batch.fill(spans)
        log = thread_log()
        log.hold()
        code = self._lib.api.llama_decode(self.context, self._batch.native)
        log.release(expected=code >= 0)
        if code == 0:
            self.sequences.advance(spans, ends)
            self._outputs.take(outputs)
            return DecodeStatus.OK
        self.sequences.resync(spans, code)
        return DecodeStatus(code) if code in _KNOWN_CODES else DecodeStatus.COMPUTE_FAILED

    def logits(self, row: int) -> Floats:
        """See `base.Engine`."""
        return self._outputs.row(row)

    def sample(self, row: int, sampler: LlamaSampler) -> int:
        logits = self._outputs.row(row)
        if sampler.takes_greatest:
            greatest = self._scan.greatest(logits)
            if greatest is not None and greatest not in sampler.banned:
                return greatest
        else:
            self._scan.require_finite(logits)
        token: int = self._lib.short.llama_sampler_sample(sampler.pointer, self.context, row)
        require_number(logits[token])
        if token in sampler.banned:
            raise nothing_left()
        return token

    def sample_masked(self, row: int, sampler: LlamaSampler, mask: Mask) -> int:
        logits = self._outputs.row(row)
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

    def _checked(self, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """Each sequence's length after `spans`, and the output rows. Raises ValueError."""
        sequences = self.sequences
        ends = sequences.ends.copy()
        outputs: list[int] = []
        rows = 0
        for seq, start, tokens, output in spans:
            sequences.check(seq)
            n = len(tokens)
            if start != ends[seq] or not n:
                raise ValueError(f"span of {n} rows at {start}: sequence {seq} continues at {ends[seq]}")
            if sequences.marks[seq] != self.kv_mark:
                if start:
                    raise ValueError(f"sequence {seq}: its {start} tokens were computed with other adapters")
                sequences.marks[seq] = self.kv_mark
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

    def _probe(self, *, stateful: bool, window: int, drops: bool) -> None:
        """Learn what the memory can do, by having it done. `drops`: its window gives cells up."""
        able = self.sequences
        able.can_trim = self._probe_trim() and not stateful
        # A window that drops cells can go back a little, but nobody can count on it.
        able.can_trim_anywhere = able.can_trim and not drops
        able.can_share = not stateful and not drops
        able.can_trim_restored = able.can_save and able.can_trim and not window
        able.needs_checkpoints = able.can_save and not able.can_trim_anywhere and self._probe_checkpoint()
        able.wipe()

    def _probe_trim(self) -> bool:
        """Ask the memory itself: decode two tokens and take one away. Save them first, and read them back."""
        self._probe_decode(2)
        self.sequences.can_save = self._probe_restore(partial=False)
        if not self.sequences.can_save:
            self._probe_decode(2)
        trimmed = self.sequences.remove(0, 1)
        self.sequences.clear(0)
        return trimmed

    def _probe_checkpoint(self) -> bool:
        """Save two tokens, partially, and come back to them from a third."""
        self.sequences.needs_checkpoints = True
        self._probe_decode(2)
        return self._probe_restore(partial=True)

    def _probe_restore(self, *, partial: bool) -> bool:
        self.sequences.can_save = True
        length = self.sequences.end(0)
        try:
            state = self.sequences.save(0, partial=partial)
            if partial:
                self._probe_decode(1)
            self.sequences.restore(0, state, length, None)
        except StateError:
            return False
        return True

    def _probe_decode(self, n_tokens: int) -> None:
        tokens = np.zeros(n_tokens, np.int32)
        if self.decode([Span(seq=0, start=self.sequences.end(0), tokens=tokens, output=True)]) != DecodeStatus.OK:
            raise ModelLoadError("the model does not compute: decoding two tokens failed")
        self._outputs.forget()


def require_consistent(config: ModelConfig, info: ModelInfo) -> None:
    """Raise ConfigError for settings with which llama.cpp makes no context for generation, whatever the model."""
    if not info.is_embedding and config.flash_attn == "off" and config.type_v not in ("f32", "f16", "bf16"):
        raise ConfigError(
            "type_v", config.type_v, "a quantised V cache needs flash attention, which is off; use flash_attn='auto'"
        )


def _context_params(api: Any, config: ModelConfig, n_seq: int) -> Any:
    params = api.llama_context_default_params()
    n_cells = config.n_kv_cells or config.n_ctx  # 0 means the trained context
    params.n_ctx = -(-n_cells // 256) * 256
    params.n_batch = config.n_batch
    params.n_ubatch = min(config.n_ubatch, config.n_batch)
    params.n_seq_max, params.n_outputs_max = n_seq, max(n_seq, outputs_of(config))
    params.n_threads, params.n_threads_batch = threads(config)
    params.flash_attn_type = _FLASH_ATTN[config.flash_attn]
    params.type_k = _KV_TYPES[config.type_k]
    params.type_v = _KV_TYPES[config.type_v]
    params.swa_full = config.swa_full
    params.offload_kqv = config.offload_kqv
    params.rope_freq_base, params.rope_freq_scale = config.rope_freq_base, config.rope_freq_scale
    params.kv_unified = True
    return params


def _state_mark(lib: Library, config: ModelConfig, info: ModelInfo, n_ctx: int) -> bytes:
    """What decides how a state is read, and what it means: the model, the types of its cells and how they are laid
    out, what they were rotated by (some models look at the size of the context), and the code that computed them.
    """
    cells = (config.type_k, config.type_v, config.flash_attn, config.swa_full, config.offload_kqv)
    rotation = (config.rope_freq_base, config.rope_freq_scale, n_ctx)
    return fingerprint(info.digest, cells, rotation, lib.build, config.n_gpu_layers if lib.offloads else 0)
