"""KnownReplies: the token ids of replies that this model produced, found again in the next turn's prompt.

Frameworks send a reply back as text, or as a call in a structure that the template writes out again.
Tokenizing that anew often gives other ids than the ones that were sampled (measured: 1 in 8 greedy replies,
6 in 8 at temperature 1.2), and from there on the prefix cache misses. So a prompt that begins, letter by
letter, with one that was answered before and with its answer, begins with their ids. Replies that other adapters
gave do not count: they would not be what is in the cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

from llama_worker._identity import BASE, KVIdentity
from llama_worker._tokens import TokenIds

MOST_REPLIES = 1024
MOST_TOKENS = 1 << 21  # 8 MiB of ids, of prompts and replies


class Turn(NamedTuple):
    """A prompt, whose text had `length` characters, and what it was answered with: text and ids.

    `forms` are the ways in which the reply's text may stand in a rendering.
    """

    length: int
    prompt: TokenIds
    ids: TokenIds
    forms: tuple[str, ...]


class KnownReplies:
    """A bounded map (prompt, reply text) -> their ids, oldest out first. Any thread.

    `guarded`: a reply's text as it stands in a prompt where a template was given it as a content.
    """

    def __init__(self, guarded: Callable[[str], str]) -> None:
        self._turns: OrderedDict[tuple[bytes, str, KVIdentity], Turn] = OrderedDict()
        self._guarded = guarded
        self._n_tokens = 0
        self._lock = threading.Lock()

    def remember(self, rendered: str, prompt: TokenIds, text: str, ids: TokenIds, kv: KVIdentity = BASE) -> None:
        """The prompt that was `rendered` so, with the ids `prompt`, was answered with `text`, sampled as `ids`."""
        if not text.strip():
            return
        key = _digest(rendered), text, kv
        turn = Turn(len(rendered), prompt, ids, tuple({text: 0, self._guarded(text): 0}))
        with self._lock:
            self._remove(key)
            self._turns[key] = turn
            self._n_tokens += len(prompt) + len(ids)
            while len(self._turns) > MOST_REPLIES or self._n_tokens > MOST_TOKENS:
                self._remove(next(iter(self._turns)))

    def find(self, rendered: str, kv: KVIdentity = BASE) -> Turn | None:
        """The longest turn that `rendered` begins with, whole, and that was answered by `kv`."""
        with self._lock:
            fitting = [(key, turn) for key, turn in self._turns.items() if key[2] == kv and _continues(rendered, turn)]
            for key, turn in sorted(fitting, key=lambda item: (item[1].length, len(item[1].forms[0])), reverse=True):
                if key[0] == _digest(rendered[: turn.length]):
                    self._turns.move_to_end(key)
                    return turn
        return None

    def _remove(self, key: tuple[bytes, str, KVIdentity]) -> None:
        turn = self._turns.pop(key, None)
        if turn is not None:
            self._n_tokens -= len(turn.prompt) + len(turn.ids)


def _continues(rendered: str, turn: Turn) -> bool:
    """Whether the reply stands where it was given; templates may trim the blanks behind it."""
    return any(rendered.startswith(form.rstrip(), turn.length) for form in turn.forms)


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


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
