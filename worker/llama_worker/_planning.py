"""Planning a reply: what it may be, how it is read, and what is checked at its end.

    request, format, rendered prompt -> grammar -> constraint -> Guide, opening tokens, parser, checks

All that costs milliseconds (compiling a grammar, its first mask) is done here, on the caller's thread.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import string
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from llama_worker._chat.format import ChatFormat, TextSyntax
from llama_worker._chat.parser import OutputParser
from llama_worker._constraint.grammar import callable_tools, grammar_of
from llama_worker._constraint.rules import Grammar
from llama_worker._engine.base import Vocabulary
from llama_worker._errors import InvalidRequestError, RequestError, UnsupportedFeatureError
from llama_worker._events import InvalidToolCall
from llama_worker._guarding import texts_in
from llama_worker._guide import Guide
from llama_worker._reply import CallCheck, Parser
from llama_worker._requests import GenerationRequest, ResponseFormat, ToolCall

if TYPE_CHECKING:
    from llama_worker._constraint.compiler import ConstraintCompiler
    from llama_worker._constraint.matcher import Constraint
    from llama_worker._constraint.validation import Checks

PLAIN: Final = ChatFormat(digest="", origin="generic")
"""Of a raw prompt: text, and nothing else."""

_ID_LETTERS: Final = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyPlan:
    """What of a GenerationJob is about its reply; see there."""

    opening: tuple[int, ...] = ()
    guide: Guide | None = None
    parser: Parser | None = None
    check_call: CallCheck | None = None
    check_text: Callable[[str], str | None] | None = None


@dataclass(frozen=True, slots=True)
class _Beginning:
    """A reply of which nothing is said yet: see `_guide.Progress`."""

    in_reasoning: bool
    n_reasoning: int = 0
    is_whole: bool = True


class LazyCompiler:
    """The ConstraintCompiler of one vocabulary, imported and made when something is to be constrained. Any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._compiler: ConstraintCompiler | None = None

    def constraint(self, grammar: Grammar) -> Constraint:
        """See ConstraintCompiler.constraint."""
        with self._lock:
            if self._compiler is None:
                from llama_worker._constraint.compiler import ConstraintCompiler

                self._compiler = ConstraintCompiler(self._vocabulary)
        return self._compiler.constraint(grammar)

    def warm(self, format: ChatFormat) -> None:
        """Make it now. A vocabulary that cannot be constrained is left for the request that needs it."""
        wanted = ResponseFormat(type="choice", choices=("yes", "no"))
        grammar = grammar_of(GenerationRequest(prompt="", response_format=wanted), format, in_reasoning=False)
        if grammar is not None:
            with contextlib.suppress(RequestError):
                self.constraint(grammar)


def check_request(request: GenerationRequest, format: ChatFormat) -> None:
    """Raises RequestError for what this model, or a raw prompt, cannot be asked for."""
    if request.messages is None:
        for field in ("tools", "enable_thinking", "reasoning_budget", "template_variables"):
            value = getattr(request, field)
            if value not in ((), None, {}):
                raise InvalidRequestError(field, f"<{type(value).__name__}>", "a raw prompt has none; give messages")
    if request.tools and format.calls is None:
        raise UnsupportedFeatureError("tools", "this model's chat template cannot be given any")
    if request.enable_thinking and format.reasoning is None and format.thinking_switch is None:
        raise UnsupportedFeatureError(
            "enable_thinking",
            "this model's chat template knows no thoughts; leave it None, or open a model that thinks",
        )


def plan_reply(
    request: GenerationRequest,
    format: ChatFormat,
    rendered: str | None,
    vocabulary: Vocabulary,
    compiler: LazyCompiler,
    *,
    room: int,
) -> ReplyPlan:
    """How the reply to `request`, rendered as `rendered`, comes about; it may have `room` tokens.

    Blocks for milliseconds. Raises RequestError.
    """
    in_reasoning = rendered is not None and begins_in_thought(rendered, format, request)
    grammar = grammar_of(request, format, in_reasoning=in_reasoning)
    parser = _parser(request, format, in_reasoning)
    budget = _budget(request, format)
    if grammar is None and budget is None:
        return ReplyPlan(parser=parser)
    if grammar is not None and request.params.ignore_eos:
        raise InvalidRequestError("ignore_eos", True, "tools and response_format say when a reply ends; leave it out")
    constraint = None if grammar is None else compiler.constraint(grammar)
    closing = () if budget is None or format.reasoning is None else tokens_of(format.reasoning.close, vocabulary)
    guide = Guide(constraint, budget=budget, closing=closing, skips=request.params.logprobs is None)
    return ReplyPlan(
        opening=_opening(guide, in_reasoning, closing, room),
        guide=guide,
        parser=parser,
        check_call=_call_check(constraint),
        check_text=_text_check(constraint),
    )


def begins_in_thought(rendered: str, format: ChatFormat, request: GenerationRequest) -> bool:
    """Whether the prompt, `request` rendered, ends with the tag that opens a thought.

    The template must have written it, and not a message or another text of the caller's, which may be all that
    stands at the end.
    """
    tag = format.reasoning.open.strip() if format.reasoning is not None else ""
    end = rendered.rstrip()
    if not tag or not end.endswith(tag):
        return False
    texts = itertools.chain.from_iterable(map(texts_in, (request.messages, request.tools, request.template_variables)))
    if not any(text.rstrip().endswith(tag) for text in texts):
        return True
    # What opens a reply is nearly always control text, and the guard's marks tell that of a message from it.
    turn = format.turn_open.strip()
    return bool(turn) and end.removesuffix(tag).rstrip().endswith(turn)


def tokens_of(tag: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    """`tag` in the midst of a text: SentencePiece puts no space before it there."""
    before = vocabulary.tokenize("a", add_special=False, parse_special=False)
    after = int(before[-1]) if len(before) else None
    return tuple(vocabulary.tokenize(tag, add_special=False, parse_special=True, after=after).tolist())


def _parser(request: GenerationRequest, format: ChatFormat, in_reasoning: bool) -> OutputParser | None:
    tools = callable_tools(request)
    if not tools and format.reasoning is None and format.text == TextSyntax():
        return None
    return OutputParser(
        format,
        tools,
        calls=bool(tools),
        in_reasoning=in_reasoning,
        new_id=new_id,
        answers=request.response_format is not None,
        thinks=request.enable_thinking is not False,
    )


def new_id() -> str:
    """Nine letters and digits: what Mistral's templates demand, and nobody else minds."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


def _budget(request: GenerationRequest, format: ChatFormat) -> int | None:
    """Tokens that may be thought. Thoughts that the template cannot turn off are closed as soon as they begin."""
    if request.messages is None or format.reasoning is None:
        return None
    if request.enable_thinking is False and format.thinking_switch is None:
        return 0
    return request.reasoning_budget


def _opening(guide: Guide, in_reasoning: bool, closing: tuple[int, ...], room: int) -> tuple[int, ...]:
    """What the reply must begin with; then the first mask is computed, the dearest of all."""
    opening: list[int] = []
    # A grammar may force tokens without end.
    while len(opening) <= room and (forced := guide.forced(_Beginning(in_reasoning))):
        opening += forced
        in_reasoning = in_reasoning and tuple(forced) != closing
    if not guide.is_complete:
        guide.prepare()
    return tuple(opening)


def _call_check(constraint: Constraint | None) -> CallCheck | None:
    if constraint is None:
        return None
    return lambda call: _checked(call, constraint.checks)


def _checked(call: ToolCall, checks: Checks) -> ToolCall | InvalidToolCall:
    """Every call, also of what the grammar says all: so no reply that is misread is more than an invalid call."""
    if call.name not in checks.tools:
        wrong = "this tool may not be called"
    elif reason := checks.call(call.name, call.arguments):
        wrong = f"the arguments are not valid: {reason}"
    else:
        return call
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return InvalidToolCall(id=call.id, name=call.name, arguments=arguments, error=wrong)


def _text_check(constraint: Constraint | None) -> Callable[[str], str | None] | None:
    return None if constraint is None or constraint.checks.answer is None else constraint.checks.text
