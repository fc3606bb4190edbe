"""FakeEngine: a KV cache like llama.cpp's, token by token, under a model that is a hash of what it holds."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from llama_worker._engine.base import (
    Aborted,
    DecodeStatus,
    EngineLimits,
    Floats,
    LoraInfo,
    Mask,
    Sampler,
    SavedState,
    Span,
    StateError,
    TokenIds,
)
from llama_worker._engine.state import Unsealed, fingerprint, opened
from llama_worker._errors import GenerationError, LoraLoadError, UnsupportedFeatureError
from llama_worker._identity import BASE, KVIdentity
from llama_worker._requests import SamplingParams
from llama_worker.testing._faults import Call, FakeAbortFlag, Fault, Gate
from llama_worker.testing._sampler import CLOSING, FakeSampler
from llama_worker.testing._tokenizer import IM_END

_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     ", np.uint8)
_LIKELY = np.array([*sorted(set(_LETTERS.tolist())), *CLOSING])


@dataclass(slots=True)
class _Row:
    token: int
    cell: int


@dataclass(eq=False)
class FakeEngine:
    """An Engine over a ByteTokenizer. `calls` records what was asked of it, in order.

    `replies` are dealt out to new samplers in turn; without any, text follows from the tokens.
    `hidden_cells` of the KV cache cannot be used, although `limits` says otherwise. With `needs_checkpoints`
    the next token depends on a state beside the cells, which only a partial state brings back. Any path that begins
    with fake:// is a LoRA adapter; the next token depends on those in use, and on their scales.
    """

    limits: EngineLimits
    replies: Iterable[str] = ()
    faults: list[Fault] = field(default_factory=list)
    gate: Gate = field(default_factory=Gate)
    calls: list[str] = field(default_factory=list)
    n_rows: int = 0
    hidden_cells: int = 0

    def __post_init__(self) -> None:
        self.abort_flag = FakeAbortFlag()
        self.hanging = threading.Event()
        self.closed = False
        self.n_rests = 0
        self.samplers: list[FakeSampler] = []
        self._scripts = itertools.cycle([deque(r.encode()) for r in self.replies]) if self.replies else None
        self._seqs: list[list[_Row]] = [[] for _ in range(self.limits.n_seq)]
        self._states: list[list[int]] = [[] for _ in range(self.limits.n_seq)]
        self._firm = [0] * self.limits.n_seq
        self._spoiled: set[int] = set()  # their states are lost; the cells are there
        self.loras: dict[str, LoraInfo] = {}
        self.kv = BASE
        self._marks = [BASE.mark] * self.limits.n_seq
        self._mark = fingerprint("fake", self.limits.state_mark, self.limits.n_vocab, self.limits.needs_checkpoints)
        self._new_cell = itertools.count()
        self._outputs: dict[int, bytes] = {}
        self._counts: dict[str, int] = {}
        self._thread = threading.get_ident()

    # -- Engine -------------------------------------------------------------------------------------

    def decode(self, spans: Sequence[Span]) -> DecodeStatus:
        """See Engine.decode."""
        self._validate(spans)
        self.gate._pass(self.abort_flag)
        self._outputs = {}
        status = self._called("decode")
        if status is not None and status is not DecodeStatus.OK:
            return self._broken(spans, status)
        if self.abort_flag.raised.is_set():
            return self._broken(spans, DecodeStatus.ABORTED)
        if self.cells_used + sum(len(s.tokens) for s in spans) > self.limits.n_ctx - self.hidden_cells:
            return DecodeStatus.KV_FULL
        self._compute(spans)
        return DecodeStatus.OK

    def sample(self, row: int, sampler: Sampler, mask: Mask | None = None) -> int:
        """See Engine.sample, and FakeSampler for what a mask does to a script."""
        self._called("sample")
        assert isinstance(sampler, FakeSampler)
        assert not sampler.closed, "a closed sampler was used"
        logits = self._logits(row)
        if mask is not None:
            return self._sample_masked(row, sampler, self._allowed(mask, sampler))
        if sampler.script is not None:
            return sampler.script.popleft() if sampler.script else IM_END
        if sampler.ignore_eos:
            logits[IM_END] = -np.inf
        return int(logits.argmax())

    def _allowed(self, mask: Mask, sampler: FakeSampler) -> frozenset[int]:
        if mask.dtype != np.uint8 or mask.shape != ((self.limits.n_vocab + 7) // 8,):
            raise ValueError(f"mask: {mask.dtype} of shape {mask.shape}")
        bits = np.unpackbits(mask, bitorder="little", count=self.limits.n_vocab)
        allowed = frozenset(bits.nonzero()[0].tolist()) - ({IM_END} if sampler.ignore_eos else set())
        if not allowed:
            raise GenerationError("no token was left to choose")
        return allowed

    def _sample_masked(self, row: int, sampler: FakeSampler, allowed: frozenset[int]) -> int:
        if sampler.script is not None:
            return sampler.next_of(allowed)
        # Other noise than letters alone: what is open must be closed some time.
        noise = _random(self._outputs[row] + b"masked", self.limits.n_vocab)
        noise[_LIKELY] += 4
        return max(allowed, key=lambda token: float(noise[token]))

    def logits(self, row: int) -> Floats:
        """See Engine.logits."""
        self._called("logits")
        return self._logits(row)

    def new_sampler(self, params: SamplingParams, history: TokenIds) -> FakeSampler:
        """See Engine.new_sampler."""
        self._called("new_sampler")
        script = None if self._scripts is None else deque(next(self._scripts))
        sampler = FakeSampler(script, params.ignore_eos)
        self.samplers.append(sampler)
        return sampler

    def seq_end(self, seq: int) -> int:
        """See Engine.seq_end."""
        self._called("seq_end")
        return self._end(seq)

    def seq_trim(self, seq: int, length: int) -> bool:
        """See Engine.seq_trim."""
        self._called("seq_trim")
        if length >= len(self._seqs[seq]):
            return True
        if not self.limits.can_trim or length < self._firm[seq]:
            return False
        del self._seqs[seq][length:]
        del self._states[seq][length:]
        return True

    def seq_clear(self, seq: int) -> None:
        """See Engine.seq_clear."""
        self._called("seq_clear")
        self._forget(seq)

    def seq_share(self, source: int, target: int, length: int) -> None:
        """See Engine.seq_share."""
        self._called("seq_share")
        if not self.limits.can_share:
            raise ValueError("this model cannot share prefixes")
        if self._seqs[target] or not 0 < length <= len(self._seqs[source]):
            raise ValueError(f"cannot share {length} tokens of {source} with {target}")
        if length < self._firm[source]:
            raise StateError(f"{length} tokens of {source} lack their window")
        self._seqs[target] = self._seqs[source][:length]
        self._states[target] = self._states[source][:length]
        self._firm[target] = self._firm[source]
        self._marks[target] = self._marks[source]

    def seq_save(self, seq: int, *, partial: bool = False) -> SavedState:
        """See Engine.seq_save."""
        self._called("seq_save")
        if not self.limits.can_save or (partial and not self.limits.needs_checkpoints) or not self._end(seq):
            raise ValueError(f"sequence {seq} cannot be saved (partial={partial})")
        cells = [] if partial else self.held(seq)
        data = np.array([*cells, *self._states[seq]], np.int32).view(np.uint8)
        room = Unsealed(len(data))
        room.payload[:] = data
        return room.sealed(self._mark, length=len(self._seqs[seq]), partial=partial, kv=self._marks[seq])

    def seq_restore(self, seq: int, state: SavedState | bytes, length: int, *, donor: int | None = None) -> None:
        """See Engine.seq_restore."""
        if donor is not None and (donor == seq or self._seqs[seq]):
            raise ValueError(f"sequence {seq} must be another than the donor and empty")
        try:
            self._called("seq_restore")
            self._restore(seq, state, length, seq if donor is None else donor)
        except StateError:
            self._forget(seq)
            raise

    def load_lora(self, path: str) -> LoraInfo:
        """See Engine.load_lora."""
        self._called("load_lora")
        if not self.limits.n_loras:
            raise UnsupportedFeatureError("generation", "this is an embedding model")
        if not path.startswith("fake://"):
            raise LoraLoadError(path, "there is no such file")
        digest = blake2b(path.encode(), digest_size=16).hexdigest()
        info = LoraInfo(path=path, digest=digest, size=1000, rank=8, alpha=16.0)
        self.loras[digest] = info
        return info

    def free_lora(self, digest: str) -> None:
        """See Engine.free_lora."""
        self._called("free_lora")
        self.loras.pop(digest, None)
        if digest in dict(self.kv.loras):
            self.kv = BASE

    def use_loras(self, kv: KVIdentity) -> bool:
        """See Engine.use_loras."""
        if kv == self.kv:
            return False
        self._called("use_loras")
        if len(kv.loras) > self.limits.n_loras or not {digest for digest, _ in kv.loras} <= set(self.loras):
            raise ValueError(f"{kv} cannot be used")
        self.kv = kv
        return True

    def embed(self, texts: Sequence[TokenIds]) -> Floats:
        """See Engine.embed."""
        if len(texts) > self.limits.n_embed_seq or sum(map(len, texts)) > self.limits.n_embed_tokens:
            raise ValueError("too many texts or tokens in one embedding batch")
        if any(not len(text) for text in texts):
            raise ValueError("an empty text cannot be embedded")
        self.gate._pass(self.abort_flag)
        self._called("embed")
        if self.abort_flag.raised.is_set():
            raise Aborted("the embedding was aborted")
        return np.stack([_random(text.tobytes(), self.limits.n_embd) for text in texts])

    def rest(self) -> None:
        """See Engine.rest."""
        self.n_rests += 1

    def adopt(self) -> None:
        """See Engine.adopt."""
        self._thread = threading.get_ident()

    def close(self) -> None:
        """See Engine.close."""
        self.closed = True
        self._called("close")

    # -- for tests ----------------------------------------------------------------------------------

    @property
    def cells_used(self) -> int:
        return len({row.cell for seq in self._seqs for row in seq})

    def held(self, seq: int) -> list[int]:
        """The tokens that `seq` holds."""
        return [row.token for row in self._seqs[seq]]

    # -- inside -------------------------------------------------------------------------------------

    def _called(self, call: Call) -> DecodeStatus | None:
        assert threading.get_ident() == self._thread, f"{call} from another thread"
        self.calls.append(call)
        self._counts[call] = self._counts.get(call, 0) + 1
        for fault in self.faults:
            if fault.call == call and fault.nth == self._counts[call]:
                return self._fail(fault)
        return None

    def _fail(self, fault: Fault) -> DecodeStatus | None:
        if isinstance(fault.how, Exception):
            raise fault.how
        if fault.how == "hang":
            self.hanging.set()
            if not self.abort_flag.raised.wait(30):
                raise TimeoutError("a hanging call was never aborted")
            return DecodeStatus.ABORTED
        return fault.how

    def _end(self, seq: int) -> int:
        return 0 if seq in self._spoiled else len(self._seqs[seq])

    def _forget(self, seq: int) -> None:
        self._seqs[seq], self._states[seq], self._firm[seq] = [], [], 0
        self._spoiled.discard(seq)

    def _restore(self, seq: int, state: SavedState | bytes, length: int, holder: int) -> None:
        saved = opened(state, self._mark)
        if saved.length != length:
            raise StateError(f"the state is of {saved.length} tokens, not of {length}")
        tokens = saved.payload.view(np.int32).tolist()
        if saved.partial:
            if (len(self._seqs[seq]) if holder == seq else self._end(holder)) < length:
                raise StateError(f"a state of {length} tokens lacks their other cells")
            if saved.kv != self._marks[holder]:
                raise StateError(f"a state of {length} tokens belongs to cells of other adapters")
            self._marks[seq] = saved.kv
            self._seqs[seq], self._states[seq] = self._seqs[holder][:length], tokens
            self._spoiled.discard(seq)
            return
        self._forget(seq)
        if self.cells_used + length > self.limits.n_ctx - self.hidden_cells:
            raise StateError(f"there are no {length} free cells")
        self._marks[seq] = saved.kv
        self._seqs[seq] = [_Row(token, next(self._new_cell)) for token in tokens[:length]]
        self._states[seq] = tokens[length:]
        self._firm[seq] = 0 if self.limits.can_trim_restored else length

    def _validate(self, spans: Sequence[Span]) -> None:
        if sum(len(span.tokens) for span in spans) > self.limits.n_batch:
            raise ValueError("more rows than n_batch")
        if sum(span.output for span in spans) > self.limits.n_outputs:
            raise ValueError("more outputs than n_outputs")
        for span in spans:
            if not 0 <= span.seq < self.limits.n_seq:
                raise ValueError(f"sequence {span.seq} is out of range")
            if not 0 <= span.output <= len(span.tokens):
                raise ValueError(f"{span.output} outputs of {len(span.tokens)} rows")
            if not len(span.tokens) or span.start != self._end(span.seq):
                raise ValueError(f"position {span.start} does not continue sequence {span.seq}")
            if span.tokens.min() < 0 or span.tokens.max() >= self.limits.n_vocab:
                raise ValueError("a token id is out of range")
            if span.start and self._marks[span.seq] != self.kv.mark:
                raise ValueError(f"sequence {span.seq} was computed with other adapters")

    def _compute(self, spans: Iterable[Span]) -> None:
        row = 0
        for span in spans:
            if span.seq in self._spoiled:
                self._forget(span.seq)
            held = self._seqs[span.seq]
            self._marks[span.seq] = self.kv.mark
            held.extend(_Row(int(token), next(self._new_cell)) for token in span.tokens)
            self._states[span.seq].extend(span.tokens.tolist())
            row += len(span.tokens)
            self.n_rows += len(span.tokens)
            for back in range(span.output):  # the last row, the one before it, …
                tokens, state = [r.token for r in held[: len(held) - back]], self._states[span.seq]
                state = state[: len(state) - back]
                seen = np.array(tokens if state == tokens else tokens + state, np.int32).tobytes()
                self._outputs[row - 1 - back] = seen + self.kv.mark if self.kv.loras else seen

    def _broken(self, spans: Sequence[Span], status: DecodeStatus) -> DecodeStatus:
        """Like llama.cpp: an aborted or failed call may leave a part of its rows behind, and spoil states."""
        if status in (DecodeStatus.ABORTED, DecodeStatus.ALLOC_FAILED, DecodeStatus.COMPUTE_FAILED):
            self._compute(_first_half(spans))
            self._outputs = {}
            if not self.limits.can_trim:
                several = len({span.seq for span in spans}) > 1
                self._spoiled.update(range(self.limits.n_seq) if several else [spans[0].seq])
        return status

    def _logits(self, row: int) -> Floats:
        if row not in self._outputs:
            raise ValueError(f"row {row} has no logits")
        logits = np.full(self.limits.n_vocab, -30.0, np.float32)
        noise = _random(self._outputs[row], len(_LETTERS) + 1)
        np.maximum.at(logits, _LETTERS, noise[1:])
        logits[IM_END] = noise[0]
        return logits


def _first_half(spans: Sequence[Span]) -> Iterator[Span]:
    """Of the rows of all, so that it may end within a span."""
    left = (sum(len(span.tokens) for span in spans) + 1) // 2
    for span in spans:
        if left > 0:
            yield span._replace(tokens=span.tokens[:left])
        left -= len(span.tokens)


def _random(seed: bytes, n: int) -> Floats:
    key = int.from_bytes(blake2b(seed, digest_size=8).digest(), "little")
    return np.random.default_rng(key).standard_normal(n).astype(np.float32)
