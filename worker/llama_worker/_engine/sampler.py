"""SamplingParams as a chain of llama.cpp's samplers.

Order, as in llama.cpp's own tools: bias, penalties, DRY, top-n-sigma, top-k, typical, top-p, min-p, XTC,
temperature, draw. A step that would change nothing is left out, so the default chain sorts 40 candidates
and no more.
"""

from __future__ import annotations

import ctypes
import secrets
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from llama_worker._engine.base import Mask, TokenIds
from llama_worker._engine.library import Library, Pointer
from llama_worker._engine.masking import Masks
from llama_worker._errors import InvalidRequestError
from llama_worker._requests import SamplingParams

_NEVER: Final = float("-inf")
# Beyond these, float32 arithmetic in the chain overflows to infinities that no longer compare.
_LARGEST_BIAS: Final = 1e4
_COLDEST: Final = 1e-3
_SMALLEST_PENALTY: Final = 1e-2
_MIROSTAT_CANDIDATES: Final = 100
_DRY_PROTOTYPES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingVocab:
    """What building a chain needs of the loaded model. `suppressed` are tokens that the model must not say."""

    pointer: Pointer
    n_tokens: int
    n_ctx: int
    end_tokens: frozenset[int]
    suppressed: frozenset[int]


def sampling_vocab(lib: Library, model: Pointer, n_ctx: int) -> SamplingVocab:
    """What the loaded `model` says of its tokens."""
    vocab: Pointer = lib.api.llama_model_get_vocab(model)
    n_tokens = int(lib.api.llama_vocab_n_tokens(vocab))
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


class LlamaSampler:
    """A chain and its state. Belongs to one generation and to the engine's thread.

    `banned` tokens can only come out when no other token is left. `takes_greatest`: the chain does
    nothing but find the greatest logit that is not banned. `weighs_all`: it computes with the probability of
    every candidate, which must not be zero. The chain is freed by `close`, or with the last reference.
    """

    __slots__ = (
        "__weakref__",
        "_accept",
        "_free",
        "_permitted",
        "banned",
        "closed",
        "owner",
        "pointer",
        "takes_greatest",
        "weighs_all",
    )

    def __init__(
        self,
        owner: SamplerFactory,
        lib: Library,
        banned: frozenset[int],
        *,
        takes_greatest: bool = False,
        weighs_all: bool = False,
    ) -> None:
        pointer = lib.api.llama_sampler_chain_init(lib.api.llama_sampler_chain_default_params())
        self.owner = owner
        self.pointer: Pointer = pointer
        self.banned = banned
        self.takes_greatest = takes_greatest
        self.weighs_all = weighs_all
        self.closed = False
        self._permitted: Mask | None = None
        self._accept = lib.short.llama_sampler_accept
        self._free = weakref.finalize(self, lib.api.llama_sampler_free, pointer)
        self._free.atexit = False

    def accept(self, token: int) -> None:
        """See `base.Sampler`."""
        if not self.closed:
            self._accept(self.pointer, token)

    def permitted(self, masks: Masks) -> Mask | None:
        """Which tokens are not banned; None for all."""
        if self._permitted is None and self.banned:
            self._permitted = masks.permitted(self.banned)
        return self._permitted

    def close(self) -> None:
        """Free the chain. Idempotent."""
        self.closed = True
        self._free()


class SamplerFactory:
    """Makes the chains of one loaded model and frees what is left of them. The engine's thread."""

    def __init__(self, lib: Library, vocab: SamplingVocab) -> None:
        self._lib = lib
        self._vocab = vocab
        self._open: weakref.WeakSet[LlamaSampler] = weakref.WeakSet()
        self._dry = _DryPrototypes(lib.api, vocab.pointer)

    def new(self, params: SamplingParams, history: TokenIds) -> LlamaSampler:
        """A chain for `params` that has seen `history`. Raises InvalidRequestError."""
        api, vocab = self._lib.api, self._vocab
        biases = _biases(vocab, params)
        banned = frozenset(token for token, bias in biases.items() if bias == _NEVER)
        if len(banned) >= vocab.n_tokens:
            raise InvalidRequestError("logit_bias", f"<{len(banned)} bans>", "bans every token; leave one")
        reach = _reach(vocab, params)
        greatest = params.temperature < _COLDEST and not reach and len(banned) == len(biases)
        weighs = params.typical_p < 1 or params.mirostat > 0
        sampler = LlamaSampler(self, self._lib, banned, takes_greatest=greatest, weighs_all=weighs)
        self._open.add(sampler)
        for link in _links(api, vocab, self._dry, params, biases):
            api.llama_sampler_chain_add(sampler.pointer, link)
        self._accept(sampler, history, reach)
        return sampler

    def _accept(self, sampler: LlamaSampler, history: TokenIds, reach: int) -> None:
        accept = self._lib.short.llama_sampler_accept
        for token in history[-reach:].tolist() if reach else ():
            accept(sampler.pointer, token)

    def close(self) -> None:
        """Free every chain that is still open."""
        for sampler in list(self._open):
            sampler.close()
        self._dry.close()


class _DryPrototypes:
    """DRY looks through the whole vocabulary for each sequence breaker, which takes milliseconds: once, then clones."""

    def __init__(self, api: Any, vocab: Pointer) -> None:
        self._api = api
        self._vocab = vocab
        self._made: dict[tuple[object, ...], Pointer] = {}

    def clone(self, params: SamplingParams, last_n: int) -> Pointer:
        shape = (params.dry_multiplier, params.dry_base, params.dry_allowed_length, last_n)
        key = (*shape, params.dry_sequence_breakers)
        if key not in self._made:
            if len(self._made) >= _DRY_PROTOTYPES:
                self._api.llama_sampler_free(self._made.pop(next(iter(self._made))))
            self._made[key] = self._new(shape, params.dry_sequence_breakers)
        return self._api.llama_sampler_clone(self._made[key])

    def _new(self, shape: tuple[float, float, int, int], breakers: tuple[str, ...]) -> Pointer:
        texts = [text.encode() for text in breakers]
        return self._api.llama_sampler_init_dry(self._vocab, *shape, (ctypes.c_char_p * len(texts))(*texts), len(texts))

    def close(self) -> None:
        while self._made:
            self._api.llama_sampler_free(self._made.popitem()[1])


def _links(
    api: Any, vocab: SamplingVocab, dry: _DryPrototypes, params: SamplingParams, biases: dict[int, float]
) -> Iterator[Pointer]:
    if biases:
        pairs = (api.llama_logit_bias * len(biases))(*biases.items())
        yield api.llama_sampler_init_logit_bias(vocab.n_tokens, len(biases), pairs)
    yield from _repetition(api, vocab, dry, params)
    seed = secrets.randbelow(2**32 - 1) if params.seed is None else params.seed
    if params.temperature < _COLDEST:
        yield api.llama_sampler_init_greedy()
    elif params.mirostat:
        yield api.llama_sampler_init_temp(params.temperature)
        yield _mirostat(api, vocab, params, seed)
    else:
        yield from _truncation(api, params, seed)
        yield api.llama_sampler_init_temp_ext(*_temperature(params))
        yield api.llama_sampler_init_dist(seed)


def _repetition(api: Any, vocab: SamplingVocab, dry: _DryPrototypes, params: SamplingParams) -> Iterator[Pointer]:
    if last_n := _penalty_reach(vocab, params):
        repeat = max(_SMALLEST_PENALTY, params.repeat_penalty)
        penalties = (repeat, params.frequency_penalty, params.presence_penalty)
        yield api.llama_sampler_init_penalties(vocab.n_tokens, last_n, *penalties)
    if last_n := _dry_reach(vocab, params):
        yield dry.clone(params, last_n)


def _truncation(api: Any, params: SamplingParams, seed: int) -> Iterator[Pointer]:
    if params.top_n_sigma > 0:
        yield api.llama_sampler_init_top_n_sigma(params.top_n_sigma)
    if params.top_k > 0:
        yield api.llama_sampler_init_top_k(params.top_k)
    if params.typical_p < 1:
        yield api.llama_sampler_init_typical(params.typical_p, 1)
    if params.top_p < 1:
        yield api.llama_sampler_init_top_p(params.top_p, 1)
    if params.min_p > 0:
        yield api.llama_sampler_init_min_p(params.min_p, 1)
    if params.xtc_probability > 0 and params.xtc_threshold <= 0.5:
        yield api.llama_sampler_init_xtc(params.xtc_probability, params.xtc_threshold, 1, seed)


def _mirostat(api: Any, vocab: SamplingVocab, params: SamplingParams, seed: int) -> Pointer:
    tau, eta = params.mirostat_tau, params.mirostat_eta
    if params.mirostat == 1:
        return api.llama_sampler_init_mirostat(vocab.n_tokens, seed, tau, eta, _MIROSTAT_CANDIDATES)
    return api.llama_sampler_init_mirostat_v2(seed, tau, eta)


def _temperature(params: SamplingParams) -> tuple[float, float, float]:
    """Middle, half width and exponent of the dynamic temperature; its lower end stays above zero."""
    low = max(_COLDEST, params.temperature - params.dynatemp_range)
    high = params.temperature + params.dynatemp_range
    return (low + high) / 2, (high - low) / 2, params.dynatemp_exponent


def _biases(vocab: SamplingVocab, params: SamplingParams) -> dict[int, float]:
    """The bias of each token, -inf for a ban; bans win."""
    biases: dict[int, float] = {}
    for token, bias in params.logit_bias:
        if not 0 <= token < vocab.n_tokens:
            raise InvalidRequestError("logit_bias", token, f"no token id; the model has 0 … {vocab.n_tokens - 1}")
        biases[token] = biases.get(token, 0.0) + bias
    for token, bias in biases.items():
        if bias > _LARGEST_BIAS:
            raise InvalidRequestError("logit_bias", bias, f"larger than {_LARGEST_BIAS:g}; 100 decides already")
        if bias < -_LARGEST_BIAS:
            biases[token] = _NEVER
    banned = vocab.suppressed | vocab.end_tokens if params.ignore_eos else vocab.suppressed
    return biases | dict.fromkeys(banned, _NEVER)


def _reach(vocab: SamplingVocab, params: SamplingParams) -> int:
    """How many of the latest tokens the chain looks back at."""
    return max(_penalty_reach(vocab, params), _dry_reach(vocab, params))


def _penalty_reach(vocab: SamplingVocab, params: SamplingParams) -> int:
    if params.repeat_penalty == 1 and not params.frequency_penalty and not params.presence_penalty:
        return 0
    return _last_n(params.repeat_last_n, vocab.n_ctx)


def _dry_reach(vocab: SamplingVocab, params: SamplingParams) -> int:
    return _last_n(params.dry_penalty_last_n, vocab.n_ctx) if params.dry_multiplier else 0


def _last_n(value: int, n_ctx: int) -> int:
    return n_ctx if value < 0 else min(value, n_ctx)
