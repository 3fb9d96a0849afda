from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tokenflow_sdk import Codes, Tokenizer
from tokenflow_sdk.server.bodies import TFC

PHOTO = (ROOT / "examples" / "chelsea.jpg").read_bytes()


@pytest.fixture(scope="module")
def tokenizer(mini_bundle: Path) -> Iterator[Tokenizer]:
    with Tokenizer.from_pretrained(mini_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def codes(tokenizer: Tokenizer) -> Codes:
    return tokenizer.encode(PHOTO)


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def bodies() -> list[dict[str, object]]:
    text = base64.b64encode(PHOTO).decode()
    return [
        {"content": PHOTO, "headers": {"Content-Type": "image/jpeg"}},
        {"content": PHOTO, "headers": {"Content-Type": "application/octet-stream"}},
        {"files": {"image": ("cat.jpg", PHOTO)}},
        {"json": {"image": text}},
        {"json": {"images": [f"data:image/jpeg;base64,{text}"]}},
    ]


@pytest.mark.parametrize("body", bodies(), ids=["image", "bytes", "form", "base64", "data-url"])
def test_a_picture_in_any_form_gives_the_codes_of_the_sdk(client: httpx.Client, codes: Codes, body: dict[str, object]) -> None:
    answer = client.post("/v1/images/tokens", **body).json()
    (found,) = answer["data"]
    assert found["indices"] == codes.indices.tolist()
    assert Codes.from_bytes(base64.b64decode(found["tfc"])) == codes
    assert (found["n_scales"], found["patch_nums"], found["scale_ends"]) == (4, [1, 2, 3, 4], codes.scale_ends)
    assert answer["usage"]["total_tokens"] == len(codes)


def test_a_picture_comes_back_as_it_was_encoded_where_that_is_asked(client: httpx.Client, tokenizer: Tokenizer) -> None:
    form = client.post("/v1/images/tokens", data={"prepared": "true", "preprocess": "pad"}, files={"image": PHOTO}).json()
    found = picture(base64.b64decode(form["data"][0]["prepared"]))
    assert np.array_equal(found, tokenizer.preprocess(PHOTO, preprocess="pad"))
    assert "prepared" not in client.post("/v1/images/tokens", files={"image": PHOTO}).json()["data"][0]


def test_several_pictures_keep_their_order(client: httpx.Client, tokenizer: Tokenizer) -> None:
    files = []
    for shade in (0, 90, 255):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), (shade, 10, 200)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    answer = client.post("/v1/images/tokens", files=[("image[]", ("x.png", file)) for file in files]).json()
    assert [each["indices"] for each in answer["data"]] == [tokenizer.encode(file).indices.tolist() for file in files]


def test_options_are_those_of_encode(client: httpx.Client, tokenizer: Tokenizer) -> None:
    wanted = tokenizer.encode(PHOTO, preprocess="pad", color="as-stored").truncate(2)
    query = {"preprocess": "pad", "color": "as-stored", "scales": "2"}
    raw = client.post("/v1/images/tokens", params=query, content=PHOTO, headers={"Content-Type": "image/jpeg", "Accept": TFC})
    assert raw.headers["content-type"] == TFC
    assert Codes.from_bytes(raw.content) == wanted
    form = client.post("/v1/images/tokens", data=query, files={"image": PHOTO}).json()
    assert base64.b64decode(form["data"][0]["tfc"]) == raw.content


@pytest.mark.parametrize("form", ["tfc", "octets", "json", "indices", "form"])
def test_codes_in_any_form_give_the_picture_of_the_sdk(
    client: httpx.Client, tokenizer: Tokenizer, codes: Codes, form: str
) -> None:
    data = codes.to_bytes()
    body: dict[str, object] = {
        "tfc": {"content": data, "headers": {"Content-Type": TFC}},
        "octets": {"content": data, "headers": {"Content-Type": "application/octet-stream"}},
        "json": {"json": {"tfc": base64.b64encode(data).decode()}},
        "indices": {"json": {"indices": codes.indices.tolist(), "codebook": codes.codebook_id}},
        "form": {"files": {"tfc": ("cat.tfc", data)}},
    }[form]
    answer = client.post("/v1/images/decode", **body)
    assert answer.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(picture(answer.content), np.asarray(tokenizer.decode(codes)))
    coarse = client.post("/v1/images/decode?scales=2&format=webp", **body)
    assert coarse.headers["content-type"] == "image/webp"
    exact = client.post("/v1/images/decode?scales=2", **body)
    np.testing.assert_array_equal(picture(exact.content), np.asarray(tokenizer.decode(codes.truncate(2))))


def test_several_codes_are_decoded_as_json(client: httpx.Client, tokenizer: Tokenizer, codes: Codes) -> None:
    both = [codes, codes.truncate(3)]
    data = [{"tfc": base64.b64encode(each.to_bytes()).decode()} for each in both]
    answer = client.post("/v1/images/decode", json={"data": data}).json()
    for found, wanted in zip(answer["data"], both, strict=True):
        np.testing.assert_array_equal(picture(base64.b64decode(found["b64_json"])), np.asarray(tokenizer.decode(wanted)))


@pytest.mark.parametrize("name", ["features", "semantic"])
def test_features_are_those_of_the_sdk(client: httpx.Client, tokenizer: Tokenizer, codes: Codes, name: str) -> None:
    wanted = getattr(tokenizer, name)(codes)
    of_codes = client.post(f"/v1/images/{name}", content=codes.to_bytes(), headers={"Content-Type": TFC}).json()["data"][0]
    assert of_codes["shape"] == list(wanted.shape)
    np.testing.assert_array_equal(np.asarray(of_codes["values"], np.float32), wanted)
    npy = client.post(f"/v1/images/{name}", files={"image": PHOTO}, headers={"Accept": "application/x-npy"})
    np.testing.assert_array_equal(np.load(io.BytesIO(npy.content)), wanted[None])


FORM = {"Content-Type": "multipart/form-data; boundary=y"}
WRONG = {
    "no body": ({"content": b"", "headers": {"Content-Type": "image/png"}}, 422),
    "no picture": ({"content": b"abc", "headers": {"Content-Type": "image/png"}}, 422),
    "truncated": ({"content": PHOTO[:500], "headers": {"Content-Type": "image/jpeg"}}, 422),
    "no type": ({"content": PHOTO}, 415),
    "no json": ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400),
    "a list": ({"json": []}, 422),
    "deep": ({"content": b"[" * 50_000, "headers": {"Content-Type": "application/json"}}, 400),
    "no base64": ({"json": {"image": "!"}}, 422),
    "remote": ({"json": {"image": "https://example.org/cat.png"}}, 422),
    "no texts": ({"json": {"images": [1]}}, 422),
    "too many": ({"json": {"images": ["AA=="] * 17}}, 422),
    "too many codes": ({"json": {"data": [{"indices": ["a"]}] * 17}}, 422),
    "too many values": ({"json": {"images": [{}] * 100_000}}, 413),
    "too many options": ({"json": {"image": "AA=="} | {str(i): 0 for i in range(100)}}, 422),
    "unknown field": ({"json": {"image": "AA==", "colour": "srgb"}}, 422),
    "unknown model": ({"json": {"image": "AA==", "model": "x"}}, 404),
    "unknown file": ({"files": {"picture": b"x"}}, 422),
    "no form": ({"content": b"--x", "headers": FORM}, 400),
    "cut form": (
        {"content": b'--y\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc', "headers": FORM},
        400,
    ),
    "no boundary": ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 400),
    "codes": ({"content": b"TFC0", "headers": {"Content-Type": TFC}}, 422),
    "too many scales": ({"content": PHOTO, "headers": {"Content-Type": "image/jpeg"}, "params": {"scales": 9}}, 422),
}


@pytest.mark.parametrize("body, status", WRONG.values(), ids=WRONG)
def test_what_cannot_be_encoded_is_named(client: httpx.Client, body: dict[str, object], status: int) -> None:
    answer = client.post("/v1/images/tokens", **body)
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "code", "param"})
    assert error["message"].endswith(".")


def test_codes_that_cannot_be_decoded_are_named(client: httpx.Client, codes: Codes) -> None:
    data = codes.to_bytes()
    for body in (data[:-1] + b"\0", data[:20], b"", b"TFC"):
        assert client.post("/v1/images/decode", content=body, headers={"Content-Type": TFC}).status_code == 422
    for indices in ([1, 2], [10**6], [-1] * 30, ["a"], [2**40]):
        answer = client.post("/v1/images/decode", json={"indices": indices})
        assert answer.status_code == 422, answer.text
    assert client.post("/v1/images/decode", files={"image": PHOTO}).status_code == 422
    other = client.post("/v1/images/decode", json={"indices": codes.indices.tolist(), "codebook": "ab" * 8})
    assert "codebook" in other.json()["error"]["message"]


def test_one_file_form_cannot_hold_several(client: httpx.Client) -> None:
    files = [("image", PHOTO), ("image", b"not even read")]
    assert client.post("/v1/images/tokens", files=files, headers={"Accept": TFC}).status_code == 406
