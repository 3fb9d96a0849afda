"""Routes of the Open Inference Protocol, version 2, for `encode`, `decode` and `semantic`, with JSON and binary tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from tokenflow_sdk import __version__
from tokenflow_sdk.server.answers import JsonAnswer
from tokenflow_sdk.server.errors import ApiError
from tokenflow_sdk.server.models import Models
from tokenflow_sdk.server.routes import WorkRoute, gathered, require_few_values, unless_small

__all__ = ["router"]

_TYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "INT32": np.dtype("<i4"), "FP32": np.dtype("<f4")}
_HEADER = "Inference-Header-Content-Length"


class Parameters(BaseModel):
    """Of a tensor or a request. Others are read and mean nothing here."""

    model_config = ConfigDict(extra="ignore")
    binary_data_size: Annotated[int | None, Field(ge=0)] = None
    binary_data: bool = False
    binary_data_output: bool = False


class InputTensor(BaseModel):
    """A tensor that is sent."""

    model_config = ConfigDict(extra="ignore")
    name: str
    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**31)]], Field(max_length=8)]
    datatype: Literal["UINT8", "INT32", "FP32"]
    parameters: Parameters = Parameters()
    data: Any = None


class OutputTensor(BaseModel):
    """A tensor that is asked for."""

    model_config = ConfigDict(extra="ignore")
    name: str
    parameters: Parameters = Parameters()


class InferRequest(BaseModel):
    """A request of inference."""

    model_config = ConfigDict(extra="ignore")
    id: str | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=8)]
    outputs: Annotated[list[OutputTensor], Field(max_length=8)] = []
    parameters: Parameters = Parameters()


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "inputs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name", "shape", "datatype"],
                                "properties": {
                                    "name": {"type": "string"},
                                    "shape": {"type": "array", "items": {"type": "integer"}},
                                    "datatype": {"enum": list(_TYPES)},
                                    "data": {"type": "array"},
                                },
                            },
                        },
                    },
                }
            }
        },
    }
}


class _Tensor(NamedTuple):
    name: str
    datatype: str
    shape: tuple[int, ...]
    """Of one row; the first dimension of the tensor is the batch."""

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.shape]}


class _Model(NamedTuple):
    input: _Tensor
    output: _Tensor
    run: Callable[[NDArray[Any]], Awaitable[NDArray[Any]]]
    """Of one row."""

    def metadata(self, name: str) -> dict[str, Any]:
        inputs, outputs = [self.input.metadata()], [self.output.metadata()]
        return {"name": name, "versions": ["1"], "platform": "tokenflow_sdk", "inputs": inputs, "outputs": outputs}


def router(models: Models) -> APIRouter:
    """The routes over some models."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], route_class=WorkRoute)

    def model(name: str, version: str = "1") -> _Model:
        models.require_ready()
        served = _served(models)
        if name not in served or version != "1":
            names = ", ".join(served)
            raise ApiError(404, f"There is no model {name[:200]!r} of this version; there are {names}.", "model_not_found")
        return served[name]

    @routes.get("", summary="The server")
    async def server() -> dict[str, Any]:
        return {"name": "tokenflow-sdk", "version": __version__, "extensions": ["binary_tensor_data"]}

    @routes.get("/health/live", summary="Whether the process lives")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @routes.get("/health/ready", summary="Whether the models are open and warm")
    async def ready() -> Response:
        return JsonAnswer({"ready": models.ready}, 200 if models.ready else 503)

    @routes.get("/models/{name}", summary="Inputs and outputs of a model")
    @routes.get("/models/{name}/versions/{version}", include_in_schema=False)
    async def metadata(name: str, version: str = "1") -> dict[str, Any]:
        return model(name, version).metadata(name)

    @routes.get("/models/{name}/ready", summary="Whether a model can be asked")
    @routes.get("/models/{name}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(name: str, version: str = "1") -> dict[str, Any]:
        model(name, version)
        return {"name": name, "ready": True}

    @routes.post("/models/{name}/infer", summary="Run a model on a batch", openapi_extra=_BODY)
    @routes.post("/models/{name}/versions/{version}/infer", include_in_schema=False)
    async def infer(request: Request, name: str, version: str = "1") -> Response:
        asked = model(name, version)
        head, binary = _split(await request.body(), request.headers.get(_HEADER))
        parsed, rows = await unless_small(models, len(head), lambda: _read(head, binary, asked, models.settings.max_images))
        results = await gathered(map(asked.run, rows))
        return await models.in_thread(lambda: _response(name, parsed, np.stack(results), asked.output))

    return routes


def _served(models: Models) -> dict[str, _Model]:
    c = models.tokenizer.config
    images = _Tensor("images", "UINT8", (c.image_size, c.image_size, 3))
    codes = _Tensor("code_indices", "INT32", (c.n_codes,))
    features = _Tensor("features", "FP32", (c.grid**2, c.semantic_width))
    return {
        "encode": _Model(images, codes, models.encoded),
        "decode": _Model(codes, images, models.decoded_array),
        "semantic": _Model(codes, features, models.semantic_array),
    }


def _split(body: bytes, length: str | None) -> tuple[bytes, memoryview]:
    """JSON and the binary tensors behind it."""
    size = len(body) if length is None else int(length) if re.fullmatch("[0-9]{1,12}", length) else -1
    if not 0 <= size <= len(body):
        raise ApiError(400, f"{_HEADER} is {str(length)[:40]!r}, and the body has {len(body)} bytes.", param=_HEADER)
    return body[:size], memoryview(body)[size:]


def _read(head: bytes, binary: memoryview, model: _Model, most: int) -> tuple[InferRequest, NDArray[Any]]:
    """The request and its input tensor.

    Raises:
        ApiError: the model does not read this, or does not give what is asked for.
        ValidationError: it is no request.
    """
    # A value of a tensor has at most one bracket before it, where each is in a list of its own.
    require_few_values(head, 2**16 + 2 * most * int(np.prod(model.input.shape)))
    try:
        request = InferRequest.model_validate_json(head)
    except RecursionError:
        raise ApiError(400, "The body is no JSON: it is nested too deeply.") from None
    if request.outputs and [each.name for each in request.outputs] != [model.output.name]:
        raise ApiError(422, f"The model gives one output, {model.output.name!r}.", param="outputs")
    return request, _input(request, binary, model.input, most)


def _input(request: InferRequest, binary: memoryview, tensor: _Tensor, most: int) -> NDArray[Any]:
    """The input tensor, checked.

    Raises:
        ApiError: it is not what the model reads.
    """
    if [each.name for each in request.inputs] != [tensor.name]:
        names = ", ".join(each.name for each in request.inputs)[:200]
        raise ApiError(422, f"The model reads one input {tensor.name!r}, not {names!r}.", param="inputs")
    given = request.inputs[0]
    if given.datatype != tensor.datatype or tuple(given.shape[1:]) != tensor.shape or not given.shape:
        wanted = f"{tensor.datatype}{[-1, *tensor.shape]}"
        raise ApiError(422, f"{tensor.name} must be {wanted}, not {given.datatype}{given.shape}.", param="inputs")
    if given.shape[0] > most:
        raise ApiError(422, f"A batch of {given.shape[0]} is too large; the most is {most}.", "too_many_images", "inputs")
    kind, count = _TYPES[tensor.datatype], int(np.prod(given.shape))
    size = given.parameters.binary_data_size
    if size is not None:
        if given.data is not None or size != len(binary) or size != count * kind.itemsize:
            told = f"binary_data_size is {size}, {len(binary)} bytes came"
            raise ApiError(422, f"{tensor.name} has {count * kind.itemsize} bytes; {told}.", param="inputs")
        return np.frombuffer(binary, kind).reshape(given.shape)
    if binary:
        raise ApiError(422, "Bytes follow the JSON, and no input has `binary_data_size`.", param="inputs")
    values, limits = _flat(given.data, count), np.iinfo(kind)
    if len(values) != count or not all(type(each) is int and limits.min <= each <= limits.max for each in values):
        raise ApiError(422, f"data of {tensor.name} must be {count} integers of type {tensor.datatype}.", param="inputs")
    return np.asarray(values, kind).reshape(given.shape)


def _flat(data: Any, most: int) -> list[Any]:
    """The values of nested lists, or of a flat one, in order; of more than so many no list is made."""
    while isinstance(data, list) and data and all(isinstance(each, list) for each in data) and sum(map(len, data)) <= most:
        data = [value for part in data for value in part]
    return data if isinstance(data, list) else []


def _response(name: str, request: InferRequest, result: NDArray[Any], tensor: _Tensor) -> Response:
    asked = request.outputs[0].parameters.binary_data if request.outputs else False
    binary = asked or request.parameters.binary_data_output
    output: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(result.shape)}
    data = np.ascontiguousarray(result, _TYPES[tensor.datatype])
    if binary:
        output["parameters"] = {"binary_data_size": data.nbytes}
    else:
        output["data"] = data.reshape(-1).tolist()
    head = {"model_name": name, "model_version": "1", "outputs": [output]} | ({"id": request.id} if request.id else {})
    if not binary:
        return JsonAnswer(head)
    text = json.dumps(head).encode()
    headers = {_HEADER: str(len(text))}
    return Response(text + data.tobytes(), media_type="application/octet-stream", headers=headers)
