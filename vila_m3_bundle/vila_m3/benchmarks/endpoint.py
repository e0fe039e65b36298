"""An OpenAI-compatible endpoint in the model's place."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vila_m3_common.conversation import IMAGE_TOKEN, Conversation
from vila_m3_common.errors import UserError


class EndpointError(RuntimeError):
    """The endpoint gave no answer after all retries."""


class Endpoint:
    """Asks ``<url>/chat/completions``; a timeout, 429 or 5xx is tried again with a doubling wait.

    The key is read from the environment variable ``OPENAI_API_KEY``, never from a config.

    Args:
        url: base of the API, ``http://localhost:8000/v1``.
        model: name that the endpoint knows.
        max_new_tokens: longest answer.
        retries: tries after the first.
        wait_seconds: before the first retry.
        timeout_seconds: of one request.
        parallel_count: requests at once.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_new_tokens: int = 64,
        retries: int = 4,
        wait_seconds: float = 1.0,
        timeout_seconds: float = 60.0,
        parallel_count: int = 4,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"endpoint {url!r} is no web address; give, say, http://localhost:8000/v1")
        self.url = url.rstrip("/") + "/chat/completions"
        self.model, self.max_new_tokens, self.retries = model, max_new_tokens, retries
        self.wait_seconds, self.timeout_seconds = wait_seconds, timeout_seconds
        self.parallel_count = parallel_count

    @property
    def settings(self) -> dict[str, Any]:
        """What its answers depend on."""
        return {"endpoint": self.url, "model": self.model, "max_new_tokens": self.max_new_tokens}

    def answer(self, conversation: Conversation) -> str:
        """Return the next assistant turn.

        Raises:
            EndpointError: after the last retry, or at once for a request that the endpoint refuses.
        """
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait_seconds * 2 ** (attempt - 1))
            try:
                return self._ask(conversation)
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}"
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
            except (KeyError, IndexError, TypeError, ValueError) as error:
                problem = f"an answer of unknown form ({type(error).__name__})"
        raise EndpointError(f"{self.url} gave {problem}")

    def _ask(self, conversation: Conversation) -> str:
        body = {
            "model": self.model,
            "messages": [_message(turn.role, turn.text, turn.images) for turn in conversation.context],
            "max_tokens": self.max_new_tokens,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
            text = json.load(response)["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError("content")
        return text


def _message(role: str, text: str, images: Sequence[np.ndarray]) -> dict[str, Any]:
    """Interleave text and pictures in the order of the placeholders."""
    content: list[dict[str, Any]] = []
    for place, part in enumerate(text.split(IMAGE_TOKEN)):
        if place:
            content.append({"type": "image_url", "image_url": {"url": _data_url(images[place - 1])}})
        if part.strip():
            content.append({"type": "text", "text": part.strip()})
    return {"role": "assistant" if role == "assistant" else "user", "content": content}


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def make_endpoint(url: str | None, model: str | None, **options: Any) -> Endpoint | None:
    """Return the endpoint of a config; None where it gives no address.

    Raises:
        UserError: if the address has no model.
    """
    if url is None:
        return None
    if not model:
        raise UserError("--endpoint_url needs --endpoint_model, the name that the endpoint knows the model by")
    return Endpoint(url, model, **options)
