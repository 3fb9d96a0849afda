from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import ROOT
from tokenflow_sdk import Tokenizer

PHOTO = ROOT / "examples" / "chelsea.jpg"
KINDS = {"UINT8": np.dtype("u1"), "INT32": np.dtype("<i4"), "FP32": np.dtype("<f4")}
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def tokenizer(mini_bundle: Path) -> Iterator[Tokenizer]:
    with Tokenizer.from_pretrained(mini_bundle) as opened:
        yield opened


def infer(client: httpx.Client, model: str, name: str, array: np.ndarray, output: str, binary: bool) -> np.ndarray:
    """What the protocol's clients send and read, with JSON or binary tensors."""
    kind = next(kind for kind, dtype in KINDS.items() if dtype == array.dtype)
    given: dict[str, object] = {"name": name, "shape": list(array.shape), "datatype": kind}
    asked = {"name": output, "parameters": {"binary_data": binary}}
    body = given | ({"parameters": {"binary_data_size": array.nbytes}} if binary else {"data": array.tolist()})
    head = json.dumps({"id": "mine", "inputs": [body], "outputs": [asked]}).encode()
    headers = {LENGTH: str(len(head))} if binary else {}
    answer = client.post(f"/v2/models/{model}/infer", content=head + (array.tobytes() if binary else b""), headers=headers)
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get(LENGTH, len(answer.content)))
    found = json.loads(answer.content[:length])
    assert (found["id"], found["model_name"]) == ("mine", model)
    (result,) = found["outputs"]
    dtype, rest = KINDS[result["datatype"]], answer.content[length:]
    assert (result["name"], len(rest)) == (output, result.get("parameters", {}).get("binary_data_size", 0))
    values = np.frombuffer(rest, dtype) if binary else np.asarray(result["data"], dtype)
    return values.reshape(result["shape"])


def test_health_and_metadata(client: httpx.Client, tokenizer: Tokenizer) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    size = tokenizer.config.image_size
    for name in ("encode", "decode", "semantic"):
        for path in (f"/v2/models/{name}", f"/v2/models/{name}/versions/1"):
            assert client.get(f"{path}/ready").json()["ready"] is True
            assert client.get(path).json()["name"] == name
    assert client.get("/v2/models/encode").json()["inputs"] == [
        {"name": "images", "datatype": "UINT8", "shape": [-1, size, size, 3]}
    ]
    for path in ("/v2/models/other", "/v2/models/other/ready", "/v2/models/encode/versions/2"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize("binary", [True, False])
def test_models_give_what_the_sdk_gives(client: httpx.Client, tokenizer: Tokenizer, binary: bool) -> None:
    pixels = np.stack([tokenizer.preprocess(PHOTO), 255 - tokenizer.preprocess(PHOTO)])
    codes = infer(client, "encode", "images", pixels, "code_indices", binary).copy()
    np.testing.assert_array_equal(codes, tokenizer.encode_array(pixels))
    codes[1, 5:] = -1
    np.testing.assert_array_equal(
        infer(client, "decode", "code_indices", codes, "images", binary), tokenizer.decode_array(codes)
    )
    np.testing.assert_array_equal(
        infer(client, "semantic", "code_indices", codes, "features", binary), tokenizer.semantic(codes)
    )


NVIDIAS_CLIENT = """
import sys
import numpy as np
import tritonclient.http as triton

address, file = sys.argv[1:]
arrays = np.load(file)
client = triton.InferenceServerClient(address)
assert client.is_server_live() and client.is_server_ready()
assert client.is_model_ready("encode") and client.is_model_ready("encode", "1") and not client.is_model_ready("other")
assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
assert client.get_model_metadata("encode", "1")["name"] == "encode"
for binary in (True, False):
    models = ("encode", "images", "UINT8", "code_indices"), ("decode", "code_indices", "INT32", "images")
    for model, name, kind, output in models:
        tensor = triton.InferInput(name, list(arrays[name].shape), kind)
        tensor.set_data_from_numpy(arrays[name], binary_data=binary)
        wanted = arrays["decoded" if model == "decode" else output]
        asked = [triton.InferRequestedOutput(output, binary_data=binary)]
        np.testing.assert_array_equal(client.infer(model, [tensor], outputs=asked).as_numpy(output), wanted)
        # Without outputs the client asks for all in binary.
        np.testing.assert_array_equal(client.infer(model, [tensor]).as_numpy(output), wanted)
client.close()
"""


@pytest.mark.slow
def test_nvidias_client_works(url: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """In an environment of its own, because it wants other versions of packages."""
    pixels = tokenizer.preprocess(PHOTO)[None]
    codes = tokenizer.encode_array(pixels)
    np.savez(tmp_path / "arrays.npz", images=pixels, code_indices=codes, decoded=tokenizer.decode_array(codes))
    command = [sys.executable, "-m", "uv", "run", "--quiet", "--no-project", "--with", "tritonclient[http]", "python", "-c"]
    arguments = [NVIDIAS_CLIENT, url.removeprefix("http://"), str(tmp_path / "arrays.npz")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr


def tensor(**changes: object) -> dict[str, object]:
    return {"name": "code_indices", "shape": [1, 30], "datatype": "INT32", "data": [0] * 30} | changes


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
        [tensor(data=[[0] * 30] * 1000)],
        [tensor(data=[[]] * 1000)],
        [tensor(data=[[[0]] * 29])],
    ],
)
def test_wrong_tensors_are_named(url: str, inputs: object) -> None:
    answer = httpx.post(f"{url}/v2/models/decode/infer", json={"inputs": inputs})
    if answer.status_code == 200:  # leaving out the first scale as a whole is fine
        assert inputs == [tensor(data=[-1] + [0] * 29)]
        return
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "length, status",
    [("9999", 400), ("-1", 400), ("x", 400), ("\xb2", 400), ("1" * 5000, 400), ("", 400), ("10", 422), ("0", 422)],
)
def test_wrong_lengths_of_the_json_are_named(url: str, length: str, status: int) -> None:
    body = json.dumps({"inputs": [tensor()]}).encode()
    answer = httpx.post(f"{url}/v2/models/decode/infer", content=body, headers={LENGTH.encode(): length.encode("latin-1")})
    assert answer.status_code == status, answer.text


def test_wrong_outputs_are_named_before_the_model_runs(client: httpx.Client) -> None:
    def calls() -> list[str]:
        return [line for line in client.get("/metrics").text.splitlines() if "tokenflow_batch" in line]

    before = calls()
    body = {"inputs": [tensor()], "outputs": [{"name": "other"}]}
    answer = client.post("/v2/models/decode/infer", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "outputs")
    assert before and calls() == before
