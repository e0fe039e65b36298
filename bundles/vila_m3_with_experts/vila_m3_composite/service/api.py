"""The routes of the API: OpenAI's, and those that the page needs beside them."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, File, Form, Query, Request, Response, UploadFile
from fastapi import Path as InPath
from fastapi.responses import FileResponse, StreamingResponse

from .access import owner_of
from .chat import ChatRun, ChatService, Event
from .downloads import pack_results, zip_folder
from .errors import ApiError
from .intake import take_in
from .schemas import FILE_ID_PATTERN, ChatRequest, StudyRequest
from .store import StoredFile
from .studies import Viewer

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": "an error in OpenAI's form"} for status in (400, 401, 404, 408, 413, 429, 504, 507)
}
router = APIRouter(responses=ERRORS)
Owner = Annotated[str, Depends(owner_of)]
FileId = Annotated[str, InPath(pattern=FILE_ID_PATTERN)]
StudyId = Annotated[str, InPath(pattern=r"^study-[0-9a-f]{32}$")]
ConversationId = Annotated[str, InPath(pattern=r"^conv-[0-9a-f]{32}$")]
Axis = Annotated[int, InPath(ge=0, le=2)]
Index = Annotated[int, InPath(ge=0, lt=100_000)]
_POLL_SECONDS = 0.5
# What a browser may show in place; everything else is saved.
_SHOWN = {".png": "image/png"}


def service_of(request: Request) -> ChatService:
    """Return what lives as long as the server."""
    return request.app.state.service


def viewer_of(request: Request) -> Viewer:
    """Return what draws slices."""
    return request.app.state.viewer


Service = Annotated[ChatService, Depends(service_of)]
View = Annotated[Viewer, Depends(viewer_of)]


@router.get("/v1/models", tags=["OpenAI"])
def list_models(service: Service, owner: Owner) -> dict[str, Any]:
    """List the one model."""
    return {"object": "list", "data": [_model(service)]}


@router.get("/v1/models/{model}", tags=["OpenAI"])
def retrieve_model(model: str, service: Service, owner: Owner) -> dict[str, Any]:
    """Describe the model."""
    if model != service.settings.model_id:
        message = f"the model {model[:80]!r} does not exist; there is {service.settings.model_id!r}"
        raise ApiError(404, message, "model_not_found", "model")
    return _model(service)


def _model(service: ChatService) -> dict[str, Any]:
    experts = [
        {"name": runner.card.name, "modality": runner.card.modality, "task": runner.card.task}
        for runner in service.runners.values()
    ]
    entry = {"id": service.settings.model_id, "object": "model", "created": 0, "owned_by": "vila-m3-bundles"}
    return {**entry, "experts": experts}


@router.post("/v1/chat/completions", tags=["OpenAI"])
async def complete(request: Request, body: ChatRequest, owner: Owner) -> Response:
    """Answer a conversation; see OpenAI's API reference, and the bundle's documentation for the additions."""
    run = await open_run(request, body, owner)
    if body.stream:
        events = await begin(follow(request, run))
        return StreamingResponse(_stream(body, run, events), media_type="text/event-stream")
    content = await finish(request, run)
    message = {"role": "assistant", "content": content, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length" if run.is_cut else "stop"}
    head = _head(body, "chat.completion")
    answered = {**head, "choices": [choice], "usage": _usage(run), "vila_m3": run.summary}
    return Response(json.dumps(answered), media_type="application/json")


async def open_run(request: Request, body: ChatRequest, owner: str) -> ChatRun:
    """Put a chat request into the queue.

    Raises:
        ApiError: if it can never be answered, or too many wait.
    """
    return service_of(request).start(body, owner)


async def follow(request: Request, run: ChatRun) -> AsyncIterator[Event]:
    """Yield the events of a run; ends it when the client goes away.

    Raises:
        ApiError: if the run fails.
    """
    events = run.events().__aiter__()
    pending: asyncio.Future[Event] | None = None
    looked = time.monotonic()
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait([pending], timeout=_POLL_SECONDS)
            if time.monotonic() - looked >= _POLL_SECONDS:
                looked = time.monotonic()
                if await request.is_disconnected():
                    return
            if not done:
                continue
            finished, pending = pending, None
            try:
                event = finished.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        run.cancel()
        if pending is not None:
            pending.cancel()


async def begin(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """Wait for the first event, so that a request that cannot be answered gets a status of its own.

    Raises:
        ApiError: if the run fails before it.
    """
    first = await anext(events, None)

    async def all_events() -> AsyncIterator[Event]:
        if first is not None:
            yield first
        async for event in events:
            yield event

    return all_events()


async def finish(request: Request, run: ChatRun) -> str:
    """Wait for a run and return its answer.

    Raises:
        ApiError: if it fails.
    """
    return "".join([event["text"] async for event in follow(request, run) if event["type"] == "content"])


def _head(body: ChatRequest, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": None,
    }


def _usage(run: ChatRun) -> dict[str, Any]:
    usage = run.usage
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


class _Chunks:
    """Writes the chunks of one streamed response."""

    def __init__(self, body: ChatRequest) -> None:
        self._head = _head(body, "chat.completion.chunk")

    def write(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        """Return one chunk with one choice."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self.write_raw({"choices": [choice], **more})

    def write_raw(self, fields: dict[str, Any]) -> str:
        """Return one chunk."""
        return f"data: {json.dumps({**self._head, **fields})}\n\n"


async def _stream(body: ChatRequest, run: ChatRun, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    chunks = _Chunks(body)
    try:
        yield chunks.write({"role": "assistant", "content": ""})
        async for event in events:
            if event["type"] == "content":
                yield chunks.write({"content": event["text"]})
            elif body.experts == "shown" and event["type"] != "finished":
                yield chunks.write({}, vila_m3=event)
            elif event["type"] == "expert_running":
                yield ": an expert runs\n\n"  # a comment, so that no proxy takes the silence for an end
        yield chunks.write({}, "length" if run.is_cut else "stop", vila_m3={"type": "finished", **run.summary})
        if body.stream_options and body.stream_options.include_usage:
            yield chunks.write_raw({"choices": [], "usage": _usage(run)})
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        run.cancel()
    yield "data: [DONE]\n\n"


@router.post("/v1/files", tags=["OpenAI"])
async def upload(
    service: Service,
    owner: Owner,
    file: Annotated[UploadFile, File(description="see the documentation of the bundle for what is read")],
    purpose: Annotated[Literal["user_data", "vision", "assistants"], Form()] = "user_data",
) -> dict[str, Any]:
    """Take a volume, DICOM file or picture, or a zip of one DICOM series or four MRI sequences."""
    return (await receive_file(service, file, purpose, owner)).to_api()


async def receive_file(service: ChatService, file: UploadFile, purpose: str, owner: str) -> StoredFile:
    """Check an uploaded file and put it into the store.

    Raises:
        ApiError: if it cannot be read, is too large, or there is no room.
    """
    return await asyncio.to_thread(_store_upload, service, file, purpose, owner)


def _store_upload(service: ChatService, file: UploadFile, purpose: str, owner: str) -> StoredFile:
    limits, filename = service.settings.limits, file.filename or "file"
    with service.store.incoming() as folder:
        path = folder / "upload"
        with path.open("wb") as target:
            shutil.copyfileobj(file.file, target)
        if path.stat().st_size > limits.upload_mb * 2**20:
            raise ApiError(413, f"the file is larger than {limits.upload_mb:g} MB", "file_too_large", "file")
        content, kind = take_in(path, filename, limits)
        return service.store.add(content, kind, filename, owner, purpose)


@router.get("/v1/files/{file_id}", tags=["OpenAI"])
def retrieve_file(file_id: FileId, service: Service, owner: Owner) -> dict[str, Any]:
    """Describe a file."""
    return service.store.get(file_id, owner).to_api()


@router.delete("/v1/files/{file_id}", tags=["OpenAI"])
def delete_file(file_id: FileId, service: Service, owner: Owner) -> dict[str, Any]:
    """Erase a file."""
    service.store.delete(file_id, owner)
    return {"id": file_id, "object": "file", "deleted": True}


@router.get("/v1/files/{file_id}/content", tags=["OpenAI"], response_class=Response)
def retrieve_content(file_id: FileId, service: Service, owner: Owner) -> Response:
    """Return a file: an upload as it was checked, an overlay, a label map."""
    stored = service.store.get(file_id, owner)
    path = service.store.path(stored)
    if path.is_dir():
        return Response(zip_folder(path), media_type="application/zip", headers=_saved_as(f"{file_id}.zip"))
    if stored.kind == "result" and path.suffix in _SHOWN:
        return FileResponse(path, media_type=_SHOWN[path.suffix])
    return FileResponse(path, media_type="application/octet-stream", headers=_saved_as(path.name))


def _saved_as(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


@router.post("/v1/studies", tags=["page"])
async def open_study(body: StudyRequest, viewer: View, owner: Owner) -> dict[str, Any]:
    """Open uploaded files as one study to look at."""
    return await asyncio.to_thread(viewer.open, body.files, body.modality, owner)


@router.get("/v1/studies/{study_id}/slices/{axis}/{index}", tags=["page"], response_class=Response)
def draw_slice(
    study_id: StudyId,
    axis: Axis,
    index: Index,
    viewer: View,
    owner: Owner,
    centre: Annotated[float | None, Query(ge=-1e6, le=1e6)] = None,
    width: Annotated[float | None, Query(gt=0, le=1e7)] = None,
    sequence: Annotated[int, Query(ge=0, le=3)] = 0,
) -> Response:
    """Draw one slice; ``centre`` and ``width`` make its window, without them it looks as the VLM sees it."""
    window = None if centre is None or width is None else (centre, width)
    return Response(viewer.draw(study_id, owner, axis, index, window, sequence), media_type="image/png")


@router.get("/v1/files/{file_id}/labels/{axis}/{index}", tags=["page"], response_class=Response)
def draw_labels(file_id: FileId, axis: Axis, index: Index, viewer: View, owner: Owner) -> Response:
    """Draw one slice of an expert's label map, transparent where there is no label."""
    return Response(viewer.draw_labels(file_id, owner, axis, index), media_type="image/png")


@router.get("/v1/conversations/{conversation_id}/results", tags=["page"], response_class=Response)
def download_results(conversation_id: ConversationId, service: Service, owner: Owner) -> Response:
    """Return conversation, report, overlays and label maps as one zip."""
    kept = service.memory.by_id(conversation_id, owner)
    packed = pack_results(kept.session, service.composite.agent.cards, service.store)
    return Response(packed, media_type="application/zip", headers=_saved_as("vila_m3_results.zip"))


@router.get("/health", tags=["operation"])
def health(service: Service, response: Response) -> dict[str, Any]:
    """Say whether questions are answered."""
    is_well = service.vlm.is_alive
    response.status_code = 200 if is_well else 503
    return {"status": "ok" if is_well else "the VLM has stopped", "model": service.settings.model_id}


@router.get("/metrics", tags=["operation"], response_class=Response)
def metrics(service: Service, owner: Owner) -> Response:
    """Return figures for Prometheus."""
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
