"""KnownReplies: the token ids of replies that this model produced, found again by their text.

Frameworks send a reply back as text with the next turn. Tokenizing it anew often gives other ids than
the ones that were sampled (measured: 1 in 8 greedy replies, 6 in 8 at temperature 1.2), and from there
on the prefix cache misses. So the ids are kept, under the digest of the prompt that they followed, and
stand in for tokenizing that text in that place.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from llama_worker._tokens import TokenIds

MOST_REPLIES = 1024
MOST_TOKENS = 1 << 20  # 4 MiB of ids


class PrefixDigest:
    """A running digest of token ids."""

    __slots__ = ("_hash",)

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16)

    def update(self, tokens: TokenIds) -> None:
        self._hash.update(np.ascontiguousarray(tokens, np.int32).tobytes())

    def copy(self) -> PrefixDigest:
        twin = PrefixDigest()
        twin._hash = self._hash.copy()
        return twin

    def value(self) -> bytes:
        return self._hash.digest()


def digest_of(tokens: TokenIds) -> bytes:
    digest = PrefixDigest()
    digest.update(tokens)
    return digest.value()


class KnownReplies:
    """A bounded map (prefix digest, reply text) -> sampled ids, oldest out first. Any thread."""

    def __init__(self) -> None:
        self._ids: OrderedDict[tuple[bytes, str], TokenIds] = OrderedDict()
        self._texts: Counter[str] = Counter()
        self._n_tokens = 0
        self._lock = threading.Lock()

    def remember(self, prefix: bytes, text: str, ids: TokenIds) -> None:
        """The prompt with digest `prefix` was answered with `text`, sampled as `ids`."""
        if not text:
            return
        with self._lock:
            self._remove((prefix, text))
            self._ids[prefix, text] = ids
            self._texts[text] += 1
            self._n_tokens += len(ids)
            while len(self._ids) > MOST_REPLIES or self._n_tokens > MOST_TOKENS:
                self._remove(next(iter(self._ids)))

    def knows(self, text: str) -> bool:
        """Whether this text was ever a reply, whatever the prompt."""
        return text in self._texts

    def find(self, prefix: bytes, text: str) -> TokenIds | None:
        with self._lock:
            ids = self._ids.get((prefix, text))
            if ids is not None:
                self._ids.move_to_end((prefix, text))
            return ids

    def _remove(self, key: tuple[bytes, str]) -> None:
        ids = self._ids.pop(key, None)
        if ids is None:
            return
        self._n_tokens -= len(ids)
        self._texts[key[1]] -= 1
        if not self._texts[key[1]]:
            del self._texts[key[1]]


def covering(ids: TokenIds, text: str, pieces: Sequence[bytes]) -> tuple[int, int]:
    """How many of `ids` spell a beginning of `text`, and how many characters of it.

    All of both as a rule. Not when a stop string cut a token in two, or the reply ended inside a
    character: then the rest of the text has to be tokenized.
    """
    target = text.encode("utf-8", "surrogatepass")
    end = whole = count = 0
    for index, token in enumerate(ids.tolist()):
        piece = pieces[token]
        if target[end : end + len(piece)] != piece:
            break
        end += len(piece)
        if _is_border(target, end):
            whole, count = end, index + 1
    return count, len(target[:whole].decode("utf-8", "surrogatepass"))


def _is_border(data: bytes, end: int) -> bool:
    return end == len(data) or data[end] & 0xC0 != 0x80
