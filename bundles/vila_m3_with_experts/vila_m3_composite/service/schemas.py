"""Requests of the API, as OpenAI's clients send them, and the fields that are added to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FILE_ID_PATTERN = r"^file-[0-9a-f]{32}$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """``data:image/png;base64,...``, the id of an uploaded file, or an address that the service allows."""

    url: str
    detail: str | None = None


class ImagePart(_Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class FileReference(_Strict):
    """An uploaded file."""

    file_id: str = Field(pattern=FILE_ID_PATTERN)


class FilePart(_Strict):
    """A file of a message: volume, DICOM slice or series, MRI sequence, picture."""

    type: Literal["file"]
    file: FileReference


Part = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


class Message(BaseModel):
    """One message; ``tool`` messages and the ``tool_calls`` of a transcript may be sent back as they came."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """The text of all text parts."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or [] if isinstance(part, TextPart))

    @property
    def images(self) -> list[ImagePart | FilePart]:
        """The parts that are pictures or files."""
        if isinstance(self.content, str) or not self.content:
            return []
        return [part for part in self.content if not isinstance(part, TextPart)]


class StudyOptions(_Strict):
    """How the images of a conversation are read; an addition to OpenAI's fields.

    ``modality`` overrules what tags and intensities tell; ``slice_index`` (RAS order, None for the middle) and ``axis``
    (0 sagittal, 1 coronal, 2 axial) choose what the VLM sees of a volume.
    """

    modality: Literal["CT", "MRI", "CXR"] | None = None
    slice_index: int | None = Field(default=None, ge=0, lt=100_000)
    axis: int = Field(default=2, ge=0, le=2)


class StreamOptions(BaseModel):
    """Whether the last chunk tells the numbers of tokens."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """Body of ``POST /v1/chat/completions``.

    ``study`` and ``experts`` are additions to OpenAI's fields: see the documentation of the bundle.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    study: StudyOptions = Field(default_factory=StudyOptions)
    experts: Literal["shown", "hidden"] = "shown"
    # What the service cannot do; other values than these are refused.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    # What tells the service nothing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


PARAMETERS = tuple(ChatRequest.model_fields)


class StudyRequest(_Strict):
    """Body of ``POST /v1/studies``: the files that are looked at together."""

    files: list[Annotated[str, Field(pattern=FILE_ID_PATTERN)]] = Field(min_length=1, max_length=2048)
    modality: Literal["CT", "MRI", "CXR"] | None = None
