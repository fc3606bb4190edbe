"""Each way to spare computing, on and off, on each kind of memory: the answers are those of a fresh engine.

The story of `story` makes use of every mechanism that is on, and of none that is off, which is asserted.
The numeric tier: every token of every answer is compared with a cold pass. For the exact one see `test_exactness`,
`test_disk_exactness` and `test_speculation_exact`.

Each mechanism is shown able to fail: alone, with an error of one token in it, which is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests import synth_lora
from tests.worker.probe import Mistake
from tests.worker.scoring import Cold, Score
from tests.worker.story import Mechanisms, Story, is_of_use
from tests.worker.test_checkpoints import CHECKPOINTED, MODELS, Run
from tests.worker.test_lora_engine import MATRICES
from tests.worker.test_speculation_exact import one_too_many

pytestmark = pytest.mark.engine

ROUNDING, ERROR, REGRET = 0.035, 0.05, 0.05

ALL, NONE = Mechanisms(), Mechanisms(*[False] * len(Mechanisms.__slots__))
SINGLY = [replace(ALL, **{name: False}) for name in Mechanisms.__slots__]
COMBINATIONS = [ALL, *SINGLY, NONE]
"""Any two of them are, somewhere, both on, both off, and each on without the other."""


def only(*names: str) -> Mechanisms:
    return replace(NONE, **dict.fromkeys(names, True))


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def told(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Score]]:
    """told(kind, on): the worst score of the story."""
    with ExitStack() as opened:

        def tell(
            kind: str,
            on: Mechanisms,
            mistake: Mistake | None = None,
            spoil: Callable[[Run], None] = lambda run: None,
            path: Path | None = None,
            *,
            forgets: bool = False,
            **size: int,
        ) -> Score:
            fixture, settings = MODELS.get(kind, ("", {}))
            path = path or request.getfixturevalue(fixture)
            adapter = tmp_path / "style.gguf"
            if on.loras:
                synth_lora.lora(adapter, path, matrices=MATRICES.get(fixture, ("attn_v", "ffn_down")))
            cold = Cold(path, [adapter] if on.loras else (), **settings)
            opened.callback(cold.close)
            load = partial(Run, path, mistake, **settings)
            with closing(Story(load, on, tmp_path, adapter, spoil, forgets=forgets)) as story:
                score = story.tell(cold, **size)
            print(f"{kind}, {on}: {score}; {story.used}")
            check_used(story, kind, on)
            return score

        yield tell


def check_used(story: Story, kind: str, on: Mechanisms) -> None:
    """What is on was made use of, and what is off was not."""
    expected = {name: getattr(on, name) and is_of_use(name, kind) for name in Mechanisms.__slots__}
    if kind in CHECKPOINTED:
        expected["sharing"] = on.checkpoints
    assert {name: bool(story.used[name]) for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "on"), [(k, on) for k in MODELS for on in COMBINATIONS if on.matter_to(k) or on == NONE]
)
def test_answers_are_those_of_a_fresh_engine(kind: str, on: Mechanisms, told):
    # A window cannot be cut once it is restored: the disk has to lead 128 tokens beyond what slots have in common.
    score = told(kind, on, **({"n_words": 120} if "window" in kind else {}))
    assert score.difference <= ROUNDING
    assert score.regret <= REGRET


def one_too_far(run: Run) -> None:
    """A cache that takes one token more for common than is."""
    reach = run.cache.reach
    usable, reachable = reach.usable, reach.reachable

    def wrong(slot, prompt):  # type: ignore[no-untyped-def]
        length = usable(slot, prompt)
        return min(length + 1, slot.n, len(prompt) - 1) if length and length < slot.n else length

    if reach.can_trim:
        reach.usable = wrong  # type: ignore[method-assign]
    else:
        reach.reachable = lambda slot, length: reachable(slot, length + 1)  # type: ignore[method-assign]


LATE: dict[str, object] = {"mistake": "shifted after restore"}
MISTAKES: dict[str, dict[str, object]] = {
    "sharing": {"spoil": one_too_far, "late": 1},
    "checkpoints": {"spoil": one_too_far, "late": 1},
    "checkpoints, restored": LATE,
    "ram": LATE,
    "disk": LATE,
    "export": LATE,
    "preemption": {"forgets": True},
    "loras": {"mistake": "late adapters"},
    "speculation": {},
}
"""An error of one token in each mechanism; of drafts, one that was refuted is believed, see `broken`."""


@pytest.fixture
def broken(told: Callable[..., Score], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Score]:
    """broken(kind, name): the worst score of the story with one mechanism, and an error of one token in it."""

    def tell(kind: str, name: str, path: Path | None = None, **size: int) -> Score:
        if name == "speculation":
            monkeypatch.setattr("llama_worker._decoding.common_prefix", one_too_many)
        return told(kind, only(name.partition(",")[0]), path=path, **MISTAKES[name], **size)

    return tell


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in MODELS for name in MISTAKES if is_of_use(name.partition(",")[0], kind)]
)
def test_an_error_of_one_token_in_a_mechanism_is_noticed(kind: str, name: str, broken):
    assert broken(kind, name).difference > ERROR


@pytest.mark.parametrize("mistake", ["shifted span", "other row"])
def test_an_error_of_one_token_is_noticed_with_everything_on(kind: str, mistake: Mistake, told):
    assert told(kind, ALL, mistake).difference > ERROR


SMALL = {"n_words": 65, "n_agents": 4}


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("on", [on for on in COMBINATIONS if on.matter_to("smollm2") or on == NONE], ids=str)
def test_smollm2_answers_as_a_fresh_engine(smollm2_f32: Path, on: Mechanisms, told):
    """Its weights as F32; see `test_stress`. It can be cut back, so it makes no checkpoints."""
    score = told("smollm2", on, path=smollm2_f32, **SMALL)
    assert score.regret <= REGRET


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["sharing", "disk", "export", "preemption", "loras", "speculation"])
def test_an_error_of_one_token_on_smollm2_is_noticed(smollm2_f32: Path, name: str, broken):
    """That of the RAM tier: see `test_disk_exactness`."""
    assert broken("smollm2", name, smollm2_f32, **SMALL, n_turns=2).difference > ERROR
