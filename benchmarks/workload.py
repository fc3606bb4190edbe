"""The texts and sizes that every contestant works on. Only the standard library: peers import it too."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TypedDict

WORDS = (
    "river",
    "stone",
    "cloud",
    "winter",
    "summer",
    "engine",
    "model",
    "agent",
    "tool",
    "search",
    "index",
    "vector",
    "table",
    "query",
    "answer",
    "light",
    "dark",
    "green",
    "orange",
    "copper",
    "window",
    "garden",
    "bridge",
    "letter",
    "number",
    "market",
    "school",
    "doctor",
    "signal",
    "morning",
    "ocean",
    "valley",
    "paper",
)


class ChatMessage(TypedDict):
    """One message as llama-server, LangChain and llama-worker all take it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """`streams` prompts of about `prompt_tokens` tokens, `n_tokens` sampled for each.

    The prefill yields the first sampled token, so there are n_tokens - 1 decode steps of one row a stream.
    """

    streams: int
    prompt_words: int
    prompt_tokens: int
    n_tokens: int
    n_ctx: int

    @property
    def n_decodes(self) -> int:
        return self.n_tokens - 1

    def prompts(self) -> list[str]:
        return [story(self.prompt_words, seed=stream) for stream in range(self.streams)]


ONE_STREAM = Generation(streams=1, prompt_words=62, prompt_tokens=64, n_tokens=257, n_ctx=512)
EIGHT_STREAMS = Generation(streams=8, prompt_words=30, prompt_tokens=32, n_tokens=129, n_ctx=2048)
BUSY = Generation(streams=4, prompt_words=14, prompt_tokens=16, n_tokens=65, n_ctx=512)

COPY = Generation(streams=1, prompt_words=0, prompt_tokens=0, n_tokens=257, n_ctx=1024)
COPY_ROUNDS = 3

SCHEMA = Generation(streams=1, prompt_words=62, prompt_tokens=64, n_tokens=193, n_ctx=512)
SCHEMA_ROUNDS = 3
RECORDS = {
    "type": "array",
    "minItems": 40,
    "maxItems": 60,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 12, "maxLength": 60},
            "kind": {"enum": ["harbour", "lighthouse", "ferry", "island"]},
            "depth": {"type": "number"},
            "open": {"type": "boolean"},
            "notes": {"type": "array", "items": {"type": "string", "minLength": 20, "maxLength": 80}, "minItems": 1},
        },
        "required": ["name", "kind", "depth", "open", "notes"],
        "additionalProperties": False,
    },
}
"""A document that is longer than what is sampled of it: nobody comes to its end."""

TURN_TOKENS = 32
SYSTEM_WORDS, USER_WORDS = 500, 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Agents:
    """`agents` sessions of `turns` turns over one system message, which describes `functions` functions.

    `n_ctx`: cells for all. It suffices for who computes the system message once for each agent.
    """

    agents: int
    turns: int
    n_ctx: int
    functions: int = 0

    def system_message(self) -> ChatMessage:
        text = "You are a careful agent. " + story(SYSTEM_WORDS, seed=1000)
        if self.functions:
            text += "\n\nYou may call these functions:\n" + "\n".join(map(function, range(self.functions)))
        return {"role": "system", "content": text}


AGENTS = {
    "4x4": Agents(agents=4, turns=4, n_ctx=8192),
    "8x6": Agents(agents=8, turns=6, n_ctx=16384),
    "tools": Agents(agents=4, turns=4, n_ctx=16384, functions=20),
}
EMBED_TEXTS, EMBED_MIN_WORDS, EMBED_MAX_WORDS = 256, 8, 60
CANCEL_TOKENS, CANCEL_DELAYS = 2000, (0.15, 0.3, 0.45, 0.6, 0.75)


def story(n_words: int, *, seed: int) -> str:
    """Deterministic text of `n_words` words, each about one token of the demo model."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n_words))


def copied() -> str:
    """A record that stands there three times, so that a model goes on with it."""
    return (story(80, seed=11) + ".\n") * 3


def function(number: int) -> str:
    """A function as agents describe them: JSON, three parameters."""
    rng = random.Random(1100 + number)
    name = f"{rng.choice(WORDS)}_{rng.choice(WORDS)}_{number}"
    fields = {
        f"{rng.choice(WORDS)}_{kind}": {"type": kind, "description": story(8, seed=1200 + 10 * number + i)}
        for i, kind in enumerate(("string", "integer", "boolean"))
    }
    parameters = {"type": "object", "properties": fields, "required": list(fields)[:2]}
    described = {"name": name, "description": story(12, seed=1150 + number), "parameters": parameters}
    return json.dumps({"type": "function", "function": described})


def user_message(agent: int, turn: int) -> ChatMessage:
    text = story(USER_WORDS, seed=2000 + 100 * agent + turn)
    return {"role": "user", "content": f"session {agent} step {turn}: {text}"}


def embed_texts() -> list[str]:
    rng = random.Random(3000)
    return [story(rng.randint(EMBED_MIN_WORDS, EMBED_MAX_WORDS), seed=3001 + i) for i in range(EMBED_TEXTS)]


def long_prompt(seed: int) -> str:
    """About CANCEL_TOKENS tokens. Each seed differs from the first word on, so no prefix is ever reused."""
    return story(CANCEL_TOKENS, seed=4000 + seed)
