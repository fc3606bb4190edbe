"""One step of generating: admit, decode, sample, emit; and what to do when a decode does not succeed.

    rc 1   the KV cache is full: evict, halve the batch, preempt, start over, and only then fail one
    rc 2   aborted: keep what was computed, decode again what was not
    else   fail the requests of this batch; the worker serves on

After any rc but 0 no logits are read: llama.cpp aborts the process over a row that has none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial

from llama_worker._draft import DraftModel
from llama_worker._engine.base import AbortFlag, DecodeStatus, Span
from llama_worker._engine_calls import Abandoned
from llama_worker._errors import ContextOverflowError, GenerationError, LlamaWorkerError, took_too_long
from llama_worker._events import FinishReason, TokenLogprob
from llama_worker._generation import Generation
from llama_worker._guide import Guide
from llama_worker._kv_ops import apply, rewind, rewind_lost, seat, take_checkpoints
from llama_worker._logprobs import logprob_of
from llama_worker._loras import names_of
from llama_worker._scheduler import Batch
from llama_worker._service import Loaded, Service
from llama_worker._tokens import common_prefix

logger = logging.getLogger("llama_worker")

_LOOK = 0.1  # seconds between two looks at the clock while nothing but the disk is busy


def generate(service: Service, loaded: Loaded, *, newcomers: bool = True) -> None:
    """One decode for everyone who runs, and what is sampled from it."""
    scheduler = loaded.scheduler
    if scheduler.waiting:
        _spare(service, loaded)
    for generation, ops in scheduler.admit(newcomers=newcomers) if scheduler.waiting else ():
        seat(loaded, generation, ops)
        service.meter.begun(generation.command.record, generation.command.submitted, service.clock())
        _start(loaded, generation)
    for generation in scheduler.prefilled:
        _end_prefill(loaded, generation)
    if scheduler.is_short_of_cells:
        running = len(scheduler.running)
        apply(loaded, scheduler.make_room())
        service.meter.preemptions += running - len(scheduler.running)
    if loaded.draft is not None:
        _guess(service, loaded, loaded.draft)
    batch = scheduler.plan()
    if batch is None:
        if scheduler.is_held_up and not loaded.embeds:
            _await_disk(service, loaded)
        _fail_stuck(loaded)
        return
    batch = _decode(service, loaded, batch)
    if batch is not None:
        _sample(loaded, scheduler.commit(batch))
        if batch.n_drafts:
            _sample_drafted(service, loaded, batch)
        take_checkpoints(loaded, batch)


def _spare(service: Service, loaded: Loaded) -> None:
    """Answer those at once whose prompts are computed, and who want no more."""
    for generation in loaded.scheduler.spare():
        service.meter.begun(generation.command.record, generation.command.submitted, service.clock())
        _end_prefill(loaded, generation)


def _end_prefill(loaded: Loaded, generation: Generation) -> None:
    generation.finish("length")
    loaded.retire(generation)


def _await_disk(service: Service, loaded: Loaded) -> None:
    """Sleep until what somebody waits for was read, or anything else happens."""
    for generation in loaded.scheduler.waiting:
        generation.cancel.arm(service.channel.nudge)
    service.channel.wait(_LOOK)


def _start(loaded: Loaded, generation: Generation) -> None:
    """Give a newcomer its sampler. A preempted generation has one already, with its history."""
    if generation.sampler is not None or generation.is_prefill:
        return
    job = generation.command.job
    try:
        generation.sampler = loaded.engine.new_sampler(job.request.params, job.prompt)
        if job.opening and generation.guide is not None:
            _go_on(loaded, generation, generation.guide, job.opening)
    except LlamaWorkerError as exc:
        _fail(loaded, generation, exc)


def _fail(loaded: Loaded, generation: Generation, error: LlamaWorkerError) -> None:
    generation.fail(error)
    loaded.retire(generation)


def _fail_stuck(loaded: Loaded) -> None:
    """Somebody runs but no row fits: with one generation left there is nobody to make room for it."""
    for generation in list(loaded.scheduler.running):
        n_ctx = loaded.engine.limits.n_ctx
        generation.fail(ContextOverflowError(stage="decode", resident=generation.n_resident, additional=1, n_ctx=n_ctx))
        loaded.retire(generation)


def _guess(service: Service, loaded: Loaded, draft: DraftModel) -> None:
    """Have the draft model guess for those for whom that is thought to pay. It fails nobody: then it is let go."""
    scheduler, calls = loaded.scheduler, service.calls
    parts, n = scheduler.to_guess(draft)
    if not parts:
        return
    texts = [(generation.slot.seq, generation.tokens.view) for generation in parts if generation.slot is not None]

    def next_call() -> None:
        calls.end()
        calls.begin(service.clock())

    abort = draft.engine.abort_flag
    abort.clear()
    for generation in parts:
        generation.cancel.arm(abort.raise_)
    calls.begin(service.clock())
    failure: Exception | None = None
    try:
        scheduler.guessed(parts, draft.guess(texts, n, scheduler.pace.rows(), next_call), draft.token_ms)
    except Abandoned:
        raise
    except Exception as exc:  # noqa: BLE001  whatever it is: nobody's reply depends on a guess
        failure = exc
    finally:
        for generation in parts:
            generation.cancel.disarm()
        calls.end()
    if calls.overdue is not None:
        failure = took_too_long(calls.overdue)
    if failure is not None:
        logger.warning("the draft model guesses no more: %s: %s", type(failure).__name__, failure)
        loaded.draft = None
        draft.close()


def _decode(service: Service, loaded: Loaded, batch: Batch) -> Batch | None:
    """Decode `batch`, or the part of it that fits. Returns what was decoded; None when nothing was."""
    while True:
        status = _decode_armed(service, loaded, batch)
        if status is DecodeStatus.OK:
            return batch
        if status is DecodeStatus.KV_FULL:
            smaller = _relieve(service, loaded, batch)
            if smaller is None:
                return None
            service.meter.kv_recoveries += 1
            batch = smaller
            continue
        if status is DecodeStatus.ABORTED:
            service.n_aborts += 1
            _resync(loaded, batch)
            if service.calls.overdue is not None:
                _fail_overdue(loaded, batch, service.calls.overdue)
        else:
            _fail_batch(loaded, batch, status)
        return None


def _decode_armed(service: Service, loaded: Loaded, batch: Batch) -> DecodeStatus:
    """Decode with the abort flag within reach of whoever cancels one of the batch's requests.

    A model that cannot be trimmed loses every sequence of an aborted batch, and a recurrent or hybrid one, when there
    are several in it, every sequence that there is. So there it takes all of the batch.
    """
    engine, parts = loaded.engine, batch.parts
    flag = engine.abort_flag
    abort = flag.raise_ if engine.limits.can_trim else partial(_raise_if_all_cancelled, flag, parts)
    flag.clear()
    for generation in parts:
        generation.cancel.arm(abort)
    started = service.clock()
    service.calls.begin(started)
    try:
        if engine.use_loras(batch.kv):
            service.loras.switched(names_of(batch.kv, loaded.view.loras))
        status = engine.decode(batch.spans)
    finally:
        for generation in parts:
            generation.cancel.disarm()
        service.calls.end()
    if status is DecodeStatus.OK:
        ended = service.clock()
        loaded.scheduler.observe(batch, (ended - started) * 1000)
        service.meter.decoded(batch, started, ended)
    else:
        service.meter.not_decoded(status.name.lower())
    return status


def _raise_if_all_cancelled(flag: AbortFlag, parts: Iterable[Generation]) -> None:
    if all(generation.cancel.is_set for generation in parts):
        flag.raise_()


def _relieve(service: Service, loaded: Loaded, batch: Batch) -> Batch | None:
    """The engine has no room for `batch` although the books said so.

    Then without drafts; then evict, halve, preempt, start over, fail.
    """
    scheduler = loaded.scheduler
    if batch.n_drafts:
        return scheduler.plan(batch.n_rows - batch.n_drafts)
    if freeing := scheduler.cache.evict(batch.n_rows):
        apply(loaded, freeing)
        return batch
    if batch.n_rows > 1:
        return scheduler.plan(batch.n_rows // 2)
    if freeing := scheduler.preempt():
        service.meter.preemptions += 1
        apply(loaded, freeing)
        return scheduler.plan(1)
    if (op := scheduler.start_over()) is not None:
        apply(loaded, [op])
        return scheduler.plan()
    _fail_stuck(loaded)
    return None


def _resync(loaded: Loaded, batch: Batch) -> None:
    """After an abort: keep what is computed, but no row whose logits were never read."""
    for span, generation in zip(batch.spans, batch.parts, strict=True):
        last = span.start + len(span.tokens) - int(span.output)
        keep = min(loaded.engine.seq_end(span.seq), last)
        # A state that cannot be cut back is corrupt after an abort, whatever length it claims.
        lost = keep < span.start or not loaded.engine.limits.can_trim
        if lost or not loaded.engine.seq_trim(span.seq, keep):
            keep = rewind(loaded, generation)
        loaded.scheduler.resync(generation, span, keep)
    rewind_lost(loaded)


def _fail_overdue(loaded: Loaded, batch: Batch, limit: float) -> None:
    """The watchdog ended this decode. To try it again would take as long again; who was cancelled hears of that."""
    logger.error("a step of %d rows of %d sequences took longer than %g s", batch.n_rows, len(batch.parts), limit)
    for generation in batch.parts:
        if not generation.cancel.is_set:
            generation.fail(took_too_long(limit))
            loaded.retire(generation)


def _fail_batch(loaded: Loaded, batch: Batch, status: DecodeStatus) -> None:
    logger.error("llama_decode returned %d for %d rows of %d sequences", status, batch.n_rows, len(batch.parts))
    for generation in batch.parts:
        assert generation.slot is not None
        generation.fail(GenerationError(f"llama_decode returned {int(status)} ({status.name.lower()})"))
        apply(loaded, [loaded.scheduler.cache.forget(generation.slot)])
        loaded.retire(generation)
    rewind_lost(loaded)


def _sample(loaded: Loaded, outputs: Iterable[tuple[int, Generation]]) -> None:
    """Choose every row's token, then say them all: a chain reads so much that it leaves cold caches behind."""
    for generation, token, logprob in [chosen for row, g in outputs if (chosen := _choose(loaded, row, g))]:
        _say(loaded, generation, token, logprob)


def _sample_drafted(service: Service, loaded: Loaded, batch: Batch) -> None:
    """Sample the spans that end in drafts, and take back the drafts that were not said."""
    row = 0
    for span, generation in zip(batch.spans, batch.parts, strict=True):
        if span.output > 1:
            service.meter.drafted(span.output - 1)
            _sample_span(service, loaded, row, span, generation)
        row += len(span.tokens)


def _sample_span(service: Service, loaded: Loaded, row: int, span: Span, generation: Generation) -> None:
    """Sample row after row, as long as what was said so far is what was decoded.

    A row says what follows the tokens up to it. So the next one counts only if all said tokens, the sampled and the
    forced ones, stand in front of it; whatever is behind them in the slot is of another text.
    """
    slot = generation.slot
    assert slot is not None
    right, said = 1, span.tokens[:1]
    while right == len(said) and (chosen := _choose(loaded, row + right - 1, generation)) is not None:
        if right > 1:
            service.meter.accepted(generation.command.record)  # before anybody can read an answer
        _say(loaded, *chosen)
        said = generation.tokens.part(span.start, generation.tokens.n)
        right = common_prefix(said, span.tokens)
        if generation.slot is None:
            break
    # Who goes on has something left to decode.
    right = min(right, len(said) - (generation.slot is not None))
    apply(loaded, loaded.scheduler.take_back(slot, span.start + right))


def _choose(loaded: Loaded, row: int, generation: Generation) -> tuple[Generation, int, TokenLogprob | None] | None:
    """The token that follows row `row`; None for who is cancelled (answered at the next step) or failed."""
    if generation.cancel.is_set:
        return None
    try:
        return _next_token(loaded, row, generation)
    except LlamaWorkerError as exc:
        _fail(loaded, generation, exc)
        return None


def _next_token(loaded: Loaded, row: int, generation: Generation) -> tuple[Generation, int, TokenLogprob | None]:
    engine, guide = loaded.engine, generation.guide
    assert generation.sampler is not None
    mask = None if guide is None else guide.mask()
    wanted = generation.command.job.request.params.logprobs
    if wanted is None:
        return generation, engine.sample(row, generation.sampler, mask), None
    logits = engine.logits(row).copy()  # samplers and masks work in place
    token = engine.sample(row, generation.sampler, mask)
    return generation, token, logprob_of(logits, token, wanted, loaded.view.vocabulary.pieces)


def _say(loaded: Loaded, generation: Generation, token: int, logprob: TokenLogprob | None) -> None:
    if token in loaded.view.vocabulary.end_tokens:
        _finish(loaded, generation, "stop")
        return
    generation.take(token, logprob)
    if generation.guide is not None and not generation.reply.stopped:
        _say_guided(loaded, generation, generation.guide, token)
    elif (reason := generation.end_reason()) is not None:
        _finish(loaded, generation, reason)


def _say_guided(loaded: Loaded, generation: Generation, guide: Guide, token: int) -> None:
    """`token` was said; now what must follow it."""
    try:
        guide.accept(token)
        _go_on(loaded, generation, guide, guide.forced(generation.reply))
    except LlamaWorkerError as exc:
        _fail(loaded, generation, exc)


def _go_on(loaded: Loaded, generation: Generation, guide: Guide, forced: Sequence[int]) -> None:
    """Say all that must come, up to where there is a choice again. The next step decodes it as one chunk."""
    while forced:
        room = generation.room
        if _say_forced(loaded, generation, forced[:room]):
            _finish(loaded, generation, "stop")
            return
        if len(forced) > room:
            _finish(loaded, generation, "length")
            return
        forced = guide.forced(generation.reply)
    if guide.is_complete:
        _finish(loaded, generation, "stop")
    elif not generation.room:
        _finish(loaded, generation, "length")


def _say_forced(loaded: Loaded, generation: Generation, tokens: Sequence[int]) -> bool:
    """Say `tokens`, which nobody sampled. Whether they end the reply."""
    sampler = generation.sampler
    assert sampler is not None
    for token in tokens:
        if token in loaded.view.vocabulary.end_tokens:
            return True
        sampler.accept(token)
        generation.take(token, None)
        if generation.reply.stopped:
            return True
    return False


def _finish(loaded: Loaded, generation: Generation, reason: FinishReason) -> None:
    generation.flush()
    job = generation.command.job
    if job.rendered is not None:
        # Known before it is announced: the next turn may be prepared the moment the reply is read.
        ids = generation.sampled.copy()
        text = generation.reply.text if generation.reply.is_text_alone else loaded.view.detokenize(ids.tolist())
        loaded.view.replies.remember(job.rendered, job.prompt, text, ids, job.kv)
    if generation.reply.invalid_tool_calls:
        # Agents go on as if nothing had been called.
        logger.warning(
            "%d of a reply's calls are none: see invalid_tool_calls", len(generation.reply.invalid_tool_calls)
        )
    generation.finish(reason)
    loaded.retire(generation)
