"""Reads pictures and codes out of bodies: raw bytes, multipart forms, or JSON with base64."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.preparation import Color, Preprocess
from tokenflow_sdk.pictures.tfc import MAGIC
from tokenflow_sdk.server.errors import ApiError
from tokenflow_sdk.server.models import Models
from tokenflow_sdk.server.routes import read_json

__all__ = ["TFC", "CodesJson", "Options", "Read", "picture_bytes", "read_codes", "read_inputs"]

TFC = "application/vnd.tokenflow.codes"
"""Media type of a `.tfc` file."""
_FIELDS = ("image", "image[]", "images", "file", "tfc")
"""Names of a form's fields that are files; others are options."""
_MOST_OPTIONS = 64
Read = Callable[[], bytes]
"""Gives the content of a picture file, and may take a while for it."""


class Options(BaseModel):
    """How pictures are read; every field may also be in the query or in a form."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str | None, Field(description="name of the tokenizer, as /v1/models gives it")] = None
    preprocess: Annotated[Preprocess | None, Field(description="how pictures are made square")] = None
    color: Annotated[Color, Field(description="what becomes of colour profiles")] = "srgb"
    scales: Annotated[int | None, Field(ge=1, description="only so many of the coarsest scales")] = None


class CodesJson(BaseModel):
    """Codes of a picture, as JSON: indices, or a `.tfc` file as base64."""

    model_config = ConfigDict(extra="ignore")

    indices: Annotated[
        list[int] | None, Field(max_length=65536, fail_fast=True, description="code indices of some whole scales")
    ] = None
    tfc: Annotated[str | None, Field(description="a .tfc file, as base64")] = None
    codebook: Annotated[str | None, Field(description="SHA-256 of the codebook; others than the server's are refused")] = None


class Inputs(NamedTuple):
    """Pictures or codes of a body, in order, and its options."""

    pictures: list[Read]
    codes: list[CodesJson | bytes]
    options: dict[str, Any]


async def read_inputs(request: Request, models: Models) -> Inputs:
    """Pictures and codes of a body of any of the three forms.

    Raises:
        ApiError: it has another form, is damaged, or has none or too many.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        found = _from_json(await read_json(await request.body(), models), models.settings.max_images)
    elif kind == "multipart/form-data":
        form, most = await request.body(), models.settings.max_images
        found = await models.in_thread(lambda: _from_form(request.headers["content-type"], form, most))
    elif kind.startswith("image/") or kind in (TFC, "application/octet-stream", "binary/octet-stream"):
        data = await request.body()
        is_codes = kind == TFC or (not kind.startswith("image/") and data.startswith(MAGIC))
        found = Inputs([], [data], {}) if is_codes else Inputs([lambda: data], [], {})
    else:
        raise ApiError(
            415,
            f"Bodies of type {kind[:100]!r} are not read. Send image/*, {TFC}, multipart/form-data or application/json.",
            param="Content-Type",
        )
    count = len(found.pictures) + len(found.codes)
    if not count:
        raise ApiError(422, "The request has no picture: its body is empty, or has no field `image`.", param="image")
    _require_images(count, models.settings.max_images)
    options = {**request.query_params, **found.options}
    if len(options) > _MOST_OPTIONS:
        raise ApiError(422, f"The request has {len(options)} options, of which most are not known.")
    return found._replace(options=options)


def picture_bytes(text: str, name: str = "image") -> bytes:
    """The content of a picture file given as base64, or as a data URL of it.

    Raises:
        ApiError: it is neither.
    """
    if text[:8].lower().startswith(("http://", "https://")):
        raise ApiError(422, "Pictures are not fetched from URLs. Send them as data URLs or base64.", "remote_url", name)
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ApiError(422, f"{name} is a data URL without base64. Begin it with data:image/png;base64,", param=name)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(422, f"{name} is neither base64 nor a data URL of it.", param=name) from None


def read_codes(given: CodesJson | bytes, models: Models, scales: int | None = None) -> Codes:
    """Codes of the server's tokenizer, at most so many of their scales.

    Raises:
        ApiError: they are given in no way, or for another codebook.
        CodesError: they are damaged, or of another tokenizer.
    """
    tok = models.tokenizer
    if isinstance(given, bytes):
        codes = Codes.from_bytes(given)
    elif given.tfc is not None:
        codes = Codes.from_bytes(picture_bytes(given.tfc, "tfc"))
    elif given.indices is not None:
        mine = tok.config.codebook_sha256
        if given.codebook and not mine.startswith(given.codebook.lower()):
            raise ApiError(422, f"The codes are of codebook {given.codebook[:64]!r}, not of {mine}.", param="codebook")
        if any(abs(each) >= 2**31 for each in given.indices):
            raise ApiError(422, f"Codes are 0 .. {tok.config.codebook_size - 1}.", param="indices")
        codes = tok.codes(np.asarray(given.indices, np.int32))
    else:
        raise ApiError(422, "Give codes as `indices` or as `tfc`.", param="indices")
    tok.require(codes)
    return codes if scales is None else codes.truncate(min(scales, codes.n_scales))


def _from_json(data: Any, most: int) -> Inputs:
    if not isinstance(data, dict):
        raise ApiError(422, "The body is no JSON object.")
    pictures = data.pop("images", None) if "images" in data else ([data.pop("image")] if "image" in data else [])
    codes = data.pop("data", None) if "data" in data else ([data.pop("codes")] if "codes" in data else [])
    if {"tfc", "indices"} & data.keys():
        codes = [{name: data.pop(name) for name in ("tfc", "indices", "codebook") if name in data}]
    for name, values, wanted in (("images", pictures, str), ("data", codes, dict)):
        if not isinstance(values, list) or not all(isinstance(each, wanted) for each in values):
            kind = "base64 texts" if wanted is str else "objects with `indices` or `tfc`"
            raise ApiError(422, f"{name} is no list of {kind}.", param=name)
        _require_images(len(values), most)
    return Inputs([partial(picture_bytes, each) for each in pictures], [CodesJson.model_validate(each) for each in codes], data)


def _from_form(kind: str, body: bytes, most: int) -> Inputs:
    """Parts of a form; they stay in memory, whose size the body's limit bounds."""
    files: list[tuple[str, bytes]] = []
    options: dict[str, Any] = {}
    ended: list[bool] = []

    def on_field(field: Any) -> None:
        options[_text(field.field_name)] = _text(field.value or b"")
        _require_few(len(options), _MOST_OPTIONS)

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        files.append((_text(file.field_name), file.file_object.read()))
        _require_few(len(files), 4 * most)

    boundary = parse_options_header(kind)[1].get(b"boundary")
    try:
        config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
        parser = FormParser("multipart/form-data", on_field, on_file, lambda: ended.append(True), boundary, config=config)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise ApiError(400, f"The form cannot be read: {str(error).rstrip('.')[:200]}.") from None
    if not ended:
        raise ApiError(400, "The form ends before its last boundary.")
    if unknown := [name for name, _ in files if name not in _FIELDS]:
        raise ApiError(422, f"The form's file {unknown[0][:100]!r} is not known. Call it `image`.", param=unknown[0][:100])
    codes: list[CodesJson | bytes] = [data for name, data in files if _is_codes(name, data)]
    return Inputs([partial(bytes, data) for name, data in files if not _is_codes(name, data)], codes, options)


def _require_images(count: int, most: int) -> None:
    if count > most:
        raise ApiError(422, f"The request has {count} pictures; the most is {most}.", "too_many_images", "images")


def _is_codes(name: str, data: bytes) -> bool:
    return name == "tfc" or data.startswith(MAGIC)


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace")


def _require_few(count: int, most: int) -> None:
    if count > most:
        raise ApiError(422, "The form has too many parts.", "too_many_images", "image")
