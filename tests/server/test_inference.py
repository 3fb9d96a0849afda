from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from tests.conftest import ROOT
from tokenflow_sdk import Tokenizer

PHOTO = ROOT / "examples" / "chelsea.jpg"


@pytest.fixture(scope="module")
def tokenizer(mini_bundle: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(mini_bundle)


@pytest.fixture
def client(url: str) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    yield client
    client.close()


def infer(
    client: triton.InferenceServerClient, model: str, name: str, array: np.ndarray, output: str, binary: bool
) -> np.ndarray:
    kinds = {"uint8": "UINT8", "int32": "INT32"}
    tensor = triton.InferInput(name, list(array.shape), kinds[str(array.dtype)])
    tensor.set_data_from_numpy(array, binary_data=binary)
    asked = triton.InferRequestedOutput(output, binary_data=binary)
    found: np.ndarray = client.infer(model, [tensor], outputs=[asked]).as_numpy(output)
    return found


def test_health_and_metadata(client: triton.InferenceServerClient, tokenizer: Tokenizer) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    size = tokenizer.config.image_size
    for name in ("encode", "decode", "semantic"):
        assert client.is_model_ready(name) and client.is_model_ready(name, "1")
        assert client.get_model_metadata(name, "1")["name"] == name
    assert client.get_model_metadata("encode")["inputs"] == [
        {"name": "images", "datatype": "UINT8", "shape": [-1, size, size, 3]}
    ]
    assert not client.is_model_ready("other")


@pytest.mark.parametrize("binary", [True, False])
def test_nvidias_client_gets_what_the_sdk_gives(
    client: triton.InferenceServerClient, tokenizer: Tokenizer, binary: bool
) -> None:
    pixels = np.stack([tokenizer.preprocess(PHOTO), 255 - tokenizer.preprocess(PHOTO)])
    codes = infer(client, "encode", "images", pixels, "codes", binary).copy()
    np.testing.assert_array_equal(codes, tokenizer.encode_array(pixels))
    codes[1, 5:] = -1
    np.testing.assert_array_equal(infer(client, "decode", "codes", codes, "images", binary), tokenizer.decode_array(codes))
    np.testing.assert_array_equal(infer(client, "semantic", "codes", codes, "features", binary), tokenizer.semantic(codes))


def test_without_outputs_the_client_gets_all_in_binary(client: triton.InferenceServerClient, tokenizer: Tokenizer) -> None:
    pixels = tokenizer.preprocess(PHOTO)[None]
    tensor = triton.InferInput("images", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels)
    result = client.infer("encode", [tensor], request_id="mine")
    np.testing.assert_array_equal(result.as_numpy("codes"), tokenizer.encode_array(pixels))
    assert result.get_response()["id"] == "mine"


def tensor(**changes: object) -> dict[str, object]:
    return {"name": "codes", "shape": [1, 30], "datatype": "INT32", "data": [0] * 30} | changes


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [tensor(), tensor()],
        [tensor(name="images")],
        [tensor(shape=[1, 29])],
        [tensor(shape=[])],
        [tensor(shape=[2**31, 30])],
        [tensor(shape=[17, 30], data=[0] * 17 * 30)],
        [tensor(datatype="FP32")],
        [tensor(datatype="BYTES")],
        [tensor(data=[0] * 29)],
        [tensor(data=[0.5] * 30)],
        [tensor(data=["0"] * 30)],
        [tensor(data=[2**31] * 30)],
        [tensor(data=[10**6] * 30)],
        [tensor(data=[-1] + [0] * 29)],
        [tensor(data=None)],
        [tensor(data=None, parameters={"binary_data_size": 120})],
        [tensor(data=None, parameters={"binary_data_size": -1})],
    ],
)
def test_wrong_tensors_are_named(url: str, inputs: object) -> None:
    answer = httpx.post(f"{url}/v2/models/decode/infer", json={"inputs": inputs})
    if answer.status_code == 200:  # leaving out the first scale as a whole is fine
        assert inputs == [tensor(data=[-1] + [0] * 29)]
        return
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("length, status", [("9999", 400), ("-1", 400), ("x", 400), ("10", 422), ("0", 422)])
def test_wrong_lengths_of_the_json_are_named(url: str, length: str, status: int) -> None:
    body = json.dumps({"inputs": [tensor()]}).encode()
    answer = httpx.post(f"{url}/v2/models/decode/infer", content=body, headers={"Inference-Header-Content-Length": length})
    assert answer.status_code == status, answer.text
