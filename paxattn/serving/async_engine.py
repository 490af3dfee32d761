"""Many tasks of an event loop at one engine, which a thread of its own drives."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Self, TypeVar, Unpack

from paxattn.requests import Prompt
from paxattn.results import Delta
from paxattn.serving.engine import Engine
from paxattn.serving.options import Prepared, RequestOptions
from paxattn.serving.stats import EngineStats

T = TypeVar("T")
_Inbox = asyncio.Queue[Delta | BaseException]


class NotServing(RuntimeError):
    """The engine has failed, or takes no more requests."""


class Deltas:
    """What `AsyncEngine.stream` gives: an asynchronous iterator over the news of its requests.

    As a context manager it aborts, at its end, what has not ended.

    Attributes:
        prompts: the token ids of each prompt.
    """

    def __init__(self, served: AsyncEngine, prepared: Sequence[Prepared]) -> None:
        """Of requests that were prepared; `AsyncEngine.stream` makes these."""
        self.prompts = [one.prompt for one in prepared]
        self._served = served
        self._inbox: _Inbox = asyncio.Queue()
        self._first = 0
        self._unfinished = set(range(sum(len(one.samples) for one in prepared)))

    def __aiter__(self) -> Self:
        """Itself."""
        return self

    async def __anext__(self) -> Delta:
        """The next news; ``index`` is ``prompt * num_samples + sample`` of this call."""
        if not self._unfinished:
            raise StopAsyncIteration
        delta = await self._inbox.get()
        if isinstance(delta, BaseException):
            self._unfinished.clear()
            raise delta
        delta = replace(delta, index=delta.index - self._first)
        if delta.finish_reason is not None:
            self._unfinished.discard(delta.index)
        return delta

    def abort(self) -> None:
        """End what has not ended; the news of it has the reason "abort"."""
        for index in self._unfinished:
            self._served._abort(self._first + index)

    async def __aenter__(self) -> Self:
        """Itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """See `abort`."""
        self.abort()


class AsyncEngine:
    """Drives an `Engine` from a thread of its own, for any number of tasks of one event loop.

    Between two blocks of device steps the thread does what it was asked for meanwhile, and every
    task then gets its own news. Nobody else may use the engine.

    Example:
        >>> async with paxattn.AsyncEngine(engine) as served:
        ...     async with await served.stream(["def f(x):"], max_new_tokens=64) as deltas:
        ...         async for delta in deltas:
        ...             print(delta.text)

    Attributes:
        engine: as given; for its sizes.
        failure: what ended the thread, if an error did; `stream` raises then.
    """

    def __init__(self, engine: Engine) -> None:
        """``engine``: without requests."""
        self.engine = engine
        self.failure: BaseException | None = None
        self._draining = self._driven = False
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # The thread's own:
        self._inboxes: dict[int, _Inbox] = {}
        self._waiting_for_end: list[Future[None]] = []
        self._closing = False

    async def __aenter__(self) -> Self:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._drive, name="paxattn-engine", daemon=True)
        self._driven = True
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Abort what is left, and end the thread; `drain` first to let it come to its end."""
        self._draining = True
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        self._driven = False
        while not self._commands.empty():  # what was asked after the end: nobody is to wait
            command = self._commands.get()
            if command is not None:
                command()
        self._tell_idle()

    @property
    def serving(self) -> bool:
        """Whether requests are taken."""
        return self._driven and not self._draining and self.failure is None

    async def stream(self, prompts: Sequence[Prompt], **options: Unpack[RequestOptions]) -> Deltas:
        """Let requests wait for their turn: all of them or, if places are missing, none.

        Args:
            prompts: texts (with a tokenizer) or sequences of token ids.
            **options: of every one of them, see `RequestOptions`.

        Raises:
            QueueFull: not enough places are free.
            NotServing: the engine has failed, or takes no more requests (`drain`).
            TypeError: an argument has a wrong type.
            ValueError: a request is malformed, or could not fit were it alone.
        """
        prepared = await asyncio.to_thread(lambda: self.engine.prepare(prompts, **options))
        if self._draining:
            raise NotServing("the engine is being shut down: it takes no more requests")
        deltas = Deltas(self, prepared)

        def submit() -> None:
            deltas._first = self.engine.submit(prepared)
            for index in deltas._unfinished:
                self._inboxes[deltas._first + index] = deltas._inbox

        asked = self._ask(submit)
        try:
            await asyncio.wrap_future(asked)
        except asyncio.CancelledError:  # maybe too late to keep it from being submitted
            asked.add_done_callback(
                lambda asked: None if asked.cancelled() or asked.exception() else deltas.abort()
            )
            raise
        return deltas

    async def stats(self) -> EngineStats:
        """`Engine.stats`, between two blocks of steps."""
        return await asyncio.wrap_future(self._ask(lambda: self.engine.stats))

    async def drain(self) -> None:
        """Take no more requests, and wait until those that there are have ended.

        Raises:
            NotServing: the engine has failed.
        """
        self._draining = True
        ended: Future[None] = Future()
        ended.set_running_or_notify_cancel()  # who waits may go away: this cannot be cancelled
        await asyncio.wrap_future(self._ask(lambda: self._waiting_for_end.append(ended)))
        await asyncio.wrap_future(ended)

    def abort(self) -> None:
        """Take no more requests, and end those that there are; the news of it says "abort"."""
        self._draining = True
        self._commands.put(lambda: None if self.failure else self._abort_all())

    def _ask(self, what: Callable[[], T]) -> Future[T]:
        """Have the thread call something between two blocks of steps."""
        if not self._driven:
            raise NotServing("nobody drives the engine: use `async with`, and only inside of it")
        future: Future[T] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self.failure is not None:
                    raise NotServing(f"the engine has failed: {self.failure}") from self.failure
                future.set_result(what())
            except Exception as error:
                future.set_exception(error)

        self._commands.put(answer)
        return future

    def _abort(self, index: int) -> None:
        """End a request at the end of the block."""
        self._commands.put(lambda: None if self.failure else self.engine.abort(index))

    # What follows runs in the thread.

    def _drive(self) -> None:
        """Until `__aexit__` says that nothing will come, and nothing is left to do."""
        try:
            while self._answer():
                self._hand_over(self.engine.step())
        except BaseException as error:  # whoever waits must hear of it, whatever it is
            self._fail(error)

    def _answer(self) -> bool:
        """Do what was asked meanwhile, until there is a block to run; False: the end."""
        while True:
            idle = not self.engine.num_unfinished
            if idle:
                self._tell_idle()
            if idle and self._closing:
                return False
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                self._closing = True
                self._abort_all()
            else:
                command()

    def _abort_all(self) -> None:
        for index in self._inboxes:
            self.engine.abort(index)

    def _tell_idle(self) -> None:
        """Every request has ended."""
        while self._waiting_for_end:
            self._waiting_for_end.pop().set_result(None)

    def _hand_over(self, news: list[Delta]) -> None:
        """Give every task its own."""
        parcels = [(self._inboxes[delta.index], delta) for delta in news]
        for delta in news:
            if delta.finish_reason is not None:
                del self._inboxes[delta.index]
        self._loop.call_soon_threadsafe(_deliver, parcels)

    def _fail(self, error: BaseException) -> None:
        """Tell everybody, now and until `__aexit__`."""
        self.failure = error
        inboxes = set(self._inboxes.values())
        with contextlib.suppress(RuntimeError):  # the loop may be gone: that would be the error
            self._loop.call_soon_threadsafe(_deliver, [(inbox, error) for inbox in inboxes])
        while self._waiting_for_end:
            self._waiting_for_end.pop().set_exception(error)
        while not self._closing:
            command = self._commands.get()
            if command is None:
                return
            command()


def _deliver(parcels: Sequence[tuple[_Inbox, Delta | BaseException]]) -> None:
    for inbox, parcel in parcels:
        inbox.put_nowait(parcel)
