"""ByteTokenizer: the vocabulary of the fake model, and the template of its chats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llama_worker._engine.base import TokenIds
from llama_worker._errors import InvalidRequestError

IM_START, IM_END, BOS = 256, 257, 258
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = {"<|im_start|>": IM_START, "<|im_end|>": IM_END, "<s>": BOS}


class ByteTokenizer:
    """A Vocabulary in which every byte is a token, beside <|im_start|>, <|im_end|> and <s>."""

    n_tokens = 259
    pieces: Sequence[bytes] = tuple([bytes([b]) for b in range(256)] + [text.encode() for text in _SPECIAL])
    end_tokens = frozenset({IM_END})
    control_texts: Sequence[str] = tuple(sorted(_SPECIAL, key=len, reverse=True))
    bos_text = "<s>"
    eos_text = "<|im_end|>"

    def __init__(self) -> None:
        self.n_calls = 0

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool, after: int | None = None) -> TokenIds:
        """See Vocabulary.tokenize."""
        self.n_calls += 1
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidRequestError("text", text, f"it is no valid Unicode: {exc.reason}") from None
        ids: list[int] = [BOS] if add_special else []
        for part in _split_special(text) if parse_special else [text]:
            ids += [_SPECIAL[part]] if parse_special and part in _SPECIAL else list(part.encode())
        return np.array(ids, np.int32)


def _split_special(text: str) -> list[str]:
    parts = [text]
    for special in _SPECIAL:
        parts = [piece for part in parts for piece in _cut(part, special)]
    return [part for part in parts if part]


def _cut(text: str, special: str) -> list[str]:
    if text in _SPECIAL:
        return [text]
    pieces = text.split(special)
    return [x for piece in pieces for x in (special, piece)][1:]
