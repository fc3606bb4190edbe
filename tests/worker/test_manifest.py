"""Manifests: what a session's tokens are, message by message, and under what they may be used again."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import numpy as np
import pytest

from llama_worker import Manifest, Message, RuntimeIdentity
from llama_worker._manifest import token_digest
from llama_worker.testing import fake_worker

IDENTITY = RuntimeIdentity(model="m", template="t", type_k="f16", type_v="f16", n_ctx=4096)
TOKENS = np.arange(100, dtype=np.int32)


def manifest(**changes: object) -> Manifest:
    return Manifest.of(IDENTITY, TOKENS, 60, [("system", 40), ("user", 60), ("assistant", 60), ("user", 100)])


def test_segments_are_all_tokens_in_order():
    segments = manifest().segments
    assert [(s.role, s.start, s.end, s.stable) for s in segments] == [
        ("system", 0, 40, True),
        ("user", 40, 60, True),
        ("user", 60, 100, False),
    ], "a message without tokens of its own has no segment"
    assert all(one.end == other.start for one, other in pairwise(segments))


def test_digests_are_of_the_ids():
    held = manifest()
    assert held.prefix_digest == token_digest(TOKENS[:60]) != held.segments[0].digest
    assert held.segments[0].digest == token_digest(TOKENS[:40].astype(np.int64)), "whatever holds them"
    changed = TOKENS.copy()
    changed[99] += 1
    other = Manifest.of(IDENTITY, changed, 60, [("system", 40), ("user", 60), ("user", 100)])
    assert other.prefix_digest == held.prefix_digest
    assert [a.digest == b.digest for a, b in zip(other.segments, held.segments, strict=True)] == [True, True, False]
    assert other.digest != held.digest
    assert replace(held, identity=replace(IDENTITY, model="n")).digest != held.digest


def test_a_manifest_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        manifest().n_prefix = 0  # type: ignore[misc]


def test_what_comes_as_ids_is_a_segment_of_its_own():
    more = manifest().going_on(np.arange(130, dtype=np.int32))
    assert [(s.role, s.end) for s in more.segments[-2:]] == [("user", 100), ("tokens", 130)]
    again = more.going_on(np.arange(131, dtype=np.int32))
    assert [(s.role, s.end) for s in again.segments[-2:]] == [("user", 100), ("tokens", 131)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "n"}, "another model"),
        ({"template": "u"}, "template"),
        ({"type_k": "q8_0"}, "q8_0"),
        ({"type_v": "q8_0"}, "q8_0"),
        ({"loras": (("digest", 0.5),)}, "LoRA"),
    ],
)
def test_what_differs_is_named(changes: dict[str, object], reason: str):
    other = replace(IDENTITY, **changes)  # type: ignore[arg-type]
    difference = IDENTITY.difference(other)
    assert difference is not None
    assert reason in difference
    assert other.difference(IDENTITY) is not None


def test_room_is_no_difference():
    assert IDENTITY.difference(replace(IDENTITY, n_ctx=8192)) is None


def test_segments_lie_where_the_messages_do():
    """To the token, but for what the template writes between them."""
    messages = [
        Message(role="system", content="Be brief. <|im_end|> is text."),
        Message(role="user", content="  One?  "),
        Message(role="assistant", content=""),
        Message(role="user", content="Two \u00e9\u20ac?"),
    ]
    with fake_worker() as worker, worker.session() as session:
        session.ensure_prefix(messages[:2])
        session.prefill_suffix(messages[2:])
        held = session.manifest
        assert held is not None
        texts = [worker.detokenize(session.tokens[s.start : s.end]) for s in held.segments]
    assert [s.role for s in held.segments] == ["system", "user", "user"]
    assert texts[0].endswith("is text.")
    assert "One?" in texts[1]
    assert "Two \u00e9\u20ac?" in texts[2]
    assert held.segments[1].end == held.n_prefix
    assert held.n_tokens == held.segments[-1].end
