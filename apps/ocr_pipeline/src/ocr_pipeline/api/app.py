"""The application: routes, who may use them, and what goes wrong in Google's terms."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ocr_pipeline.api import envelope, orders, schema
from ocr_pipeline.api.aside import Aside, FullError
from ocr_pipeline.api.bodies import Bodies
from ocr_pipeline.api.errors import Queue, Refusal, invalid
from ocr_pipeline.api.keys import KeyStore
from ocr_pipeline.api.metrics import CONTENT_TYPE, Metrics
from ocr_pipeline.api.settings import Settings
from ocr_pipeline.api.waiting import Waiting
from ocr_pipeline.jobs.dispatch import Dispatch
from ocr_pipeline.jobs.store import (
    IdempotencyConflictError,
    JobStore,
    JobView,
    NewItem,
    Outcome,
    QueueFullError,
    Submitted,
)
from ocr_pipeline.jobs.tables import Kind, State
from ocr_pipeline.records.report import Report, Sent
from ocr_pipeline.smb.share import Share, ShareError, ShareSettings

log = logging.getLogger(__name__)

VERSION = "0.1.0"
MODEL = "ocr-pipeline"
ALIASES = (MODEL, "gemini-2.5-flash")  # any other name answers too
PAGE = 500
BUSY_RETRY_S = 5.0
LEAVE_POLL_S = 0.5
LISTINGS = 4  # of one share at once; a share that hangs keeps nobody from the others
LISTING_S = 60.0
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": schema.ErrorAnswer} for code in (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
}
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; img-src data:; style-src 'unsafe-inline'"),
)

Reporter = Callable[[str, str, Sent], Report | None]


class Service:
    """What the routes share."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        dispatch: Dispatch,
        keys: KeyStore,
        shares: dict[str, ShareSettings],
        report: Reporter | None = None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.dispatch = dispatch
        self.keys = keys
        self.shares = shares
        self.report = report
        self.bodies = Bodies(settings.max_buffered, settings.body_timeout)
        self.waiting = Waiting(store.news)
        self.listings = Aside(LISTINGS, LISTING_S)
        self.metrics = Metrics(store.counts, store.workers)

    async def submit(self, kind: Kind, owner: str, photos: list[NewItem], **more: Any) -> Submitted:
        """Take photos in and wake a worker. Raises Refusal 429 and 409."""
        with self._told(kind):
            taken = await asyncio.to_thread(partial(self.store.submit, kind, owner, photos, **more))
        if not taken.known:
            await asyncio.to_thread(self.dispatch.wake, taken.images)
        return taken

    async def submit_listed(self, owner: str, order: orders.Order, key: str | None) -> Submitted:
        """Take a TRA job in. Its share is asked only for a job that is new and has room. Raises Refusal."""
        fingerprint = order.fingerprint() if key else ""
        with self._told(order.kind):
            known = await asyncio.to_thread(self.store.look, order.kind, owner, key, fingerprint)
        if known:
            return known
        try:
            photos = await self.listings.run(order.share, partial(self.listed, order))
        except FullError:
            message = f"{self.listings.most} jobs wait for share {order.share!r} already; try again later"
            raise Refusal(429, "SHARE_BUSY", message, retry_after_s=30) from None
        except TimeoutError:
            told = f"share {order.share!r} did not list {order.folder} within {self.listings.seconds:.0f} s"
            raise Refusal(503, "SMB_UNREACHABLE", told, retry_after_s=30) from None
        return await self.submit(
            order.kind,
            owner,
            photos,
            feeder=order.feeder,
            share=order.share,
            idempotency=key,
            fingerprint=fingerprint,
        )

    @contextmanager
    def _told(self, kind: Kind) -> Iterator[None]:
        """Why the job tables take nothing, as a Refusal."""
        try:
            yield
        except QueueFullError as error:
            estimate = error.estimate_s
            retry = min(300.0, max(1.0, estimate / 4)) if estimate else BUSY_RETRY_S
            what = "requests wait" if kind in (Kind.READ, Kind.TEXT) else "jobs are under way"
            message = f"{error.waiting} {what} already, {error.limit} may; try again later"
            queue = Queue(error.waiting, estimate)
            raise Refusal(429, "QUEUE_FULL", message, retry_after_s=retry, queue=queue) from None
        except IdempotencyConflictError:
            message = "this Idempotency-Key came with another job before; take a new one"
            raise Refusal(409, "IDEMPOTENCY_KEY_REUSED", message) from None

    async def enter(self, kind: Kind, owner: str, data: bytes, pole_id: str) -> Submitted:
        """One photo into the queue, in front of all jobs. Raises Refusal."""
        if len(data) > self.settings.max_image:
            message = f"the image has {len(data)} bytes; at most {self.settings.max_image} are read"
            raise invalid("IMAGE_TOO_LARGE", message, 413)
        digest = await asyncio.to_thread(_sha256, data)
        return await self.submit(kind, owner, [NewItem(pole_id, "photo", digest, data)])

    async def outcome_of(self, request: Request, taken: Submitted) -> Outcome:
        """What became of the photo that `enter` took in. Raises Refusal."""
        try:
            item_id = await asyncio.to_thread(self.store.item_of, taken.job_id)
            outcome = await self._while_here(request, item_id)
        except (asyncio.CancelledError, Refusal):
            await asyncio.shield(asyncio.to_thread(self.store.cancel, taken.job_id))
            raise
        if outcome is None:
            position, estimate = await asyncio.to_thread(self.store.standing, item_id)
            await asyncio.to_thread(self.store.cancel, taken.job_id)
            message = f"not read within {self.settings.answer_timeout:.0f} s; try again, or send a job"
            retry = min(300.0, max(1.0, estimate or BUSY_RETRY_S))
            queue = Queue(position, estimate)
            raise Refusal(503, "ANSWER_TIMEOUT", message, retry_after_s=retry, queue=queue)
        if outcome.state is State.DONE:
            return outcome
        standing = None if outcome.over else await asyncio.to_thread(self.store.standing, item_id)
        raise _refusal(outcome, self.settings, standing)

    async def _while_here(self, request: Request, item_id: int) -> Outcome | None:
        """The outcome, unless the client leaves first: nobody then waits for the photo."""
        asked = asyncio.create_task(self.waiting.outcome(item_id, self.settings.answer_timeout))
        try:
            while True:
                done, _ = await asyncio.wait({asked}, timeout=LEAVE_POLL_S)
                if done:
                    return asked.result()
                if await request.is_disconnected():
                    raise Refusal(499, "CLIENT_LEFT", "the client left")
        finally:
            asked.cancel()

    def listed(self, order: orders.Order) -> list[NewItem]:
        """A TRA job's photos. Raises Refusal: each thing that can be wrong with a share has its own."""
        if order.share not in self.shares:
            known = ", ".join(sorted(self.shares)) or "none is set up"
            raise invalid("SMB_UNKNOWN_SHARE", f"share = {order.share!r}: not known here ({known})")
        try:
            with Share(self.shares[order.share], self.listings.seconds) as share:
                entries = share.list(order.folder)
        except ShareError as error:
            if error.temporary:
                raise Refusal(503, error.code, str(error), retry_after_s=30) from None
            raise invalid(error.code, str(error), 404 if error.code == "SMB_NOT_FOUND" else 400) from None
        return orders.photos_of(entries, order.folder, self.settings)


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _refusal(
    outcome: Outcome, settings: Settings, standing: tuple[int, float | None] | None = None
) -> Refusal:
    """Why a photo was not read. `standing`: photos before it and seconds, where it waits again."""
    code = outcome.error_status or 500
    retry = settings.hang_delay if outcome.error_code == "GPU_HANG" else settings.retry_delay
    if standing and standing[1]:
        retry = min(300.0, max(retry, standing[1]))
    message = outcome.error or "it was not read"
    if code == 503 and not outcome.over:
        message += "; the photo is back in the queue, try again"
    return Refusal(
        code,
        outcome.error_code or "INTERNAL",
        message,
        retry_after_s=retry if code == 503 else None,
        queue=Queue(*standing) if standing else None,
    )


# --- what every route depends on ---


def service_of(request: Request) -> Service:
    """The service of this application."""
    found: Service = request.app.state.service
    return found


def caller(request: Request) -> str:
    """Who asks. Raises Refusal 401."""
    peer = request.client.host if request.client else None
    name = service_of(request).keys.name_of(request.headers, request.query_params.get("key"), peer)
    request.scope["ocr_caller"] = name
    return name


Caller = Annotated[str, Depends(caller)]
Its = Annotated[Service, Depends(service_of)]
Model = Annotated[str, Path(max_length=200, description="any name; the one used stands in modelVersion")]
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]


def _reads(model: type[Any]) -> dict[str, Any]:
    """What OpenAPI says of a body that the route reads itself."""
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": model.model_json_schema(ref_template="#/components/schemas/{model}")
                }
            },
        }
    }


@asynccontextmanager
async def _body(service: Service, request: Request, limit: int) -> AsyncIterator[Any]:
    content, size = await service.bodies.json(request, limit)
    try:
        yield content
    finally:
        service.bodies.release(size)


def _model_version(service: Service) -> str:
    for _, _, _, model in service.store.workers():
        if model:
            return model
    return f"{MODEL}/{VERSION}"


async def _generate(service: Service, request: Request, owner: str) -> dict[str, Any]:
    async with _body(service, request, service.settings.max_body) as body:
        asked = await asyncio.to_thread(envelope.asked, body)
        taken = await service.enter(Kind.READ, owner, envelope.the_picture(asked).data, "")
        asked = asked.emptied()
    del body  # its memory is given back, and does not wait for the answer
    outcome = await service.outcome_of(request, taken)
    text = json.dumps(json.loads(outcome.result or "{}")["reading"], ensure_ascii=False)
    model = await asyncio.to_thread(_model_version, service)
    return envelope.answer(text, asked, model, f"ocr-{outcome.item_id}")


def _routes(app: FastAPI) -> None:
    """The Gemini-style paths, in both versions."""

    async def generate(request: Request, service: Its, owner: Caller, model: Model) -> JSONResponse:
        """Read one nameplate photo: 11 fields as JSON text."""
        return JSONResponse(await _generate(service, request, owner))

    async def stream(
        request: Request,
        service: Its,
        owner: Caller,
        model: Model,
        alt: Annotated[str, Query(max_length=16)] = "json",
    ) -> Response:
        """The same as generateContent, as a stream of one chunk: `?alt=sse`, else a JSON list."""
        answer = await _generate(service, request, owner)
        if alt != "sse":
            return JSONResponse([answer])
        event = f"data: {json.dumps(answer, ensure_ascii=False)}\n\n"
        return Response(event.encode(), media_type="text/event-stream")

    async def count(request: Request, service: Its, owner: Caller, model: Model) -> JSONResponse:
        """How many tokens a request has, in Gemini's terms: an estimate."""
        async with _body(service, request, service.settings.max_body) as body:
            asked = await asyncio.to_thread(envelope.asked, body)
        return JSONResponse({"totalTokens": asked.tokens})

    async def models(service: Its, owner: Caller) -> JSONResponse:
        """The models' names. Any other name is answered too."""
        return JSONResponse({"models": [envelope.model_entry(name, VERSION) for name in ALIASES]})

    async def model_of(service: Its, owner: Caller, model: Model) -> JSONResponse:
        """One model, under whatever name."""
        return JSONResponse(envelope.model_entry(model, VERSION))

    for version in ("v1beta", "v1"):
        base = f"/{version}/models"
        body = {"openapi_extra": _reads(schema.GenerateRequest), "responses": ERRORS}
        for verb, route in (
            ("generateContent", generate),
            ("streamGenerateContent", stream),
            ("countTokens", count),
        ):
            app.add_api_route(
                f"{base}/{{model}}:{verb}",
                route,
                methods=["POST"],
                operation_id=f"{verb}_{version}",
                tags=["Gemini"],
                response_model=None,
                **body,  # type: ignore[arg-type]
            )
        app.add_api_route(base, models, operation_id=f"models_{version}", tags=["Gemini"], responses=ERRORS)
        app.add_api_route(
            f"{base}/{{model}}", model_of, operation_id=f"model_{version}", tags=["Gemini"], responses=ERRORS
        )


def _job_routes(app: FastAPI) -> None:
    base = "/api/v41/ocr"

    @app.post(
        f"{base}/poste/{{pole_id}}/texto",
        tags=["Poles"],
        response_model=schema.PoleTextAnswer,
        responses=ERRORS,
        openapi_extra=_reads(schema.GenerateRequest),
    )
    async def pole_text(
        request: Request,
        service: Its,
        owner: Caller,
        pole_id: Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")],
    ) -> JSONResponse:
        """The raw text of a pole's photo, through the pole's filters; no fields. The body is
        generateContent's."""
        async with _body(service, request, service.settings.max_body) as body:
            asked = await asyncio.to_thread(envelope.asked, body)
            taken = await service.enter(Kind.TEXT, owner, envelope.the_picture(asked).data, pole_id)
        del body, asked
        outcome = await service.outcome_of(request, taken)
        found = json.loads(outcome.result or "{}")
        return JSONResponse({"poste": pole_id, "texto": found["text"], "linhas": found["lines"]})

    @app.post(
        f"{base}/jobs",
        status_code=202,
        tags=["Jobs"],
        response_model=schema.JobStatus,
        responses={**ERRORS, 409: {"model": schema.ErrorAnswer}},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {
                            "oneOf": [_inline(schema.AltJob), _inline(schema.TraJob)],
                        }
                    }
                },
            }
        },
    )
    async def submit(
        request: Request,
        service: Its,
        owner: Caller,
        idempotency_key: Annotated[str | None, Header(max_length=64)] = None,
    ) -> JSONResponse:
        """Submit a job: TRA (a feeder's folder on a share) or ALT (photos in the request)."""
        key = orders.idempotency_key(idempotency_key)
        async with _body(service, request, service.settings.max_job_body) as body:
            order = await asyncio.to_thread(orders.order, body, service.settings)
            if order.kind is Kind.TRA:
                taken = await service.submit_listed(owner, order, key)
            else:
                taken = await service.submit(
                    order.kind,
                    owner,
                    list(order.photos),
                    feeder=order.feeder,
                    idempotency=key,
                    fingerprint=order.fingerprint() if key else "",
                )
        view = await asyncio.to_thread(service.store.view, taken.job_id)
        if view is None:
            raise Refusal(404, "NO_SUCH_JOB", "the job is no longer kept")
        headers = {"Location": f"{base}/jobs/{taken.job_id}"}
        return JSONResponse(_shown(view), 200 if taken.known else 202, headers)

    @app.get(f"{base}/jobs", tags=["Jobs"], response_model=list[schema.JobStatus], responses=ERRORS)
    async def jobs(service: Its, owner: Caller) -> JSONResponse:
        """The caller's jobs, the newest first, 100 at most."""
        return JSONResponse([_shown(view) for view in await asyncio.to_thread(service.store.views, owner)])

    @app.get(f"{base}/jobs/{{job_id}}", tags=["Jobs"], response_model=schema.JobStatus, responses=ERRORS)
    async def job(service: Its, owner: Caller, job_id: JobId) -> JSONResponse:
        """State, progress, queue position and estimate of a job."""
        return JSONResponse(_shown(await _job(service, owner, job_id)))

    @app.get(
        f"{base}/jobs/{{job_id}}/result", tags=["Jobs"], response_model=schema.JobResult, responses=ERRORS
    )
    async def result(
        service: Its,
        owner: Caller,
        job_id: JobId,
        offset: Annotated[int, Query(ge=0, le=10**6)] = 0,
        limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE,
    ) -> JSONResponse:
        """The job's photos: state, reading or error of each; also while it runs."""
        view = await _job(service, owner, job_id)
        found = await asyncio.to_thread(service.store.results, job_id, offset, limit)
        after = offset + len(found)
        return JSONResponse(
            {
                "id": job_id,
                "state": view.state.value,
                "items": [_item(outcome) for outcome in found],
                "nextOffset": after if after < view.images else None,
            }
        )

    @app.delete(f"{base}/jobs/{{job_id}}", tags=["Jobs"], response_model=schema.JobStatus, responses=ERRORS)
    async def cancel(service: Its, owner: Caller, job_id: JobId) -> JSONResponse:
        """Cancel what of a job is not over. What was read stays."""
        await asyncio.to_thread(service.store.cancel, job_id, owner)
        return JSONResponse(_shown(await _job(service, owner, job_id)))

    @app.get(f"{base}/jobs/{{job_id}}/report", tags=["Jobs"], responses=ERRORS, response_model=None)
    async def report(
        service: Its,
        owner: Caller,
        job_id: JobId,
        format: Annotated[str, Query(pattern="^(html|csv|json)$")] = "html",  # noqa: A002 - the query's name
    ) -> Response:
        """The job's feeder against the records: HTML, CSV or JSON. It says what of the job was not read."""
        view = await _job(service, owner, job_id)
        sent = Sent(view.state.value, await asyncio.to_thread(service.store.standings, job_id=job_id))
        made = await asyncio.to_thread(service.report, view.feeder, job_id, sent) if service.report else None
        if made is None:
            raise Refusal(404, "NO_REPORT", "no photo of this job is known any more")
        pieces, kind = await asyncio.to_thread(made.stream, format)
        return StreamingResponse(pieces, media_type=kind)


async def _job(service: Service, owner: str, job_id: str) -> JobView:
    view = await asyncio.to_thread(service.store.view, job_id, owner)
    if view is None or view.kind not in (Kind.ALT, Kind.TRA):
        raise Refusal(404, "NO_SUCH_JOB", "no such job, or not yours, or older than jobs are kept")
    return view


def _inline(model: type[Any]) -> dict[str, Any]:
    """A model's schema without references: OpenAPI would look for them elsewhere."""
    content = model.model_json_schema()
    definitions = content.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return resolved(definitions[part["$ref"].rpartition("/")[2]])
            return {key: resolved(value) for key, value in part.items()}
        return [resolved(value) for value in part] if isinstance(part, list) else part

    found: dict[str, Any] = resolved(content)
    return found


def _when(moment: float | None) -> str | None:
    return None if moment is None else datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def _shown(view: JobView) -> dict[str, Any]:
    return {
        "id": view.id,
        "type": view.kind.value,
        "state": view.state.value,
        "feeder": view.feeder,
        "images": view.images,
        "duplicates": view.duplicates,
        "counts": view.counts,
        "progress": round(view.over / view.images, 4) if view.images else 1.0,
        "queuePosition": view.queue_position,
        "estimateSeconds": None if view.estimate_s is None else round(view.estimate_s, 1),
        "createdAt": _when(view.created_at),
        "finishedAt": _when(view.finished_at),
    }


def _item(outcome: Outcome) -> dict[str, Any]:
    found = json.loads(outcome.result) if outcome.result else {}
    error = {"code": outcome.error_code, "message": outcome.error} if outcome.error_code else None
    return {
        "pole": outcome.pole_id,
        "name": outcome.name,
        "state": outcome.state.value,
        "attempts": outcome.attempts,
        "reading": found.get("reading"),
        "imageSha256": found.get("image_sha256"),
        "error": error,
    }


def _state_routes(app: FastAPI) -> None:
    @app.get("/health", tags=["State"])
    async def health() -> JSONResponse:
        """Whether this process answers. It asks nobody."""
        return JSONResponse({"status": "ok", "version": VERSION})

    @app.get("/ready", tags=["State"], responses={503: {"model": schema.ErrorAnswer}})
    async def ready(service: Its) -> JSONResponse:
        """Whether a photo would be read now: a worker is there and its backends answer."""
        workers = await asyncio.to_thread(service.store.workers)
        if any(is_ready for _, is_ready, _, _ in workers):
            return JSONResponse({"status": "ready", "workers": len(workers)})
        problem = workers[0][2] if workers else "no worker; systemctl status ocr-worker@1"
        raise Refusal(503, "NOT_READY", problem, retry_after_s=BUSY_RETRY_S)

    @app.get("/metrics", tags=["State"], response_model=None, responses=ERRORS)
    async def metrics(service: Its, owner: Caller) -> Response:
        """Figures for Prometheus."""
        return Response(await asyncio.to_thread(service.metrics.render), media_type=CONTENT_TYPE)


# --- what goes wrong ---


async def _refused(_request: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, Refusal) else Refusal(500, "INTERNAL", "an error of the service")
    return JSONResponse(refusal.body(), refusal.code, refusal.all_headers())


async def _database_away(request: Request, error: Exception) -> Response:
    log.error("the database does not answer: %s", str(error).splitlines()[0])
    away = Refusal(503, "DATABASE_UNAVAILABLE", "the job tables do not answer; try again", retry_after_s=10)
    return await _refused(request, away)


async def _unroutable(request: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 500
    told = {
        404: ("NOT_FOUND", "no such path; see /openapi.json"),
        405: ("METHOD_NOT_ALLOWED", "not with this method"),
    }
    reason, message = told.get(code, ("BAD_REQUEST", "the request cannot be served"))
    headers = dict(getattr(error, "headers", None) or {})
    return await _refused(request, Refusal(code, reason, message, headers=headers))


async def _not_valid(request: Request, error: Exception) -> Response:
    first = error.errors()[0] if isinstance(error, RequestValidationError) and error.errors() else {}
    where = ".".join(str(part) for part in first.get("loc", ())[-2:])
    code = 404 if "job_id" in first.get("loc", ()) else 400
    return await _refused(
        request, invalid("BAD_PARAMETER", f"{where}: {first.get('msg', 'not valid')}", code)
    )


class Logged:
    """Every answer is counted and logged: method, path without its query, status, time, whose key."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                message["headers"] += [pair for pair in HEADERS if pair[0] not in present]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.observe(route, status, seconds)
            if route not in ("/health", "/ready", "/metrics") or status >= 400:
                who = scope.get("ocr_caller", "-")
                path = ascii(scope["path"])[1:-1][:200]
                log.info("%s %s %d %.0f ms %s", scope["method"], path, status, seconds * 1000, who)


def create(service: Service, *, lifespan: Callable[[FastAPI], Any] | None = None) -> FastAPI:
    """The application."""
    app = FastAPI(
        title="OCR of transformer nameplates",
        version=VERSION,
        description="Photos in, 11 validated fields out. docs/ocr-api.md explains it.",
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        docs_url=None,
    )
    app.state.service = service
    _routes(app)
    _job_routes(app)
    _state_routes(app)
    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        Refusal: _refused,
        HTTPException: _unroutable,
        RequestValidationError: _not_valid,
        OperationalError: _database_away,
        Exception: _refused,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(Logged, service=service)
    return app
