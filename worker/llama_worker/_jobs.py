"""Jobs: requests that were prepared for one loaded model, as tokens that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_worker._guide import Guide
from llama_worker._identity import BASE, KVIdentity
from llama_worker._pins import Pin
from llama_worker._reply import CallCheck, Parser
from llama_worker._requests import EmbedRequest, GenerationRequest
from llama_worker._tokens import TokenIds

if TYPE_CHECKING:
    from llama_worker._view import ModelView


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerationJob:
    """A generation, prepared for the model of `epoch`, named `model`: its prompt, and how many tokens may follow.

    `rendered` is the prompt's text as the chat template wrote it; None for raw prompts. `boundaries`, in order, are
    numbers of its first tokens that other prompts are likely to begin with too. `kv`: the adapters that it is
    computed with. `opening` are the tokens that the reply must begin with. `guide` and `parser` are for one reply,
    and used up by it; None where anything may come, and where it can be nothing but text. `check_call` and
    `check_text` hold a complete call and a complete text against what could not be enforced; `check_text` returns
    what is wrong, or None.

    `max_tokens` 0: the prompt is to be computed, and nothing said. `again` prepares it for another model; None:
    as `request` says. The first `n_pinned` tokens of the prompt are kept rather than others while `pin` holds.
    """

    request: GenerationRequest
    epoch: int
    model: str
    prompt: TokenIds
    max_tokens: int
    rendered: str | None = None
    boundaries: tuple[int, ...] = ()
    kv: KVIdentity = BASE
    opening: tuple[int, ...] = ()
    guide: Guide | None = None
    parser: Parser | None = None
    check_call: CallCheck | None = None
    check_text: Callable[[str], str | None] | None = None
    again: Callable[[ModelView], GenerationJob] | None = None
    pin: Pin | None = None
    n_pinned: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedJob:
    """Texts to embed, prepared for the model of `epoch`."""

    request: EmbedRequest
    epoch: int
    texts: tuple[TokenIds, ...]
