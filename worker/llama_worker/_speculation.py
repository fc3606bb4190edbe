"""Speculation: guessed tokens that are decoded behind the last one, where that gives more tokens in the same time.

A text that repeats itself, or its prompt, can be guessed: what followed the last three tokens before may follow
again (see `_ngrams`). And a second, small model may guess (see `_draft`). The guesses, called drafts, are rows of the
same decode; each row is sampled as ever, by the reply's own sampler, and when a draft is not what was sampled, it
and all behind it are thrown away. So what is said does not depend on drafts, only when.

What they cost differs by machine: on a GPU 16 rows may take as long as one, on two CPU cores 4 rows take nearly
as long as 4 steps. So nothing is believed, all is measured in the work itself:

    costs        what a step of so many rows takes. What is not known is believed to be free, so that it is tried,
                 twice, and again after a while that doubles each time
    acceptance   of each reply, how far its guesses came true lately, drafted or not, and those of the draft model

and `how_many` takes the number of drafts that gives most tokens a millisecond, which mostly is none. Where not
even perfect guesses would pay, nothing is guessed. A draft model is asked only where what it takes would be paid, too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from llama_worker._config import Speculating
from llama_worker._engine.base import MOST_DRAFTS, EngineLimits, Span
from llama_worker._ngrams import NOTHING, NgramIndex
from llama_worker._tokens import TokenBuffer, TokenIds, common_prefix

if TYPE_CHECKING:
    from llama_worker._generation import Generation

logger = logging.getLogger("llama_worker")

SIZES: Final = (1, 3, 7, 15)
"""So many drafts are tried in one step: with the row before them what kernels like. The last is MOST_DRAFTS."""

FIRST_TRIAL: Final = 7
"""Drafts of the first trial: fewer say little of what more of them cost, for kernels compute rows by eights."""

MARGIN: Final = 1.1
"""Drafts must promise so much more tokens a millisecond than there are without."""

FASTEST: Final = 1.0
"""Milliseconds of a step below which guessing itself takes too much of what it could save."""

LIKELY: Final = 0.2
"""Where drafts need not pay they must still be as likely as this, all but the first of them."""

FIRST_CHANCE: Final = 0.5
_MEMORY: Final = 0.15  # weight of the newest guess in `Drafter.chances`
_RISE: Final = 0.1  # weight of a step that took longer than known; a shorter one counts whole
_TRIALS: Final = 2  # the first step of a new size makes llama.cpp build its graph
_PATIENCE: Final = 256  # steps after which a size is tried again, doubled each time
_MOST_PATIENCE: Final = 1 << 16
_GUESS: Final = 0  # no step has so few rows: in `Costs`, a token of the draft model
_LOOK: Final = 16  # steps between two looks at whether drafts could pay


class Costs:
    """What steps of so many rows took, in milliseconds, up to `most` rows. Hiccups raise them little."""

    __slots__ = ("_due", "_ms", "_seen", "n_steps")

    def __init__(self, most: int) -> None:
        self._ms = [0.0] * (most + 1)
        self._seen = [0] * (most + 1)
        self._due = [0] * (most + 1)
        self.n_steps = 0

    def observe(self, rows: int, milliseconds: float) -> None:
        """A step of `rows` rows, each with an output, took so long."""
        self.n_steps += 1
        seen, known = self._seen[rows], self._ms[rows]
        self._ms[rows] = milliseconds if not seen or milliseconds < known else known + _RISE * (milliseconds - known)
        self._seen[rows] = seen + 1
        self._due[rows] = self.n_steps + min(_PATIENCE << min(seen, 16), _MOST_PATIENCE)

    def known(self, rows: int) -> float | None:
        """What it took, lately or long ago; None when it was not tried often enough."""
        return self._ms[rows] if self._seen[rows] >= _TRIALS else None

    def fresh(self, rows: int) -> float | None:
        """What it took; None when it was not tried often enough, or so long ago that it should be tried again."""
        return self._ms[rows] if self._is_fresh(rows) else None

    def expected(self, rows: int, n: int, base: float) -> float:
        """What `rows` rows will take, where `n` take `base`.

        Between sizes that are known the cost is thought to grow evenly, and beyond a large one as it did up to it.
        Where none is known that says anything, FIRST_TRIAL more rows are thought to be free, so that they are tried.
        """
        known = [size for size in range(n + 1, len(self._ms)) if self._is_fresh(size)]
        above = next((size for size in known if size >= rows), 0)
        below = max((size for size in known if size < rows), default=n)
        if above:
            return self._line(below, above, rows, n, base)
        if below >= n + FIRST_TRIAL:
            return self._line(n, below, rows, n, base)
        return base if rows <= n + FIRST_TRIAL else math.inf

    def _line(self, a: int, b: int, rows: int, n: int, base: float) -> float:
        low, high = base if a == n else self._ms[a], self._ms[b]
        return max(base, low + (high - low) * (rows - a) / (b - a))

    def _is_fresh(self, rows: int) -> bool:
        return self._seen[rows] >= _TRIALS and self.n_steps < self._due[rows]


def how_many(n: int, chances: Sequence[float], base: float, cost: Callable[[int], float]) -> int:
    """How many of `chances`, the greatest first, to add to a step of `n` rows that takes `base`.

    A chance is that of one draft to be kept. Returns the number that gives most tokens for what `cost` says of its
    rows, one of SIZES, or 0 when nothing beats no drafts by MARGIN.
    """
    best, chosen, tokens, taken = MARGIN * n / base, 0, float(n), 0
    for size in SIZES:
        if size > len(chances):
            break
        tokens += sum(chances[taken:size])
        taken = size
        if (rate := tokens / cost(n + size)) > best:
            best, chosen = rate, size
    return chosen


class Luck:
    """How guesses of one kind fare for one reply: `chances[k]` is how often the first k+1 tokens were all right.

    One guess at a time is followed: until it is refuted, or as far as it goes; one that was not drafted as far as a
    first trial would go.
    """

    __slots__ = ("_at", "_drafted", "_guess", "chances")

    def __init__(self) -> None:
        self.chances = [FIRST_CHANCE ** (k + 1) for k in range(MOST_DRAFTS)]
        self._guess: TokenIds = NOTHING
        self._at = 0
        self._drafted = False

    @property
    def n_likely(self) -> int:
        """How many drafts are worth a row where rows cost nothing; at least one."""
        return max(1, sum(chance >= LIKELY for chance in self.chances))

    @property
    def is_following(self) -> bool:
        return bool(len(self._guess))

    def follow(self, guess: TokenIds, at: int, *, drafted: bool) -> None:
        """`guess` is of what comes behind the first `at` tokens."""
        self._guess, self._at, self._drafted = guess, at, drafted

    def look_back(self, tokens: TokenBuffer) -> None:
        """Learn from the guess that is followed, if it is known how far it came true."""
        if not self.is_following:
            return
        came = tokens.part(self._at, tokens.n)
        right = common_prefix(came, self._guess)
        refuted = right < min(len(came), len(self._guess))
        if refuted or (len(came) and self._drafted) or right >= min(len(self._guess), FIRST_TRIAL):
            self._learn(right, refuted=refuted)
            self._guess = NOTHING

    def _learn(self, right: int, *, refuted: bool) -> None:
        for k in range(MOST_DRAFTS if refuted else right):
            self.chances[k] += _MEMORY * ((k < right) - self.chances[k])


class Drafter:
    """What one reply is expected to say, and how far such guesses came true lately.

    `always`: its drafts need not pay. Guesses are what the text says where it repeats itself, or the draft model's,
    whichever came true more often; `luck` is that of those that were proposed last. A repetition that was not drafted
    is followed all the same.
    """

    __slots__ = ("_index", "_most", "_offer", "_offered_at", "_tokens", "always", "luck", "of_model", "of_text")

    def __init__(self, tokens: TokenBuffer, most: int, *, always: bool) -> None:
        self.always = always
        self.of_text, self.of_model = Luck(), Luck()
        self.luck = self.of_text
        self._tokens = tokens
        self._most = most
        self._index: NgramIndex | None = None  # made when first asked
        self._offer: TokenIds = NOTHING
        self._offered_at = 0

    @property
    def chances(self) -> list[float]:
        return self.luck.chances

    @property
    def n_likely(self) -> int:
        return self.luck.n_likely

    def propose(self, most: int) -> TokenIds:
        """At most `most` tokens that may come next. Asked again with nothing new, it answers the same."""
        repeated = self._repeated(most)
        if self._offered_at == self._tokens.n and len(self._offer) and self._prefers_model(repeated):
            self.luck = self.of_model
            return self._offer[:most]
        self.luck = self.of_text
        return repeated

    def asks_model(self, most: int) -> bool:
        """Whether a guess of the draft model would be proposed."""
        return self._prefers_model(self._repeated(most))

    def offer(self, guess: TokenIds) -> None:
        """`guess` is what the draft model says comes next."""
        self._offer, self._offered_at = guess, self._tokens.n

    def drafts(self, guess: TokenIds) -> None:
        """`guess`, proposed just now, is decoded, or the first of it."""
        self.luck.follow(guess, self._tokens.n, drafted=True)

    def _repeated(self, most: int) -> TokenIds:
        self.of_text.look_back(self._tokens)
        self.of_model.look_back(self._tokens)
        if self._index is None:
            self._index = NgramIndex(self._tokens, self._most)
        guess = self._index.propose(most)
        if len(guess) and not self.of_text.is_following:
            self.of_text.follow(guess, self._tokens.n, drafted=False)
        return guess

    def _prefers_model(self, repeated: TokenIds) -> bool:
        return not len(repeated) or self.of_text.chances[0] < self.of_model.chances[0]


class Speculation:
    """Decides for one loaded model who drafts how much. Pure; the worker thread's."""

    def __init__(self, limits: EngineLimits, *, always: bool = False) -> None:
        self._always = always
        self._n_outputs = limits.n_outputs
        self.costs = Costs(limits.n_outputs)
        self._looked: dict[int, tuple[int, float | None]] = {}  # by rows: until which step it holds, and what

    @classmethod
    def of(cls, limits: EngineLimits, how: Speculating) -> Speculation | None:
        """None where there is none: it was not wanted, or drafts could not be taken back."""
        if how == "off" or not limits.generates:
            return None
        if not limits.can_trim:
            if how == "on":
                logger.warning("speculation='on' does nothing: this model cannot take tokens back")
            return None
        return cls(limits, always=how == "on")

    def drafter(self, tokens: TokenBuffer, most: int, wanted: bool | None) -> Drafter | None:
        """For a request that wants it in any case, not at all, or (None) as the model was opened."""
        if wanted is False:
            return None
        return Drafter(tokens, most, always=bool(wanted) or self._always)

    def observe(self, rows: int, milliseconds: float) -> None:
        """A step of `rows` rows, every one with an output, took so long."""
        if rows <= self._n_outputs:
            self.costs.observe(rows, milliseconds)

    def observe_guess(self, milliseconds: float) -> None:
        """The draft model took so long for a token of everybody's."""
        self.costs.observe(_GUESS, milliseconds)

    def to_guess(self, parts: Sequence[Generation], n: int, room: int) -> tuple[list[Generation], int]:
        """Of `parts`, some of `n` who decode, those for whom the draft model should guess, and how many tokens each.

        There is room for so many more rows.
        """
        most = min(room, self._n_outputs - n, MOST_DRAFTS) // max(n, 1)
        base = self._base(n) if most > 0 else None
        asked = [g for g in parts if _asks_model(g, most, hopeful=base is not None)] if most > 0 else []
        lucks = [(g.drafter.of_model, g.drafter.always) for g in asked if g.drafter is not None]
        certain = max((luck.n_likely for luck, always in lucks if always), default=0)
        paid = self._paid([luck for luck, _ in lucks], n, base, most) if base is not None else 0
        count = min(max(certain, paid), most)
        return (asked, count) if count else ([], 0)

    def _paid(self, lucks: Sequence[Luck], n: int, base: float, most: int) -> int:
        """How many guesses for each of `lucks` give most tokens for the time that guessing and decoding them takes."""
        best, chosen, guess_ms = MARGIN * n / base, 0, self.costs.fresh(_GUESS) or 0.0
        for count in [size for size in SIZES if size <= most]:
            tokens = n + sum(sum(luck.chances[:count]) for luck in lucks)
            took = self.costs.expected(n + count * len(lucks), n, base) + count * guess_ms
            if tokens / took > best:
                best, chosen = tokens / took, count
        return chosen

    def extended(self, spans: tuple[Span, ...], parts: Sequence[Generation], room: int) -> tuple[Span, ...]:
        """`spans`, one row for each decoding generation of `parts`, and behind them at most `room` drafts."""
        n = len(spans)
        room = min(room, self._n_outputs - n, MOST_DRAFTS)
        base = self._base(n)
        if room <= 0 or (base is None and not any(g.drafter is not None and g.drafter.always for g in parts)):
            return spans
        drafts = [_drafts(g, room, hopeful=base is not None) for g in parts]
        if not any(map(len, drafts)):
            return spans
        counts = self._counts(parts, drafts, room, base)
        for generation, guess, count in zip(parts, drafts, counts, strict=True):
            if count and generation.drafter is not None:
                generation.drafter.drafts(guess)
        return tuple([_longer(*it) if it[2] else it[0] for it in zip(spans, drafts, counts, strict=True)])

    def _base(self, n: int) -> float | None:
        """What a step of `n` rows takes; None when no draft could pay, were it certain, or that is not known yet."""
        until, base = self._looked.get(n, (0, None))
        if self.costs.n_steps >= until:
            base = self.costs.known(n)
            base = base if base is not None and base >= FASTEST and self._could_pay(n, base) else None
            self._looked[n] = self.costs.n_steps + _LOOK, base
        return base

    def _could_pay(self, n: int, base: float) -> bool:
        most = min(self._n_outputs - n, MOST_DRAFTS)
        return how_many(n, (1.0,) * most, base, lambda rows: self.costs.expected(rows, n, base)) > 0

    def _counts(
        self, parts: Sequence[Generation], drafts: Sequence[TokenIds], room: int, base: float | None
    ) -> list[int]:
        """How many of each generation's drafts to decode."""
        certain = [g.drafter is not None and g.drafter.always for g in parts]
        counts = [0] * len(parts)
        for i in [i for i, sure in enumerate(certain) if sure]:
            drafter = parts[i].drafter
            likely = 1 if drafter is None else drafter.n_likely
            counts[i] = min(len(drafts[i]), room // sum(certain), likely)
        if base is None:
            return counts
        return _best(parts, drafts, counts, room, base, self.costs)


def _best(
    parts: Sequence[Generation],
    drafts: Sequence[TokenIds],
    counts: list[int],
    room: int,
    base: float,
    costs: Costs,
) -> list[int]:
    """`counts`, and of the others' drafts the likeliest ones, as many as pay."""
    chances = [
        (g.drafter.chances[k], i)
        for i, g in enumerate(parts)
        if g.drafter is not None and not g.drafter.always
        for k in range(len(drafts[i]))
    ]
    chances = sorted(chances, key=lambda it: -it[0])[: room - sum(counts)]
    n = len(parts) + sum(counts)
    for _, i in chances[: how_many(n, [p for p, _ in chances], base, lambda rows: costs.expected(rows, n, base))]:
        counts[i] += 1
    return counts


def _drafts(generation: Generation, room: int, *, hopeful: bool) -> TokenIds:
    drafter = generation.drafter
    if drafter is None or not (hopeful or drafter.always):
        return NOTHING
    return drafter.propose(min(room, generation.room - 1))


def _asks_model(generation: Generation, most: int, *, hopeful: bool) -> bool:
    drafter = generation.drafter
    if drafter is None or generation.room < 2 or not (hopeful or drafter.always):
        return False
    return drafter.asks_model(most)


def _longer(span: Span, drafts: TokenIds, n: int) -> Span:
    return Span(span.seq, span.start, np.concatenate((span.tokens, drafts[:n])), 1 + n)
