"""Sessions as bytes: they go on elsewhere where they left off; what is not theirs is refused and changes nothing."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from llama_worker import (
    ContextOverflowError,
    DeadlineExceeded,
    GenerationCancelled,
    InvalidRequestError,
    LlamaWorker,
    ManifestMismatchError,
    Message,
    ModelConfig,
    SessionClosedError,
    StateError,
)
from llama_worker.testing import Gate, fake_loader, fake_worker
from tests.worker.test_checkpoints import MODELS
from tests.worker.test_session import MORE, REPLY, SYSTEM, TOOL, USER
from tests.worker.waiting import wait_until


@pytest.fixture(params=[False, True], ids=["plain", "hybrid"])
def opened(request: pytest.FixtureRequest) -> Iterator[Callable[..., LlamaWorker]]:
    workers: list[LlamaWorker] = []

    def build(**config: Any) -> LlamaWorker:
        workers.append(fake_worker(loader=fake_loader(hybrid=request.param), **{"n_ctx": 4096, **config}))
        return workers[-1]

    yield build
    for worker in workers:
        worker.close()


def exported(worker: LlamaWorker, **session: Any) -> bytes:
    with worker.session(**session) as one:
        one.ensure_prefix([SYSTEM], tools=[TOOL])
        one.prefill_suffix([USER])
        return one.export_state()


def test_it_goes_on_elsewhere_where_it_left_off(opened: Callable[..., LlamaWorker]):
    here, there = opened(), opened()
    session = here.session()
    session.ensure_prefix([SYSTEM], tools=[TOOL])
    held = session.prefill_suffix([USER])
    other = there.session()
    assert other.import_state(session.export_state()) == held.resident
    assert other.tokens == session.tokens
    assert other.manifest == session.manifest
    again = other.prefill_suffix([USER])
    assert (again.reused, again.prefilled, again.dropped) == (held.resident, 0, 0)
    assert other.prefill_suffix([USER, REPLY, MORE]).reused >= held.resident - 20
    session.prefill_suffix([USER, REPLY, MORE])
    replies = [one.decode(max_tokens=12).reply() for one in (session, other)]
    assert replies[0].text == replies[1].text


async def test_so_do_the_async_twins(opened: Callable[..., LlamaWorker]):
    async with opened().session() as session, opened().session() as other:
        status = await session.aensure_prefix([SYSTEM])
        assert await other.aimport_state(await session.aexport_state()) == status.resident
        assert (await other.aensure_prefix([SYSTEM])).prefilled == 0


def test_a_session_of_ids_goes_on_too(opened: Callable[..., LlamaWorker]):
    session, other = opened().session(), opened().session()
    session.prefill(list(range(65, 90)) * 10)
    session.decode_one(ignore_eos=True)
    assert other.import_state(session.export_state()) == len(session.tokens) - 1
    assert [one.decode_one(ignore_eos=True) for one in (session, other)] == [session.tokens[-1]] * 2


def test_what_is_computed_no_more_goes_without_its_kv(opened: Callable[..., LlamaWorker]):
    worker = opened(n_ctx=1024, n_kv_cells=1024, n_parallel=1, cache_ram=0)
    session = worker.session()
    session.ensure_prefix([SYSTEM])
    worker.generate("x" * 900, max_tokens=1)
    other = opened().session()
    assert other.import_state(session.export_state()) == 0
    assert other.tokens == session.tokens
    assert other.ensure_prefix([SYSTEM]).prefilled == len(session.tokens)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "fake://other"}, "another model"),
        ({"chat_template": "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}"}, "template"),
        ({"type_k": "q8_0", "type_v": "q8_0"}, "q8_0"),
    ],
)
def test_another_runtime_is_told_and_nothing_is_changed(
    opened: Callable[..., LlamaWorker], changes: dict[str, Any], reason: str
):
    data = exported(opened())
    session = opened(**changes).session()
    session.ensure_prefix([SYSTEM, REPLY])
    held = session.tokens
    with pytest.raises(ManifestMismatchError, match=reason):
        session.import_state(data)
    assert session.tokens == held


def test_other_adapters_are_told(opened: Callable[..., LlamaWorker]):
    paths = {"a": "fake://a"}
    data = exported(opened(lora_paths=paths), loras="a")
    with pytest.raises(ManifestMismatchError, match="LoRA"):
        opened(lora_paths=paths).session().import_state(data)
    assert opened(lora_paths=paths).session(loras="a").import_state(data) > 0


def test_after_a_reload_to_another_model_there_is_nothing_to_export(opened: Callable[..., LlamaWorker]):
    worker = opened()
    session = worker.session()
    session.ensure_prefix([SYSTEM])
    worker.reload(model="fake://other")
    with pytest.raises(ManifestMismatchError):
        session.export_state()


def test_what_does_not_fit_here_is_refused(opened: Callable[..., LlamaWorker]):
    with pytest.raises(ContextOverflowError):
        opened(n_ctx=256).session().import_state(exported(opened()))


def test_damage_is_found_and_nothing_is_changed(opened: Callable[..., LlamaWorker]):
    data = exported(opened())
    worker = opened()
    session = worker.session()
    status = session.ensure_prefix([SYSTEM])
    rng = random.Random(11)
    damaged = [data[:at] for at in (0, 3, 20, 31, 60, len(data) // 2, len(data) - 1)] + [data + b"x"]
    for _ in range(40):
        at = rng.randrange(len(data))
        damaged.append(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
    for wrong in damaged:
        with pytest.raises(StateError):
            session.import_state(wrong)
    for odd in ("text", None, 7):
        with pytest.raises(InvalidRequestError):
            session.import_state(odd)  # type: ignore[arg-type]
    assert len(session.tokens) == status.resident
    assert session.ensure_prefix([SYSTEM]).prefilled == 0


def rewritten(data: bytes, change: Callable[[dict[str, Any]], bytes | None]) -> bytes:
    """`data` with another description, and a digest that fits it."""
    n_described, n_tokens = struct.unpack_from("<QQ", data, 8)
    described = json.loads(data[24 : 24 + n_described])
    written = change(described) or json.dumps(described).encode()
    whole = data[:8] + struct.pack("<QQ", len(written), n_tokens) + written + data[24 + n_described : -32]
    return whole + blake2b(whole, digest_size=32).digest()


ODD: dict[str, Callable[[dict[str, Any]], bytes | None]] = {
    "endless": lambda d: d.update(n_computed=float("inf")),
    "no number": lambda d: d["manifest"].update(n_prefix=float("nan")),
    "a fraction": lambda d: d.update(n_computed=1.5),
    "negative": lambda d: d["manifest"].update(n_prefix=-5),
    "deep": lambda _: b"[" * 100_000,
    "a list": lambda _: b"[]",
    "no text": lambda _: b"\xff\xfe",
    "segments of other kinds": lambda d: d["manifest"]["segments"][0].update(role=1, stable=1, start="x", end=None),
    "a segment that is elsewhere": lambda d: d["manifest"]["segments"][0].update(start=1),
    "no segments": lambda d: d["manifest"].update(segments=7),
    "room": lambda d: d["manifest"]["identity"].update(n_ctx="lots"),
    "adapters": lambda d: d["manifest"]["identity"].update(loras=[["a", float("inf")]]),
    "more": lambda d: d.update(more=1),
    "a date": lambda d: d.update(today=7),
    "messages": lambda d: d.update(prefix=[7]),
    "nothing": lambda d: d.update(suffix=None),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_contents_are_told_whatever_their_digest_says(opened: Callable[..., LlamaWorker], odd: str):
    session = opened().session()
    with pytest.raises(StateError):
        session.import_state(rewritten(exported(opened()), ODD[odd]))
    assert session.tokens == [], session.explain()


class Busy:
    """A worker with one slot, which a reply has, and a session that waits for it."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.worker = fake_worker(loader=fake_loader(gate=self.gate), n_ctx=4096, n_parallel=1)
        self.session = self.worker.session()
        self.session.ensure_prefix([SYSTEM])
        self.gate.shut()
        self.stream = self.worker.stream("x", max_tokens=500, ignore_eos=True)
        self.gate.wait_reached()

    def end(self) -> None:
        self.gate.open()
        self.worker.close()


@pytest.fixture
def busy() -> Iterator[Busy]:
    stage = Busy()
    yield stage
    stage.end()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_export_that_waits_ends_at_its_timeout(busy: Busy, asynchronous: bool):
    def export() -> bytes:
        session = busy.session
        return asyncio.run(session.aexport_state(timeout=0.05)) if asynchronous else session.export_state(timeout=0.05)

    with pytest.raises(DeadlineExceeded):
        export()
    with pytest.raises(InvalidRequestError, match="timeout"):
        busy.session.export_state(timeout=-1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_export_that_waits_ends_with_its_session(busy: Busy, asynchronous: bool):
    def export() -> bytes:
        return asyncio.run(busy.session.aexport_state()) if asynchronous else busy.session.export_state()

    with ThreadPoolExecutor(1) as pool:
        exporting = pool.submit(export)
        wait_until(lambda: busy.worker._service.transfers or busy.worker._channel.has_controls)
        busy.session.close()
        with pytest.raises(GenerationCancelled):
            exporting.result(60)


def test_a_closed_or_empty_session_exports_nothing(opened: Callable[..., LlamaWorker]):
    session = opened().session()
    with pytest.raises(InvalidRequestError):
        session.export_state()
    session.close()
    for call in (session.export_state, lambda: session.import_state(b"")):
        with pytest.raises(SessionClosedError):
            call()


@pytest.mark.engine
@pytest.mark.parametrize("kind", MODELS)
def test_on_llama_cpp_its_kv_goes_along(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    fixture, settings = MODELS[kind]
    path: Path = request.getfixturevalue(fixture)
    config = ModelConfig(model=str(path), n_ctx=2048, n_threads=1, **settings)  # type: ignore[arg-type]
    long = Message(role="system", content="river stone lamp count garden water light night " * 40)
    asked = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    with LlamaWorker(config) as here, here.session() as session:
        session.ensure_prefix([long])
        status = session.prefill_suffix([MORE])
        data = session.export_state()
        reply = session.decode(**asked).reply()  # type: ignore[arg-type]
    with LlamaWorker(config) as there, there.session() as session:
        assert session.import_state(data) == status.resident
        again = session.decode(**asked).reply()  # type: ignore[arg-type]
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert again.text == reply.text, "the same cells, decoded in the same batches"
