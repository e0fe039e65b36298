"""The routes that RadCoPilot, the Slicer plug-in, calls; each leads to the API's own code.

The plug-in uploads one file and then asks about "the" file, without saying which. Here that is the last one from the
same API key and network address, so that users do not see each other's files.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Query, Request, Response, UploadFile
from fastapi.responses import PlainTextResponse, StreamingResponse

from .access import owner_of
from .api import ERRORS, begin, finish, follow, open_run, receive_file
from .chat import Event
from .errors import ApiError
from .schemas import ChatRequest

_MAX_CLIENTS = 256
router = APIRouter(tags=["RadCoPilot"], responses=ERRORS)


@dataclass
class Client:
    """What one client has uploaded and said since."""

    file_id: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)


class Clients:
    """The clients, by API key and address; the longest silent ones are forgotten first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], Client] = OrderedDict()

    def of(self, request: Request, owner: str) -> Client:
        """Return the client that a request comes from."""
        address = request.client.host if request.client else ""
        with self._lock:
            client = self._known.setdefault((owner, address), Client())
            self._known.move_to_end((owner, address))
            while len(self._known) > _MAX_CLIENTS:
                self._known.popitem(last=False)
            return client


@router.get("/info/", response_class=PlainTextResponse)
def info(request: Request) -> PlainTextResponse:
    """Say what this is; the plug-in looks for the name."""
    return PlainTextResponse(f"VILA-M3 with experts, model {request.app.state.service.settings.model_id}")


@router.post("/upload/")
async def upload(
    request: Request, file: Annotated[UploadFile, File()], owner: Annotated[str, Depends(owner_of)]
) -> dict[str, Any]:
    """Take the file that the next prompts are about; the conversation begins anew."""
    stored = await receive_file(request.app.state.service, file, "user_data", owner)
    client = request.app.state.clients.of(request, owner)
    client.file_id, client.messages = stored.id, []
    return {"message": "the file was uploaded", "file_id": stored.id, "filename": stored.filename}


@router.post("/v1/chat/completions/")
async def complete(
    request: Request,
    prompt: Annotated[str, Query(alias="Prompt", min_length=1)],
    owner: Annotated[str, Depends(owner_of)],
    stream: bool = False,
) -> Response:
    """Answer a prompt about the last uploaded file, or without one."""
    client = request.app.state.clients.of(request, owner)
    asked = [*client.messages, {"role": "user", "content": _content(client, prompt)}]
    body = ChatRequest(model=request.app.state.service.settings.model_id, messages=asked)
    run = await open_run(request, body, owner)
    if stream:
        events = await begin(follow(request, run))
        return StreamingResponse(_stream(events, client, asked), media_type="text/event-stream")
    content = await finish(request, run)
    client.messages = [*asked, {"role": "assistant", "content": content}]
    return Response(json.dumps(_answer(content)), media_type="application/json")


def _content(client: Client, prompt: str) -> Any:
    text = {"type": "text", "text": prompt}
    if client.file_id is None or client.messages:
        return [text]
    return [text, {"type": "file", "file": {"file_id": client.file_id}}]


def _answer(text: str) -> dict[str, Any]:
    """Return an answer in the plug-in's form, which nests the text one level deeper than OpenAI's."""
    content = {"content": [{"type": "text", "text": text}]}
    message = {"role": "assistant", "content": content}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


async def _stream(events: AsyncIterator[Event], client: Client, asked: list[dict[str, Any]]) -> AsyncIterator[str]:
    content = ""
    try:
        async for event in events:
            if event["type"] == "content":
                content += event["text"]
                yield f"data: {json.dumps(_answer(event['text']))}\n\n"
        client.messages = [*asked, {"role": "assistant", "content": content}]
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    yield "data: [DONE]\n\n"
