"""Random replies: what a constraint lets be written when every choice is left to chance."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from llama_worker._chat.format import ChatFormat, ReasoningSyntax
from llama_worker._chat.generic import GENERIC_CALLS
from llama_worker._constraint.compiler import ConstraintCompiler
from llama_worker._constraint.grammar import grammar_of
from llama_worker._constraint.matcher import Constraint
from llama_worker._engine.base import TokenIds, Vocabulary
from llama_worker._requests import GenerationRequest, Message, ResponseFormat
from llama_worker.testing import ByteTokenizer
from llama_worker.testing._tokenizer import IM_END

PROOF = bool(os.environ.get("LLAMA_WORKER_PROOF"))
VOCABULARY = ByteTokenizer()
COMPILER = ConstraintCompiler(VOCABULARY)
PLAIN = ChatFormat(digest="plain", origin="generic", calls=GENERIC_CALLS)
THINKING = ChatFormat(
    digest="thinking",
    origin="generic",
    calls=GENERIC_CALLS,
    reasoning=ReasoningSyntax(open="<think>", close="</think>"),
)
_CLOSING = frozenset(b'"}]>\n')


class MarkedVocabulary(ByteTokenizer):
    """Bytes, and each of `controls` as a control token of its own."""

    def __init__(self, controls: Iterable[str]) -> None:
        super().__init__()
        fresh = [text for text in dict.fromkeys(controls) if text not in self.control_texts]
        self.pieces = (*self.pieces, *(text.encode() for text in fresh))
        self.n_tokens = len(self.pieces)
        self.control_texts = tuple(sorted({*self.control_texts, *fresh}, key=len, reverse=True))
        self._ids = {piece.decode(): token for token, piece in enumerate(self.pieces) if token > 255}

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool, after: int | None = None) -> TokenIds:
        ids: list[int] = []
        while text and parse_special:
            found = [(at, -len(mark), mark) for mark in self.control_texts if (at := text.find(mark)) >= 0]
            if not found:
                break
            at, _, mark = min(found)
            ids += [*text[:at].encode(), self._ids[mark]]
            text = text[at + len(mark) :]
        return np.array([*ids, *text.encode()], np.int32)


def request(**asked: object) -> GenerationRequest:
    return GenerationRequest(messages=(Message(role="user", content="?"),), **asked)  # type: ignore[arg-type]


def constraint(request: GenerationRequest, format: ChatFormat = PLAIN, *, in_reasoning: bool = False) -> Constraint:
    grammar = grammar_of(request, format, in_reasoning=in_reasoning)
    assert grammar is not None
    return COMPILER.constraint(grammar)


def json_constraint(schema: object, *, strict: bool | None = None) -> Constraint:
    return constraint(request(response_format=ResponseFormat(type="json_schema", json_schema=schema, strict=strict)))  # type: ignore[arg-type]


def allowed(constraint: Constraint) -> list[int]:
    return np.flatnonzero(np.unpackbits(constraint.mask(), bitorder="little")).tolist()


def may_end(constraint: Constraint) -> bool:
    return constraint.is_complete or IM_END in allowed(constraint)


def accepted(constraint: Constraint, text: str, vocabulary: Vocabulary = VOCABULARY) -> int:
    """How many characters of `text` fit, one token after another; all of them: then the reply may end there too."""
    ids = vocabulary.tokenize(text, add_special=False, parse_special=True).tolist()
    for index, token in enumerate(ids):
        if token not in allowed(constraint):
            return len(b"".join(vocabulary.pieces[seen] for seen in ids[:index]).decode("utf-8", "ignore"))
        constraint.accept(token)
    return len(text) if may_end(constraint) else -1


def fits(constraint: Constraint, text: str, vocabulary: Vocabulary = VOCABULARY) -> bool:
    return accepted(constraint, text, vocabulary) == len(text)


def reply(
    constraint: Constraint,
    seed: int,
    *,
    most: int = 3000,
    pieces: Sequence[bytes] = VOCABULARY.pieces,
    weights: NDArray[np.float64] | None = None,
) -> str | None:
    """A random reply, likelier to come to an end than not; None if it did not within `most` tokens."""
    chance, said = random.Random(seed), list[int]()
    weights = _weights(len(pieces)) if weights is None else weights
    while len(said) < most:
        said += constraint.forced()
        if constraint.is_complete:
            break
        tokens = np.flatnonzero(np.unpackbits(constraint.mask(), bitorder="little"))
        heights = weights[tokens].cumsum()
        token = int(tokens[heights.searchsorted(chance.random() * heights[-1], side="right")])
        constraint.accept(token)
        if token == IM_END:
            break
        said.append(token)
    else:
        return None
    return b"".join(pieces[token] for token in said).decode()


@cache
def _weights(n_tokens: int) -> NDArray[np.float64]:
    """How likely each token is: those that end something, then what is printable."""
    found = np.full(n_tokens, 0.1)
    found[0x20:0x7F] = 1.0
    found[[*_CLOSING, *range(256, n_tokens)]] = 8.0
    return found
