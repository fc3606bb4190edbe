"""The tokens of a model, on a vocab-only handle that any thread may use and that outlives the weights."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from llama_worker._engine.base import TokenIds
from llama_worker._engine.library import Library, Pointer, library
from llama_worker._engine.log import collected_log, error_lines
from llama_worker._errors import InvalidRequestError, ModelLoadError

# Some pre-tokenizers are a std::regex, which recurses once per matched character: a run of 24,000 to
# 48,000 letters without a space overflows a stack of 8 MiB and kills the process. Runs are cut here.
_LONGEST_RUN: Final = 4096
_RUNS: Final = re.compile(r"\S+|\s+")
_MAX_BYTES: Final = 64 << 20
_SHORT_BYTES: Final = 256  # tokenized within about 0.1 ms: not worth letting go of the GIL


class LlamaVocabulary:
    """Implements `base.Vocabulary`. Opening it takes some 0.1 s; every call after that is thread-safe.

    The native handle is freed with the last reference.
    """

    def __init__(self, path: Path) -> None:
        lib = library()
        model = _open(lib, path)
        self._free = weakref.finalize(self, lib.api.llama_model_free, model)
        self._free.atexit = False  # another thread may be tokenizing when the interpreter ends
        self._lib = lib
        self._vocab: Pointer = lib.api.llama_model_get_vocab(model)
        kind = _require_tokens(lib, self._vocab, path)
        self._is_bpe = kind == lib.api.LLAMA_VOCAB_TYPE_BPE
        self.n_tokens: int = lib.api.llama_vocab_n_tokens(self._vocab)
        self.pieces: Sequence[bytes] = _pieces(lib, self._vocab, self.n_tokens)
        if kind == lib.api.LLAMA_VOCAB_TYPE_SPM:
            _require_bytes(lib, self._vocab, self.n_tokens, path)
        is_end = lib.short.llama_vocab_is_eog
        self.end_tokens = frozenset(token for token in range(self.n_tokens) if is_end(self._vocab, token))
        self.control_texts: Sequence[str] = _control_texts(lib, self._vocab, self.n_tokens)
        self._control_ids = _control_ids(lib, self._vocab, self.n_tokens)
        self._newline = self._tokenize(b"\n", False, False)
        self._adds_space = self.pieces[self._tokenize(b"a", False, False)[0]].startswith(b" ")
        self.bos_text = self._text_of(lib.api.llama_vocab_bos(self._vocab))
        self.eos_text = self._text_of(lib.api.llama_vocab_eos(self._vocab))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool, after: int | None = None) -> TokenIds:
        """See `base.Vocabulary`. Runs of more than 4096 characters without a space are cut for BPE models."""
        data = _encoded(text)
        if self._adds_space and after is not None and after not in self._control_ids:
            return self._continuation(data, parse_special)
        if not self._is_bpe or len(text) <= _LONGEST_RUN:
            return self._tokenize(data, add_special, parse_special)
        cuts = self._cuts(text)
        if not cuts:
            return self._tokenize(data, add_special, parse_special)
        return self._tokenize_parts(text, cuts, add_special, parse_special)

    def _continuation(self, data: bytes, parse_special: bool) -> TokenIds:
        """SentencePiece puts a space before each text; behind a newline that space is not ours to have."""
        ids, lead = self._tokenize(b"\n" + data, False, parse_special), len(self._newline)
        return ids[lead:] if np.array_equal(ids[:lead], self._newline) else self._tokenize(data, False, parse_special)

    def _tokenize(self, data: bytes, add_special: bool, parse_special: bool) -> TokenIds:
        functions = self._lib.short if len(data) <= _SHORT_BYTES else self._lib.api
        buffer = np.empty(len(data) + 8, np.int32)
        while True:
            pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            n = functions.llama_tokenize(self._vocab, data, len(data), pointer, len(buffer), add_special, parse_special)
            if n >= 0:
                return buffer[:n].copy()
            buffer = np.empty(-n, np.int32)

    def _tokenize_parts(self, text: str, cuts: list[int], add_special: bool, parse_special: bool) -> TokenIds:
        bounds = [0, *cuts, len(text)]
        parts = [self._tokenize(text[a:b].encode(), False, parse_special) for a, b in itertools.pairwise(bounds)]
        if add_special:
            api, vocab = self._lib.api, self._vocab
            if api.llama_vocab_get_add_bos(vocab):
                parts.insert(0, np.array([api.llama_vocab_bos(vocab)], np.int32))
            if api.llama_vocab_get_add_eos(vocab):
                parts.append(np.array([api.llama_vocab_eos(vocab)], np.int32))
        return np.concatenate(parts)

    def _cuts(self, text: str) -> list[int]:
        """Where to cut so that no run is longer than _LONGEST_RUN; never inside a control token's text."""
        cuts = [cut for start, end in _long_runs(text) for cut in range(start + _LONGEST_RUN, end, _LONGEST_RUN)]
        if not cuts or not self.control_texts:
            return cuts
        controls = re.compile("|".join(re.escape(control) for control in self.control_texts))
        return [_moved_before(controls, text, cut, len(self.control_texts[0])) for cut in cuts]

    def _text_of(self, token: int) -> str:
        return self.pieces[token].decode("utf-8", "replace") if 0 <= token < self.n_tokens else ""


def _open(lib: Library, path: Path) -> Pointer:
    params = lib.api.llama_model_default_params()
    params.vocab_only = True
    with collected_log() as lines:
        model = lib.api.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ModelLoadError(f"the vocabulary of {path.name} could not be loaded: {error_lines(lines)}")
    return model


def _require_tokens(lib: Library, vocab: Pointer, path: Path) -> int:
    kind: int = lib.api.llama_vocab_type(vocab)
    if kind == lib.api.LLAMA_VOCAB_TYPE_NONE or lib.api.llama_vocab_n_tokens(vocab) < 1:
        raise ModelLoadError(f"{path.name} has no vocabulary (tokenizer.ggml.model); it cannot turn text into tokens")
    return kind


def _require_bytes(lib: Library, vocab: Pointer, n_tokens: int, path: Path) -> None:
    """What no token covers is spelled in bytes, and llama.cpp ends the process at one that has no token."""
    texts = {lib.short.llama_vocab_get_text(vocab, token) for token in range(n_tokens)}
    missing = [byte for byte in range(256) if not texts & {b"<0x%02X>" % byte, bytes([byte])}]
    if missing:
        raise ModelLoadError(f"{path.name} has no token for {len(missing)} of the 256 bytes; convert the model again")


def _pieces(lib: Library, vocab: Pointer, n_tokens: int) -> list[bytes]:
    buffer = ctypes.create_string_buffer(512)
    return [_piece(lib, vocab, token, buffer) for token in range(n_tokens)]


def _piece(lib: Library, vocab: Pointer, token: int, buffer: ctypes.Array[ctypes.c_char]) -> bytes:
    n: int = lib.short.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, True)
    if n < 0:
        return _piece(lib, vocab, token, ctypes.create_string_buffer(-n))
    return ctypes.string_at(buffer, n)


def _control_texts(lib: Library, vocab: Pointer, n_tokens: int) -> list[str]:
    ids = _control_ids(lib, vocab, n_tokens)
    texts = {(lib.short.llama_vocab_get_text(vocab, token) or b"").decode("utf-8", "replace") for token in ids}
    return sorted(texts - {""}, key=lambda text: (-len(text), text))


def _control_ids(lib: Library, vocab: Pointer, n_tokens: int) -> frozenset[int]:
    # Not the user-defined ones: llama.cpp parses them always (some are single letters), and templates look for them.
    special: Any = lib.api.LLAMA_TOKEN_ATTR_CONTROL | lib.api.LLAMA_TOKEN_ATTR_UNKNOWN
    get_attr = lib.short.llama_vocab_get_attr
    return frozenset(token for token in range(n_tokens) if get_attr(vocab, token) & special)


def _encoded(text: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as exc:
        reason = f"the character at {exc.start} of {len(text)} is half a surrogate pair, which is no valid Unicode"
        raise InvalidRequestError("text", f"<str, {len(text)} characters>", reason) from None
    if len(data) > _MAX_BYTES:
        raise InvalidRequestError("text", f"<{len(data)} bytes>", f"longer than {_MAX_BYTES} bytes; split it")
    return data


def _long_runs(text: str) -> Iterator[tuple[int, int]]:
    for run in _RUNS.finditer(text):
        if run.end() - run.start() > _LONGEST_RUN:
            yield run.span()


def _moved_before(controls: re.Pattern[str], text: str, cut: int, longest: int) -> int:
    """`cut`, or the start of the control text that it would divide."""
    for match in controls.finditer(text, max(0, cut - longest), min(len(text), cut + longest)):
        if match.start() < cut < match.end():
            return match.start()
    return cut
