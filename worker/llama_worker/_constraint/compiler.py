"""ConstraintCompiler: grammars made ready to mask one vocabulary."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from llama_worker._constraint.answer import beginnings, misread
from llama_worker._constraint.kept import KeptGrammars
from llama_worker._constraint.lark import ControlTexts, grammar_text, json_rule
from llama_worker._constraint.matcher import Constraint, forced_tokens
from llama_worker._constraint.references import nodes
from llama_worker._constraint.rules import Either, Given, Grammar, Node, Row, Schema
from llama_worker._constraint.validation import Checks, Enforced, Validator
from llama_worker._engine.base import Vocabulary
from llama_worker._errors import InvalidRequestError, UnsupportedFeatureError

logger = logging.getLogger("llama_worker")

_SHORT_ESCAPES: Final = 'nrbtf\\"'
_DRAFT_4: Final = "http://json-schema.org/draft-04/schema#"
_WRITABLE: Final = frozenset(bytes([byte]) for byte in (0x0A, *range(0x20, 0x7F)))
_Mode = Literal["exact", "lenient", "loose"]
_MODES: Final[tuple[_Mode, ...]] = ("exact", "lenient", "loose")


def _limits() -> LLParserLimits:
    # About 1 kB a lexer state, 20 ms of fuel to begin with, 15 ms for a mask. Errors must not quote what was sampled.
    return LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A matcher that stays at the beginning, or behind what a reply is forced to begin with. Only copied from."""

    matcher: LLMatcher
    checks: Checks
    ahead: Sequence[int]
    words: NDArray[np.uint32]


class ConstraintCompiler:
    """Compiles for one vocabulary, which it keeps. Any thread may use it.

    What llguidance must know of the vocabulary is gathered at first use (about a second for 150,000 tokens).
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._kept: KeptGrammars[_Compiled] = KeptGrammars()
        self._building = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._controls = ControlTexts({})

    def constraint(self, grammar: Grammar) -> Constraint:
        """A fresh constraint, with its first mask computed. Blocks for milliseconds, and to build the tokenizer.

        Raises InvalidRequestError for a grammar that cannot be enforced, UnsupportedFeatureError for a vocabulary
        that cannot write text.
        """
        compiled = self._kept.get(grammar)
        if compiled is None:
            compiled = self._compiled(grammar)
            self._kept.keep(grammar, compiled)
        return Constraint(
            compiled.matcher.deep_copy(),
            self._vocabulary.n_tokens,
            checks=compiled.checks,
            ahead=compiled.ahead,
            words=compiled.words,
            field=grammar.field,
        )

    def _compiled(self, grammar: Grammar) -> _Compiled:
        tokenizer = self._llguidance_tokenizer()
        modes: dict[str, _Mode] = {name: "lenient" if schema.gaps else "exact" for name, schema in grammar.schemas}
        matcher = self._matcher(tokenizer, grammar, modes)
        if "JSON schema" in matcher.get_error():
            modes = {name: _enforceable(schema) for name, schema in grammar.schemas}
            matcher = self._matcher(tokenizer, grammar, modes)
        if matcher.is_error():
            raise _refused(grammar.field, matcher.get_error())
        self._require_readable(tokenizer, grammar)
        ahead = forced_tokens(matcher)
        words = np.zeros((self._vocabulary.n_tokens + 31) // 32, np.uint32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error() or not words.any():
            raise _refused(grammar.field, matcher.get_error() or "nothing fits it")
        return _Compiled(matcher, _checks(grammar, modes), ahead, words)

    def _matcher(self, tokenizer: LLTokenizer, grammar: Grammar, modes: Mapping[str, _Mode]) -> LLMatcher:
        directives = {name: _directive(schema, modes[name]) for name, schema in grammar.schemas}
        text = grammar_text(grammar, self._controls, directives, regex=_regex, given=_given)
        return LLMatcher(tokenizer, text, log_level=0, limits=_limits())

    def _require_readable(self, tokenizer: LLTokenizer, grammar: Grammar) -> None:
        """Refuse what the caller wrote if its text could begin as a thought or a call does."""
        for given in (given for _, node in grammar.rules for given in _givens(node)):
            alone = LLMatcher(tokenizer, _given(given), limits=_limits())
            for begun in beginnings(given.unless):
                ids = self._vocabulary.tokenize(begun, add_special=False, parse_special=False).tolist()
                if not alone.is_error() and alone.validate_tokens(ids) == len(ids):
                    raise InvalidRequestError(grammar.field, f"<{given.kind}>", misread(begun))

    def _llguidance_tokenizer(self) -> LLTokenizer:
        with self._building:
            if self._tokenizer is None:
                controls = _control_ids(self._vocabulary)
                self._controls = ControlTexts(controls)
                self._tokenizer = _tokenizer(self._vocabulary, controls)
            return self._tokenizer


class _TokenizerWrapper:
    """The vocabulary, as llguidance asks for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, special: frozenset[int]) -> None:
        self.tokens = list(vocabulary.pieces)
        self.eos_token_id = min(vocabulary.end_tokens)
        self.special_token_ids = sorted(special)
        self._vocabulary = vocabulary
        before = vocabulary.tokenize("\n", add_special=False, parse_special=False)
        self._before = int(before[-1]) if len(before) else None

    def __call__(self, text: str) -> list[int]:
        # In the middle of a reply: SentencePiece must not put a space before it.
        ids = self._vocabulary.tokenize(text, add_special=False, parse_special=False, after=self._before)
        return ids.tolist()  # type: ignore[no-any-return]


def _control_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """The id of each control token by its text: the one that the tokenizer makes of it."""
    ids: dict[str, int] = {}
    for text in vocabulary.control_texts:
        found = vocabulary.tokenize(text, add_special=False, parse_special=True)
        if len(found) == 1:
            ids[text] = int(found[0])
    return ids


def _tokenizer(vocabulary: Vocabulary, controls: Mapping[str, int]) -> LLTokenizer:
    missing = _WRITABLE.difference(vocabulary.pieces)
    if missing or not vocabulary.end_tokens:
        why = "no token ends a reply" if not missing else f"{len(missing)} characters of JSON have no token"
        raise UnsupportedFeatureError("constrained output", f"in this model's vocabulary {why}; use a chat model")
    texts = {text.encode() for text in vocabulary.control_texts}
    alike = {token for token, piece in enumerate(vocabulary.pieces) if piece in texts}
    wrapper = _TokenizerWrapper(vocabulary, frozenset(controls.values()) | vocabulary.end_tokens | alike)
    try:
        return LLTokenizer(wrapper, eos_token=sorted(vocabulary.end_tokens))  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as exc:
        raise UnsupportedFeatureError("constrained output", f"this model's vocabulary is of no use: {exc}") from None


def _directive(schema: Schema, mode: _Mode) -> str:
    document = json.loads(schema.loose if mode == "loose" else schema.exact)
    return json_rule(document, lenient=mode != "exact", escapes=_escapes(document))


def _escapes(document: Any) -> str:
    """What may follow a backslash. Where others may stand beside declared properties, no key has a second spelling:
    llguidance tells keys apart by what is written. Control characters that are asked for need one all the same.
    """
    return _SHORT_ESCAPES if _opens(document) and not _asks_for_control(document) else _SHORT_ESCAPES + "u"


def _spells_twice(schema: Schema) -> bool:
    """Whether a declared key can be spelled in another way, and so stand twice."""
    document = json.loads(schema.exact)
    return _opens(document) and _asks_for_control(document)


def _asks_for_control(document: Any) -> bool:
    return "\\u00" in json.dumps(document, ensure_ascii=False)


def _opens(document: Any) -> bool:
    return any(
        node.get("properties") and (node.get("additionalProperties", True) or node.get("patternProperties"))
        for node in nodes(document)
    )


def _enforceable(schema: Schema) -> _Mode:
    """The strictest way in which a schema compiles by itself. Raises InvalidRequestError if there is none."""
    reasons = []
    for mode in _MODES[bool(schema.gaps) :]:
        error = LLMatcher.validate_grammar(f"start: {_directive(schema, mode)}\n", limits=_limits())
        if not error or error.startswith("WARNING"):
            return mode
        reasons.append(error)
        if schema.strict:
            break
    raise _refused(schema.field, reasons[0])


def _refused(field: str, error: str) -> InvalidRequestError:
    reason = error.partition("\n")[0].rpartition("schema: ")[2][:300]
    return InvalidRequestError(field, "<grammar>", f"it cannot be enforced ({reason}); make it simpler")


def _checks(grammar: Grammar, modes: Mapping[str, _Mode]) -> Checks:
    tools: dict[str, Validator] = {}
    answer: Validator | Enforced | None = None
    for check in grammar.checks:
        exact = bool(check.parts) and all(modes[part] == "exact" for part in check.parts)
        # What a call may do is worth a second look, even where the grammar says all of it.
        if check.tool is None and exact and not _spells_twice(check.schema):
            answer = Enforced()
            continue
        validator = _validator(check.schema, exact=exact)
        if check.tool is None:
            answer = validator
        else:
            tools[check.tool] = validator
    for name, schema in grammar.schemas:
        if modes[name] != "exact":
            what = ", ".join(schema.gaps) or "a part of it"
            logger.warning("%s: %s is not enforced while sampling; what was sampled is checked", schema.field, what)
    return Checks(tools, answer)


def _validator(schema: Schema, *, exact: bool) -> Validator:
    """What could be compiled whole may be of the draft in which `exclusiveMinimum` was a switch. Then it is read so."""
    try:
        return Validator(schema.original, schema.field)
    except InvalidRequestError:
        if not exact:
            raise
        older = {**json.loads(schema.original), "$schema": _DRAFT_4}
        return Validator(json.dumps(older, ensure_ascii=False), schema.field)


def _regex(pattern: str) -> str:
    """For `/.../`. Digits and words are ASCII, as JSON schemas have them."""
    return regex_to_lark(pattern, "dw")


def _givens(node: Node) -> Iterator[Given]:
    match node:
        case Given():
            yield node
        case Row(nodes) | Either(nodes):
            for inner in nodes:
                yield from _givens(inner)


def _given(given: Given) -> str:
    if given.kind == "lark":
        return given.source
    try:
        return any_to_lark(given.source)
    except Exception as exc:  # noqa: BLE001 - the converter raises Exception itself, and what its recursion meets
        reason = str(exc).partition("\n")[0].partition(" at line ")[0][:200]
        raise InvalidRequestError(
            "response_format.grammar", "<gbnf>", f"it is no GBNF ({reason or type(exc).__name__})"
        ) from None
