from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest

from tests.conftest import ROOT
from tests.support.waiting import comes_true
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig

PHOTO = (ROOT / "examples" / "chelsea.jpg").read_bytes()


def test_health_and_models(client: httpx.Client, url: str, mini_bundle: Path) -> None:
    config = Bundle.open(mini_bundle, TokenizerConfig).config
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/readyz").json() == {"status": "ready"}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as listing:
        names = {each.id: each.abilities for each in listing.models.list()}  # type: ignore[attr-defined]
    assert sorted(ability for abilities in names.values() for ability in abilities) == [
        "chat",
        "embeddings",
        "generations",
        "tokens",
    ]
    for name in names:
        found = client.get(f"/v1/models/{name}").json()
        assert (found["id"], found["image_size"], found["patch_nums"]) == (name, config.image_size, list(config.patch_nums))
    assert client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"


def test_metrics_count(client: httpx.Client) -> None:
    def value(line: str) -> float:
        text = client.get("/metrics").text
        return next((float(each.rsplit(" ", 1)[1]) for each in text.splitlines() if each.startswith(line)), 0.0)

    names = [
        'tokenflow_requests_total{route="/v1/images/tokens",status="200"}',
        'tokenflow_request_seconds_count{route="/v1/images/tokens"}',
        'tokenflow_stage_seconds_count{stage="picture"}',
        'tokenflow_stage_seconds_count{stage="engine"}',
        'tokenflow_batch_size_count{operation="encode"}',
    ]
    before = [value(name) for name in names]
    client.post("/v1/images/tokens", content=PHOTO, headers={"Content-Type": "image/jpeg"})
    # An answer is counted when it has been sent, and it is here before that.
    assert comes_true(lambda: [value(name) - old for name, old in zip(names, before, strict=True)] == [1] * len(names))
    for name in ("tokenizer", "generator", "understander"):
        assert value(f'tokenflow_engines_ready{{model="{name}"}}') == 1
    assert value("tokenflow_queue_depth") == 0
    assert comes_true(lambda: value("tokenflow_requests_under_way") == 0)


@pytest.mark.parametrize("path, status", [("/nothing", 404), ("/v1/images/tokens", 405), ("/v2/models/none", 404)])
def test_unknown_routes_and_methods_are_errors_in_the_envelope(client: httpx.Client, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert answer.headers.get("allow") == ("POST" if status == 405 else None)


def test_the_interface_is_described(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/images/tokens", "/v1/images/generations", "/v1/chat/completions", "/v2/models/{name}/infer"} <= set(paths)


def test_nothing_is_shown_that_other_hosts_serve(client: httpx.Client) -> None:
    assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]
