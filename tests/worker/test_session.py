"""Sessions: what is computed once is asked for, kept, told in counts, and never in anybody's way."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any

import numpy as np
import pytest

from llama_worker import (
    ContextOverflowError,
    DeadlineExceeded,
    Failed,
    Finished,
    GenerationCancelled,
    GenerationError,
    InvalidRequestError,
    LlamaWorker,
    ManifestMismatchError,
    Message,
    Session,
    SessionClosedError,
    SessionFatalError,
    WorkerConfig,
    WorkerDied,
    cancel_scope,
)
from llama_worker._engine.base import DecodeStatus
from llama_worker._prefix_cache import PrefixCache
from llama_worker._scheduler import WORTH_WAITING
from llama_worker.testing import FakeEngine, Fault, Gate, assert_well_formed, fake_loader, fake_worker
from tests.worker.waiting import wait_until

SYSTEM = Message(role="system", content="You are a lighthouse. " * 12)
USER = Message(role="user", content="How tall are you, and since when? " * 4)
MORE = Message(role="user", content="And who built you? " * 6)
REPLY = Message(role="assistant", content="Forty metres.")
TOOL = {"name": "height", "description": "A height.", "parameters": {"type": "object", "properties": {}}}


class Stage:
    """A worker over one or, after reloads, several fake engines."""

    def __init__(self, *replies: str, faults: list[Fault] | None = None, hybrid: bool = False, **config: Any) -> None:
        self.engines: list[FakeEngine] = []
        self.gate = Gate()
        loader = fake_loader(*replies, faults=faults or [], hybrid=hybrid, gate=self.gate, seen=self.engines.append)
        settings = {"n_ctx": 4096, **config}
        self.worker = fake_worker(loader=loader, worker_config=WorkerConfig(queue_size=64), **settings)

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    def rows(self, act: Callable[[], Any]) -> int:
        """How many rows are computed for `act`."""
        before = self.engine.n_rows
        act()
        return self.engine.n_rows - before


@pytest.fixture
def staged() -> Iterator[Callable[..., Stage]]:
    stages: list[Stage] = []

    def build(*args: Any, **kwargs: Any) -> Stage:
        stages.append(Stage(*args, **kwargs))
        return stages[-1]

    yield build
    for stage in stages:
        stage.gate.open()
        stage.worker.close()


@pytest.fixture(params=["plain", "hybrid"])
def stage(request: pytest.FixtureRequest, staged: Callable[..., Stage]) -> Stage:
    return staged(hybrid=request.param == "hybrid")


# --- the prefix


def test_a_prefix_is_computed_once(stage: Stage):
    session = stage.worker.session()
    first = session.ensure_prefix([SYSTEM])
    assert (first.reused, first.prefilled, first.dropped) == (0, first.resident, 0)
    assert stage.engine.n_rows == first.resident > len(SYSTEM.content)
    assert first.available == 4096 - first.resident
    again = session.ensure_prefix([SYSTEM])
    assert (again.reused, again.prefilled, again.dropped) == (first.resident, 0, 0)
    assert again.digest == first.digest
    assert stage.engine.n_rows == first.resident


def test_with_one_message_more_that_message_is_computed(stage: Stage):
    session = stage.worker.session()
    first = session.ensure_prefix([SYSTEM])
    second = session.ensure_prefix([SYSTEM, USER])
    assert (second.reused, second.dropped) == (first.resident, 0)
    assert len(USER.content) < second.prefilled == second.resident - first.resident < len(USER.content) + 20
    assert stage.engine.n_rows == second.resident


def test_a_change_in_the_middle_is_dropped_from_there_on(staged: Callable[..., Stage]):
    stage = staged()
    session = stage.worker.session()
    before = session.ensure_prefix([SYSTEM, USER, REPLY])
    after = session.ensure_prefix([SYSTEM, MORE, REPLY])
    assert after.dropped > len(USER.content)
    assert after.reused == before.resident - after.dropped
    assert after.digest != before.digest
    shorter = session.ensure_prefix([SYSTEM])
    assert shorter.dropped == after.resident - shorter.resident
    assert shorter.prefilled == 0


def test_a_prefix_ends_where_what_follows_is_open(stage: Stage):
    """It is a beginning of every prompt that begins with its messages, whoever speaks next."""
    session = stage.worker.session()
    session.ensure_prefix([SYSTEM, USER])
    for following in (REPLY, MORE):
        view = stage.worker._view()
        whole = view.chat_tokens([SYSTEM, USER, following]).tolist()
        assert whole[: len(session.tokens)] == session.tokens


def test_tools_are_part_of_the_prefix(staged: Callable[..., Stage]):
    stage = staged()
    session = stage.worker.session()
    plain = session.ensure_prefix([SYSTEM])
    with_tools = session.ensure_prefix([SYSTEM], tools=[TOOL])
    assert with_tools.resident > plain.resident
    reply = session.decode(max_tokens=4)
    assert isinstance(assert_well_formed(list(reply)), Finished)


def test_two_sessions_with_one_prefix_have_its_cells_in_common(staged: Callable[..., Stage]):
    stage = staged()
    one, two = stage.worker.session("one"), stage.worker.session("two")
    first = one.ensure_prefix([SYSTEM])
    assert stage.rows(lambda: two.ensure_prefix([SYSTEM])) == 0
    suffixes = one.prefill_suffix([USER]), two.prefill_suffix([MORE])
    metrics = stage.worker.cache_metrics()
    assert metrics.used == sum(status.resident for status in suffixes) - metrics.shared
    assert first.resident <= metrics.shared < first.resident + 20


def test_a_resident_prefix_takes_no_slot(staged: Callable[..., Stage]):
    """Asking for it again must not push out what others hold."""
    stage = staged(n_parallel=2)
    stage.worker.generate([SYSTEM, USER, REPLY, MORE], max_tokens=1)
    stage.worker.generate([Message(role="user", content="something else " * 20)], max_tokens=1)
    held = [stage.engine.held(seq) for seq in (0, 1)]
    assert stage.worker.warm([SYSTEM, USER]).prefilled == 0
    assert [stage.engine.held(seq) for seq in (0, 1)] == held


def test_a_prefix_that_is_being_computed_is_waited_for(staged: Callable[..., Stage]):
    stage = staged(n_ubatch=64)
    stage.gate.shut()
    with ThreadPoolExecutor() as pool:
        statuses = [pool.submit(stage.worker.warm, [SYSTEM, USER]) for _ in range(4)]
        stage.gate.wait_reached()
        stage.gate.open()
        done = [status.result(timeout=30) for status in statuses]
    assert stage.engine.n_rows == sum(status.prefilled for status in done)
    assert stage.engine.n_rows < done[0].resident + 3 * WORTH_WAITING


def test_all_that_follow_a_prefix_begin_at_its_end(stage: Stage):
    """Also where nothing can be cut off, and the first of them has gone on in the slot that held it."""
    status = stage.worker.warm([SYSTEM])
    cached = [stage.worker.generate([SYSTEM, said], max_tokens=4).usage.cached_tokens for said in (USER, MORE, REPLY)]
    assert min(cached) >= status.resident


def test_warm_spares_the_next_request(stage: Stage):
    status = stage.worker.warm([SYSTEM], tools=())
    reply = stage.worker.generate([SYSTEM, USER], max_tokens=1)
    assert reply.usage.cached_tokens == status.resident


# --- suffix and reply


def test_the_reply_is_that_of_a_plain_request(stage: Stage):
    session = stage.worker.session()
    session.ensure_prefix([SYSTEM])
    session.prefill_suffix([USER])
    reply = session.decode(max_tokens=24, temperature=0.0).reply()
    assert reply.usage.cached_tokens == reply.usage.prompt_tokens - 1
    other = Stage(hybrid=False)
    with other.worker as worker:
        assert worker.generate([SYSTEM, USER], max_tokens=24, temperature=0.0).text == reply.text


def test_only_what_is_new_in_a_suffix_is_computed(stage: Stage):
    session = stage.worker.session()
    session.ensure_prefix([SYSTEM])
    first = session.prefill_suffix([USER])
    said = session.decode(max_tokens=8, ignore_eos=True).reply()
    following = [USER, Message(role="assistant", content=said.text), MORE]
    second = session.prefill_suffix(following)
    assert second.reused >= first.resident
    assert second.prefilled <= len(MORE.content) + 40
    assert second.resident == len(session.tokens) - 1, "the last token is for the reply to decode"
    assert second.dropped <= 1


def test_a_suffix_takes_the_place_of_the_former(staged: Callable[..., Stage]):
    stage = staged()
    session = stage.worker.session()
    prefix = session.ensure_prefix([SYSTEM])
    former = session.prefill_suffix([USER])
    status = session.prefill_suffix([MORE])
    assert status.reused >= prefix.resident
    assert status.dropped >= former.resident - prefix.resident - 20
    assert stage.worker.detokenize(session.tokens).count(MORE.content.strip()) == 1
    assert USER.content.strip() not in stage.worker.detokenize(session.tokens)


def test_a_reply_may_follow_a_prefix_at_once(stage: Stage):
    session = stage.worker.session()
    session.ensure_prefix([SYSTEM, USER])
    reply = session.decode(max_tokens=8).reply()
    assert reply.text == stage.worker.generate([SYSTEM, USER], max_tokens=8).text


def test_without_a_prefix_there_is_nothing_to_follow(stage: Stage):
    session = stage.worker.session("empty")
    for call in (lambda: session.prefill_suffix([USER]), session.decode, session.decode_one):
        with pytest.raises(InvalidRequestError, match="ensure_prefix"):
            call()
    with pytest.raises(InvalidRequestError, match="at least"):
        session.ensure_prefix([])


@pytest.mark.parametrize("keyword", ["tools", "messages", "session", "enable_thinking", "template_variables"])
def test_what_the_session_has_said_a_reply_cannot_say_otherwise(stage: Stage, keyword: str):
    session = stage.worker.session()
    session.ensure_prefix([SYSTEM])
    with pytest.raises(InvalidRequestError, match=keyword):
        session.decode(**{keyword: None})


@pytest.mark.parametrize("wrong", [{"name": ""}, {"name": "x" * 257}, {"priority": 9}])
def test_a_session_that_no_request_could_name_is_refused(stage: Stage, wrong: dict[str, Any]):
    with pytest.raises(InvalidRequestError):
        stage.worker.session(**wrong)


def test_one_date_stands_in_all_its_prompts(staged: Callable[..., Stage]):
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    stage = staged(chat_template=template)
    session = stage.worker.session()
    session._calls.today = date(2020, 2, 2)
    session.ensure_prefix([SYSTEM])
    session.prefill_suffix([USER])
    assert stage.worker.detokenize(session.tokens).startswith("2020-02-02")
    assert session.decode(max_tokens=2).reply().usage.cached_tokens == len(session.tokens) - 1


def test_a_template_that_rewrites_the_prefix_is_told(staged: Callable[..., Stage]):
    """Thoughts are dropped as soon as somebody speaks again, for one."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if messages|length < 4 %}first{% endif %}{{ m.content }}{% endfor %}"
    )
    stage = staged(chat_template=template)
    session = stage.worker.session()
    session.ensure_prefix([SYSTEM])
    held = session.tokens
    with pytest.raises(ManifestMismatchError, match="otherwise"):
        session.prefill_suffix([USER, REPLY, MORE])
    assert session.tokens == held
    assert session.prefill_suffix([USER]).reused > 0


# --- limits


def test_what_does_not_fit_is_refused_before_anything_is_computed(staged: Callable[..., Stage]):
    stage = staged(n_ctx=512)
    session = stage.worker.session()
    with pytest.raises(ContextOverflowError):
        session.ensure_prefix([Message(role="system", content="x" * 600)])
    assert session.manifest is None
    held = session.ensure_prefix([SYSTEM])
    rows = stage.engine.n_rows
    with pytest.raises(ContextOverflowError):
        session.prefill_suffix([Message(role="user", content="y" * 300)])
    with pytest.raises(ContextOverflowError):
        session.prefill([1] * 600)
    assert stage.engine.n_rows == rows
    assert session.ensure_prefix([SYSTEM]).reused == held.resident


def test_a_deadline_holds(staged: Callable[..., Stage]):
    stage = staged()
    session = stage.worker.session()
    stage.gate.shut()
    with pytest.raises(DeadlineExceeded):
        session.ensure_prefix([SYSTEM], timeout=0.05)
    stage.gate.open()
    assert session.ensure_prefix([SYSTEM]).resident > 0


@pytest.mark.parametrize(("hybrid", "kept"), [(False, 1280), (True, 1024)])
def test_a_cancel_inside_a_prefill_keeps_what_is_computed(staged: Callable[..., Stage], hybrid: bool, kept: int):
    """Of five chunks; where nothing can be cut off, up to the last checkpoint."""
    stage = staged(hybrid=hybrid, n_ubatch=256, n_batch=256, faults=[Fault("decode", "hang", 6)])
    long = [Message(role="system", content="z" * 2500)]
    session = stage.worker.session()
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            session.ensure_prefix(long)
        except GenerationCancelled as error:
            raised.append(error)

    with cancel_scope() as scope:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(ask,))
        thread.start()
        assert stage.engine.hanging.wait(30)
        scope.cancel()
        thread.join(30)
    assert len(raised) == 1
    assert session.manifest is None
    status = session.ensure_prefix(long)
    assert status.reused >= kept
    assert status.reused + status.prefilled == status.resident
    assert session.decode(max_tokens=8).reply().text == stage.worker.generate(long, max_tokens=8).text


# --- reloads


def test_after_a_reload_to_the_same_model_it_goes_on(stage: Stage):
    session = stage.worker.session()
    session.ensure_prefix([SYSTEM])
    session.prefill_suffix([USER])
    stage.worker.reload(n_parallel=2)
    status = session.prefill_suffix([USER])
    assert (status.reused, status.prefilled) == (0, status.resident)
    assert session.decode(max_tokens=4).reply().usage.cached_tokens == status.resident


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "fake://other"}, "another model"),
        ({"chat_template": "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}"}, "template"),
        ({"type_k": "q8_0", "type_v": "q8_0"}, "q8_0"),
    ],
)
def test_after_a_reload_to_another_one_it_says_so(stage: Stage, changes: dict[str, Any], reason: str):
    session = stage.worker.session()
    before = session.ensure_prefix([SYSTEM])
    stage.worker.reload(**changes)
    for call in (lambda: session.prefill_suffix([USER]), session.decode, lambda: session.prefill([65])):
        with pytest.raises(ManifestMismatchError, match=reason) as raised:
            call()
        assert raised.value.reason
    after = session.ensure_prefix([SYSTEM])
    assert after.dropped == before.resident
    assert after.reused == 0
    assert session.prefill_suffix([USER]).reused == after.resident


def test_a_call_that_waits_through_a_reload_is_prepared_for_the_new_model(staged: Callable[..., Stage]):
    stage = staged(n_parallel=1)
    holding, waiting = stage.worker.session("holding"), stage.worker.session("waiting")
    holding.ensure_prefix([SYSTEM])
    stage.gate.shut()
    with ThreadPoolExecutor() as pool:
        stream = stage.worker.stream("endless", max_tokens=2000, ignore_eos=True)
        stage.gate.wait_reached()
        suffix = pool.submit(holding.prefill_suffix, [USER])
        prefix = pool.submit(waiting.ensure_prefix, [SYSTEM])
        wait_until(lambda: stage.worker.status().queued + stage.worker.status().waiting == 2)
        reload = pool.submit(stage.worker.reload, model="fake://other", when="now")
        stage.gate.open()
        reload.result(30)
        with pytest.raises(ManifestMismatchError):
            suffix.result(30)
        assert prefix.result(30).prefilled > 0
        stream.close()
    assert waiting.manifest is not None
    assert holding.manifest is not None
    assert waiting.manifest.identity.model != holding.manifest.identity.model


# --- adapters


def test_a_prefix_is_of_its_adapters(staged: Callable[..., Stage]):
    """What was computed without them, or with others, is computed again with them."""
    stage = staged(lora_paths={"a": "fake://a", "b": "fake://b"})
    plain, same, scaled, other = (stage.worker.session(loras=loras) for loras in (None, "a", {"a": 0.5}, "b"))
    statuses = [session.ensure_prefix([SYSTEM]) for session in (plain, same, scaled, other)]
    assert [status.reused for status in statuses] == [0, 0, 0, 0]
    assert stage.worker.warm([SYSTEM], loras={"a": 1}).reused == statuses[0].resident
    assert same.manifest is not None
    assert len(same.manifest.identity.loras) == 1
    same.prefill_suffix([USER])
    reply = same.decode(max_tokens=8).reply()
    assert reply.usage.cached_tokens == reply.usage.prompt_tokens - 1
    assert reply.text == stage.worker.generate([SYSTEM, USER], max_tokens=8, loras="a").text
    with pytest.raises(InvalidRequestError, match="loras"):
        same.decode(loras="b")


def test_another_adapter_under_the_same_name_is_told(staged: Callable[..., Stage]):
    stage = staged(lora_paths={"a": "fake://a"})
    session = stage.worker.session(loras="a")
    session.ensure_prefix([SYSTEM])
    stage.worker.add_lora("a", "fake://b")
    with pytest.raises(ManifestMismatchError, match="LoRA"):
        session.prefill_suffix([USER])
    assert session.ensure_prefix([SYSTEM]).reused == 0
    assert session.prefill_suffix([USER]).reused > 0


# --- its end


def test_a_closed_session_does_nothing_more(stage: Stage):
    with stage.worker.session() as session:
        session.ensure_prefix([SYSTEM])
    session.close()
    calls: list[Callable[[], Any]] = [
        lambda: session.ensure_prefix([SYSTEM]),
        lambda: session.prefill_suffix([USER]),
        lambda: session.prefill([65]),
        session.decode,
        session.adecode,
        session.decode_one,
    ]
    for call in calls:
        with pytest.raises(SessionClosedError) as raised:
            call()
        assert not isinstance(raised.value, SessionFatalError)
    assert session.explain().state == "closed"
    assert stage.worker.generate("x", max_tokens=1).text


def test_closing_cancels_what_the_session_waits_for(staged: Callable[..., Stage]):
    stage = staged(faults=[Fault("decode", "hang", 1)])
    session = stage.worker.session()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(session.ensure_prefix, [SYSTEM])
        assert stage.engine.hanging.wait(30)
        session.close()
        with pytest.raises(GenerationCancelled):
            asked.result(30)
    stream = stage.worker.session()
    stream.ensure_prefix([SYSTEM])
    events = stream.decode(max_tokens=3000, ignore_eos=True)
    next(events)
    stream.close()
    last = list(events)[-1]
    assert isinstance(last, Finished)
    assert last.reason == "cancelled"


def test_a_broken_session_keeps_its_first_cause(staged: Callable[..., Stage]):
    stage = staged(faults=[Fault("decode", RuntimeError("the engine broke"), 2)])
    session = stage.worker.session()
    session.ensure_prefix([SYSTEM])
    with pytest.raises(WorkerDied) as first:
        session.prefill_suffix([USER])
    for _ in range(2):
        with pytest.raises(SessionFatalError) as later:
            session.decode()
        assert later.value.__cause__ is first.value
    assert session.explain().state == "broken"
    session.close()
    with pytest.raises(SessionClosedError) as closed:
        session.decode()
    assert not isinstance(closed.value, SessionFatalError)


def test_an_engine_that_fails_one_request_breaks_no_session(staged: Callable[..., Stage]):
    stage = staged(faults=[Fault("decode", DecodeStatus.COMPUTE_FAILED, 1)])
    session = stage.worker.session()
    with pytest.raises(GenerationError):
        session.ensure_prefix([SYSTEM])
    assert session.ensure_prefix([SYSTEM]).prefilled > 0


# --- pins


def fill(worker: LlamaWorker, times: int = 6) -> None:
    """Conversations of others, each nearly as long as all cells."""
    for i in range(times):
        worker.generate(f"{i} " + chr(97 + i) * 700, max_tokens=1)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_pinned_prefix_outlives_what_others_do(staged: Callable[..., Stage], pinned: bool):
    """Cells are short: two prompts of others and the prefix do not fit beside each other."""
    stage = staged(n_ctx=1024, n_kv_cells=1280, n_parallel=3, cache_ram=0)
    session = stage.worker.session()
    first = session.ensure_prefix([SYSTEM])
    if not pinned:
        session._calls.pin.release()
    fill(stage.worker)
    again = session.ensure_prefix([SYSTEM])
    assert again.reused == (first.resident if pinned else 0)


def test_what_follows_a_pinned_prefix_is_no_dearer_than_others(staged: Callable[..., Stage]):
    stage = staged(n_ctx=1024, n_kv_cells=1280, n_parallel=3, cache_ram=0)
    session = stage.worker.session()
    first = session.ensure_prefix([SYSTEM])
    session.prefill_suffix([Message(role="user", content="u" * 400)])
    fill(stage.worker)
    again = session.prefill_suffix([Message(role="user", content="u" * 400)])
    assert first.resident <= again.reused < again.resident - 200


def test_pins_make_nobody_wait(staged: Callable[..., Stage]):
    """Every slot and nearly every cell is pinned, and others are served all the same."""
    stage = staged(n_ctx=1024, n_kv_cells=1024, n_parallel=2, cache_ram=0)
    sessions = [stage.worker.session(f"{i}") for i in range(2)]
    for i, session in enumerate(sessions):
        session.ensure_prefix([Message(role="system", content=chr(97 + i) * 450)])
    fill(stage.worker, 3)
    assert [session.ensure_prefix([SYSTEM]).resident > 0 for session in sessions] == [True, True]


def test_with_a_ram_tier_a_pinned_prefix_is_saved_before_it_goes(staged: Callable[..., Stage]):
    stage = staged(n_ctx=1024, n_kv_cells=1024, n_parallel=1, cache_ram=16)
    session = stage.worker.session()
    first = session.ensure_prefix([SYSTEM])
    fill(stage.worker, 2)
    assert stage.rows(lambda: session.ensure_prefix([SYSTEM])) == 0
    assert stage.worker.cache_metrics().saved_hits == 1
    assert session.ensure_prefix([SYSTEM]).reused == first.resident


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_a_session_that_is_gone_pins_nothing(staged: Callable[..., Stage], how: str):
    stage = staged(n_ctx=1024, n_kv_cells=1280, n_parallel=3, cache_ram=0)
    session: Session | None = stage.worker.session()
    assert session is not None
    session.ensure_prefix([SYSTEM])
    if how == "closed":
        session.close()
    session = None
    gc.collect()
    fill(stage.worker)
    assert stage.worker.warm([SYSTEM]).reused == 0


# --- which slot


def test_of_equal_slots_a_session_finds_its_own():
    """Three hold the same beginning and little else; asked by nobody they know, it is the first."""
    prompt = np.arange(100, dtype=np.int32)
    for asking, found in (("one", 0), ("two", 1), ("three", 2), ("four", 0), (None, 0)):
        books = PrefixCache(n_seq=3, n_cells=1024, can_trim=True, can_share=True)
        slots = []
        for i, name in enumerate(("one", "two", "three")):
            loan = books.lend(np.append(prompt, 900 + i), name)
            books.extend(loan.slot, np.append(prompt, 900 + i)[loan.reused :])
            slots.append(loan.slot)
        for slot in slots:
            books.give_back(slot)
        assert books.lend(prompt, asking).slot is slots[found]
        books.check()


def test_a_busy_slot_is_not_waited_for():
    prompt = np.arange(100, dtype=np.int32)
    books = PrefixCache(n_seq=2, n_cells=1024, can_trim=True, can_share=True)
    first = books.lend(prompt, "mine")
    books.extend(first.slot, prompt)
    again = books.lend(prompt, "mine")
    assert again.slot is not first.slot
    assert again.reused == 99


# --- tokens


def test_ids_are_computed_and_followed_one_by_one(stage: Stage):
    text = "Once upon a time there was a lamp"
    whole = stage.worker.generate(text, max_tokens=6, ignore_eos=True, logprobs=0)
    session = stage.worker.session()
    ids = [258, *stage.worker.tokenize(text)]
    status = session.prefill(ids)
    assert status.resident == len(ids) - 1
    said = [session.decode_one(ignore_eos=True) for _ in range(6)]
    assert said == [logprob.token for logprob in whole.logprobs]
    assert session.tokens == [*ids, *said]
    rows = stage.rows(lambda: session.decode_one(ignore_eos=True))
    assert rows == 1


def test_more_ids_go_behind_what_is_held(stage: Stage):
    session = stage.worker.session()
    session.ensure_prefix([SYSTEM])
    status = session.prefill(stage.worker.tokenize("And so"))
    assert (status.reused, status.dropped) == (len(session.tokens) - len("And so"), 0)
    reply = session.decode(max_tokens=3, ignore_eos=True).reply()
    assert reply.usage.prompt_tokens == len(session.tokens)
    assert reply.usage.cached_tokens == len(session.tokens) - 1


def test_where_the_model_ends_there_is_no_token(staged: Callable[..., Stage]):
    stage = staged("\u00e9", "")
    session = stage.worker.session()
    session.prefill(stage.worker.tokenize("Say: "))
    assert session.decode_one() == 0xC3, "half a character is a token"
    held = session.tokens
    assert session.decode_one() is None
    assert session.tokens == held


def test_a_single_id_takes_nobodys_slot(staged: Callable[..., Stage]):
    """There is nothing to compute before it."""
    worker = staged(n_parallel=1, cache_ram=0).worker
    worker.generate([SYSTEM, USER], max_tokens=1)
    before = worker.cache_metrics()
    session = worker.session()
    status = session.prefill([65])
    assert (status.reused, status.prefilled, status.resident) == (0, 0, 0)
    assert session.tokens == [65]
    after = worker.cache_metrics()
    assert (after.kept, after.used) == (before.kept, before.used)
    assert worker.generate([SYSTEM, USER], max_tokens=1).usage.cached_tokens > len(SYSTEM.content)
    assert session.decode_one(ignore_eos=True) is not None


@pytest.mark.parametrize("wrong", [None, 7, "text", [7], [{1: 2}], [None]])
def test_what_are_no_messages_or_tools_is_refused(stage: Stage, wrong: Any):
    session = stage.worker.session()
    with pytest.raises(InvalidRequestError):
        session.ensure_prefix(wrong)
    with pytest.raises(InvalidRequestError):
        session.ensure_prefix([SYSTEM], tools=wrong)
    assert session.explain().state == "open"


@pytest.mark.parametrize("ids", [None, 7, {}, [], "text", [1.5], [-1], [2**40], [True, "a"], [259]])
def test_what_are_no_ids_is_refused(stage: Stage, ids: Any):
    session = stage.worker.session()
    with pytest.raises(InvalidRequestError, match="tokens"):
        session.prefill(ids)
    assert session.prefill([65, 66]).resident == 1


@pytest.mark.parametrize("keyword", ["max_tokens", "stop", "logprobs", "tools"])
def test_one_token_is_asked_for_as_such(stage: Stage, keyword: str):
    session = stage.worker.session()
    session.prefill([65, 66])
    with pytest.raises(InvalidRequestError, match=keyword):
        session.decode_one(**{keyword: 2})


# --- the async twins


def test_the_async_twins_do_the_same(stage: Stage):
    async def run() -> None:
        async with stage.worker.session("a") as session:
            first = await session.aensure_prefix([SYSTEM])
            assert first.prefilled == first.resident
            assert (await stage.worker.awarm([SYSTEM])).reused == first.resident
            suffix = await session.aprefill_suffix([USER])
            assert suffix.reused == first.resident
            reply = await session.adecode(max_tokens=8).reply()
            assert reply.text == stage.worker.generate([SYSTEM, USER], max_tokens=8).text
            assert (await session.aprefill([65])).resident == suffix.resident + 1
            assert await session.adecode_one(ignore_eos=True) == session.tokens[-1]

    asyncio.run(run())


def test_a_cancelled_task_leaves_the_session_as_it_was(staged: Callable[..., Stage]):
    stage = staged(faults=[Fault("decode", "hang", 1)])

    async def run() -> None:
        session = stage.worker.session()
        task = asyncio.ensure_future(session.aensure_prefix([SYSTEM]))
        await asyncio.to_thread(stage.engine.hanging.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert session.manifest is None
        assert (await session.aensure_prefix([SYSTEM])).resident > 0

    asyncio.run(run())


# --- what it says


def test_a_report_says_what_is_held_and_no_text(stage: Stage):
    session = stage.worker.session("reported")
    assert session.explain().segments == ()
    prefix = session.ensure_prefix([SYSTEM, USER])
    status = session.prefill_suffix([REPLY, MORE])
    report = session.explain()
    assert [(segment.role, segment.stable) for segment in report.segments] == [
        ("system", True),
        ("user", True),
        ("assistant", False),
        ("user", False),
    ]
    assert (report.tokens, report.resident, report.prefix) == (status.resident + 1, status.resident, prefix.resident)
    assert report.available == report.n_ctx - report.tokens
    assert report.reused == status.reused
    assert report.prefilled == prefix.prefilled + status.prefilled
    for shown in (str(report), repr(report), repr(session), repr(session.manifest)):
        assert not any(text in shown for text in ("lighthouse", "tall", "metres", "built"))


def test_metrics_count_prefills_as_their_usage_says(stage: Stage):
    session = stage.worker.session()
    statuses = [session.ensure_prefix([SYSTEM]), session.ensure_prefix([SYSTEM]), session.prefill_suffix([USER])]
    metrics, cache = stage.worker.metrics(), stage.worker.cache_metrics()
    asked, reused = sum(s.reused + s.prefilled for s in statuses), sum(s.reused for s in statuses)
    assert (metrics.prompt_tokens, metrics.cached_tokens) == (asked, reused)
    assert (cache.prompt_tokens, cache.reused_tokens) == (asked, reused)


def test_a_failed_stream_is_a_streams_matter(staged: Callable[..., Stage]):
    stage = staged(faults=[Fault("decode", RuntimeError("the engine broke"), 2)])
    session = stage.worker.session()
    session.ensure_prefix([SYSTEM])
    last = list(session.decode(max_tokens=4))[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, WorkerDied)
