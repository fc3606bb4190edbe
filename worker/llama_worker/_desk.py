"""Desk: where requests are handed in. The callers' side of a worker, from the check to the channel.

Each request gets a flag and a deadline, is prepared with the current ModelView on its caller's thread (for
event loops: on the preparer's), and is put into the channel, in that order.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import TypeAlias, TypeVar

from llama_worker._admission import Admission
from llama_worker._cancel import CancelFlag, CancelScope, new_flag, seconds_left
from llama_worker._commands import Embed, EventSink, Generate
from llama_worker._errors import DeadlineExceeded, WorkerClosed
from llama_worker._jobs import GenerationJob
from llama_worker._preparer import Preparer
from llama_worker._published import Published
from llama_worker._record import Record
from llama_worker._requests import EmbedRequest, GenerationRequest
from llama_worker._view import ModelView

T = TypeVar("T")

Vectors = list[list[float]]
Prepare: TypeAlias = Callable[[ModelView], GenerationJob]


class Desk:
    """Hands in the requests of one worker. Any thread; the async methods on any event loop."""

    def __init__(
        self,
        published: Published,
        admission: Admission,
        preparer: Preparer,
        observe: Callable[[GenerationRequest | EmbedRequest], AbstractContextManager[Record]],
    ) -> None:
        self.published = published
        self._admission = admission
        self._preparer = preparer
        self._observe = observe
        self._everything = CancelScope()
        self._pid = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Whether this process is a fork of the worker's."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raises WorkerClosed in a forked child, which has no thread that would answer."""
        if self.is_inherited:
            raise WorkerClosed("this worker was inherited through fork(), without its thread; open a new one")

    def new_flag(self, timeout: float | None) -> tuple[CancelFlag, float | None]:
        """A flag that `cancel_all` knows, and the earliest deadline in time.monotonic()."""
        self.check_process()
        flag, deadline = new_flag(timeout)
        self._everything.add(flag)
        return flag, deadline

    def would_refuse(self) -> bool:
        """Whether the channel is full and its callers are refused."""
        return self._admission.would_refuse

    def cancel_all(self) -> None:
        self.check_process()
        # A new scope first: who comes from now on is not meant.
        before, self._everything = self._everything, CancelScope()
        before.cancel()

    def view(self) -> ModelView:
        """The current view. Waits for the first load; raises why there is none."""
        self.check_process()
        view = self.published.view()
        assert view is not None
        return view

    async def aview(self) -> ModelView:
        """The async twin of `view`."""
        return await self.aview_until(None, None)

    def submit(
        self,
        request: GenerationRequest,
        sink: EventSink,
        cancel: CancelFlag,
        deadline: float | None,
        prepare: Prepare | None = None,
    ) -> None:
        """Hand in a generation whose events go into `sink`. Blocks while the model loads or the channel is full.

        `prepare` makes another job of it than `request` alone does.
        """
        with self._observe(request) as record:
            job = _prepared(self.view_until(deadline, request.timeout, cancel), request, prepare)
            self._admission.put(Generate(job=job, sink=sink, cancel=cancel, deadline=deadline, record=record))

    async def asubmit(
        self,
        request: GenerationRequest,
        sink: EventSink,
        cancel: CancelFlag,
        deadline: float | None,
        prepare: Prepare | None = None,
    ) -> None:
        """The async twin of `submit`."""
        with self._observe(request) as record:
            job = await self.prepared(lambda view: _prepared(view, request, prepare), deadline, request.timeout, cancel)
            await self._admission.aput(Generate(job=job, sink=sink, cancel=cancel, deadline=deadline, record=record))

    def embed(self, request: EmbedRequest) -> Vectors:
        """Hand in texts and wait for their vectors."""
        cancel, deadline = self.new_flag(request.timeout)
        answer: Future[Vectors] = Future()
        try:
            with self._observe(request) as record:
                job = self.view_until(deadline, request.timeout, cancel).prepare_embedding(request)
                self._admission.put(Embed(job=job, answer=answer, cancel=cancel, deadline=deadline, record=record))
            return _wait(answer, cancel, deadline)
        finally:
            cancel.cancel()

    async def aembed(self, request: EmbedRequest) -> Vectors:
        """The async twin of `embed`."""
        cancel, deadline = self.new_flag(request.timeout)
        answer: Future[Vectors] = Future()
        try:
            with self._observe(request) as record:
                job = await self.prepared(lambda v: v.prepare_embedding(request), deadline, request.timeout, cancel)
                command = Embed(job=job, answer=answer, cancel=cancel, deadline=deadline, record=record)
                await self._admission.aput(command)
            return await _await_until(answer, cancel, deadline)
        finally:
            cancel.cancel()

    async def prepared(
        self,
        prepare: Callable[[ModelView], T],
        deadline: float | None,
        timeout: float | None,
        cancel: CancelFlag | None = None,
    ) -> T:
        """`prepare` with the current view, on the preparer's thread.

        Raises DeadlineExceeded, GenerationCancelled when `cancel` is set during the first load, and why there is
        no model.
        """
        self.check_process()  # a forked child has no preparer's thread
        try:
            if not self.published.first.done():  # the preparer has others to serve, a reload among them
                await self.published.shown(seconds_left(deadline), cancel)
            task = self._preparer.submit(lambda: prepare(self.view_until(deadline, timeout)))
            return await asyncio.wait_for(asyncio.wrap_future(task), seconds_left(deadline))
        except TimeoutError:
            raise DeadlineExceeded(timeout) from None
        except WorkerClosed:
            closed = self.published.why_closed()
        raise closed  # here, where no context replaces its cause

    def view_until(self, deadline: float | None, timeout: float | None, cancel: CancelFlag | None = None) -> ModelView:
        """As `view`. Raises DeadlineExceeded, and GenerationCancelled when `cancel` is set during the first load."""
        view = self.published.view(seconds_left(deadline), cancel)
        if view is None:
            raise DeadlineExceeded(timeout)
        return view

    async def aview_until(
        self, deadline: float | None, timeout: float | None, cancel: CancelFlag | None = None
    ) -> ModelView:
        """The async twin of `view_until`."""
        return await self.prepared(lambda view: view, deadline, timeout, cancel)


def _prepared(view: ModelView, request: GenerationRequest, prepare: Prepare | None) -> GenerationJob:
    return view.prepare_generation(request) if prepare is None else prepare(view)


def _wait(answer: Future[T], cancel: CancelFlag, deadline: float | None) -> T:
    """The answer; when the deadline passes the flag is set, and the worker answers so."""
    try:
        return answer.result(seconds_left(deadline))
    except TimeoutError:
        cancel.expire()
    return answer.result()


async def _await_until(answer: Future[T], cancel: CancelFlag, deadline: float | None) -> T:
    left = seconds_left(deadline)
    timer = None if left is None else asyncio.get_running_loop().call_later(left, cancel.expire)
    try:
        return await asyncio.wrap_future(answer)
    finally:
        if timer is not None:
            timer.cancel()
