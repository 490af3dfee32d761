"""The ASGI application: `/v1/completions`, `/v1/chat/completions`, `/v1/models` and their like."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from paxattn.server.answers import Answer
from paxattn.server.chat import ChatTemplate
from paxattn.server.errors import ApiError, Json, on_error
from paxattn.server.metrics import prometheus_text
from paxattn.server.protocol import Asked, Reader
from paxattn.serving import AsyncEngine, Deltas, Engine, NotServing, QueueFull

MAX_BODY_BYTES = 2**22


def create_app(
    engine: Engine,
    *,
    name: str,
    stop_token_ids: tuple[int, ...] = (),
    chat_template: ChatTemplate | None = None,
    priorities: bool = False,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> Starlette:
    """An ASGI application that serves one model by the OpenAI API.

    It drives the engine from its start to its shutdown, when it lets the requests that there are
    come to their ends; ``state.abort()`` ends them at once, and tells the clients, see `Server`.

    Args:
        engine: with a tokenizer, and without requests. Its ``max_requests`` is the bound of the
            queue: beyond, clients are told to try again later.
        name: the model's, as clients call it.
        stop_token_ids: tokens that end a text, such as the checkpoint's eos ids.
        chat_template: for chat completions.
        priorities: whether clients may set the field ``priority``, the lowest of which go first (as
            with vLLM; an `Engine` counts the other way round); if not, who comes first goes first.
        max_body_bytes: of a request.

    Raises:
        ValueError: the engine has no tokenizer.
    """
    if engine.tokenizer is None:
        raise ValueError("the engine has no tokenizer: a server needs one, for text and stop lists")
    reader = Reader(
        engine=engine,
        name=name,
        stop_token_ids=stop_token_ids,
        template=chat_template,
        priorities=priorities,
    )
    served = Served(reader, max_body_bytes)
    app = Starlette(
        routes=[
            Route("/v1/completions", served.completions, methods=["POST"]),
            Route("/v1/chat/completions", served.chat, methods=["POST"]),
            Route("/v1/models", served.models),
            Route("/v1/models/{model:path}", served.model),
            Route("/health", served.health),
            Route("/metrics", served.metrics),
        ],
        exception_handlers={
            ClientDisconnect: _nobody,
            **dict.fromkeys((HTTPException, ApiError, QueueFull, NotServing, Exception), on_error),
        },
        lifespan=served.lifespan,
    )
    app.state.abort = served.abort
    return app


class Served:
    """The application's endpoints."""

    def __init__(self, reader: Reader, max_body_bytes: int) -> None:
        """See `create_app`."""
        self._reader, self._max_body_bytes = reader, max_body_bytes
        self._engine = AsyncEngine(reader.engine)
        self._model = {
            "id": reader.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "paxattn",
            "max_model_len": reader.engine.longest,
        }

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """From the application's start to its shutdown."""
        async with self._engine:
            yield
            with contextlib.suppress(NotServing):
                await self._engine.drain()

    def abort(self) -> None:
        """See `AsyncEngine.abort`."""
        self._engine.abort()

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await self._answer(request, self._reader.completion)

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        return await self._answer(request, self._reader.chat)

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        return Json({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/NAME``."""
        self._reader.check_model(request.path_params["model"])
        return Json(self._model)

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 as long as requests are taken."""
        if not self._engine.serving:
            raise ApiError("the engine has failed, or is being shut down", status=503)
        return Json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``, for Prometheus."""
        text = prometheus_text(await self._engine.stats())
        return PlainTextResponse(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def _answer(self, request: Request, read: Callable[[Any], Asked]) -> Response:
        body = await _body(request, self._max_body_bytes)
        # A web page can have a browser send anything else to this machine without asking it first.
        kind = request.headers.get("content-type", "")
        if kind.split(";")[0].strip().lower() != "application/json":
            raise ApiError(
                f"the header Content-Type is {kind[:80]!r}: must be application/json",
                status=415,
                code="unsupported_media_type",
            )
        asked = await asyncio.to_thread(_parse, body, read)  # a long text takes long to tokenize
        try:
            deltas = await self._engine.stream(asked.prompts, **asked.options)
        except (TypeError, ValueError) as error:
            raise ApiError(str(error)) from None
        tokenizer = self._reader.engine.tokenizer
        assert tokenizer is not None  # see `create_app`
        answer = Answer(asked, deltas, self._reader.name, tokenizer)
        if asked.stream:
            return _Events(answer.events(), deltas)
        async with deltas:
            return Json(await _while_there(request, answer.whole()))


class _Events(StreamingResponse):
    """Server-sent events, and the end of the requests with the end of the connection."""

    def __init__(self, events: AsyncIterator[bytes], deltas: Deltas) -> None:
        # For proxies: nothing is to be kept, or to be collected before it is passed on.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._deltas = deltas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._deltas:
            await super().__call__(scope, receive, send)


async def _nobody(request: Request, error: Exception) -> Response:
    """To a client that has gone away."""
    return Response(status_code=499)


async def _body(request: Request, limit: int) -> bytes:
    """The body.

    One that is too large is read on for a while, and forgotten: most clients hear no answer before
    they have sent all.

    Raises:
        ApiError: it is too large.
    """
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif size > 4 * limit:
            break
    if size > limit:
        raise ApiError(
            f"the body has more than the {limit} bytes that this server takes",
            status=413,
            code="request_too_large",
        )
    return b"".join(chunks)


def _parse(body: bytes, read: Callable[[Any], Asked]) -> Asked:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    try:
        return read(content)
    except RecursionError:  # an error that quotes a value goes deeper than reading it did
        raise ApiError("the body has lists or objects nested too deeply") from None


async def _while_there(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Any:
    """The result of ``work``, which is given up when the client goes away.

    Raises:
        ClientDisconnect: it did.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
