from __future__ import annotations

import importlib
import re
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tokenflow_sdk.server import Settings, create_app

PAGE = files("tokenflow_sdk.server.page")
FILES = {each.name: each.read_bytes() for each in PAGE.iterdir() if each.name[0] != "_"}
CSP = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' blob: data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
}


def opened(**settings: object) -> TestClient:
    """A client of an app whose models are not opened: the page needs none."""
    return TestClient(create_app(Settings(**settings)), "http://localhost")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def client() -> TestClient:
    return opened()


@pytest.mark.parametrize("name", sorted(FILES))
def test_each_file_is_served_with_its_type_and_the_policy(client: TestClient, name: str) -> None:
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    path = "/" if name == "index.html" else f"/page/{name}"
    answer = client.get(path)
    assert (answer.status_code, answer.content) == (200, FILES[name])
    assert answer.headers["content-type"].partition(";")[0] == kinds[name.rpartition(".")[2]]
    assert set(answer.headers["content-security-policy"].split("; ")) == CSP
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.head(path).headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize("name", ["none.js", "__init__.py", "..%2f__init__.py", "%2e%2e/app.py"])
def test_no_other_file_is_served(client: TestClient, name: str) -> None:
    answer = client.get(f"/page/{name}")
    assert (answer.status_code, set(answer.json())) == (404, {"error"})


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_fetched_from_elsewhere_and_nothing_needs_a_laxer_policy(name: str) -> None:
    text = FILES[name].decode().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+|@import|url\(|\beval\b|innerHTML", text) == []
    if name == "index.html":
        assert re.findall(r"<script>|<style|\sstyle=|\son\w+=", text) == []
        # Relative, so that the page also works under a path of another server's.
        assert {each[:5] for each in re.findall(r'(?:src|href)="([^"]+)"', text)} == {"page/"}
    for module in re.findall(r'from "\./([\w.]+)"', text):
        assert module in FILES


def test_the_page_is_open_where_the_interface_asks_for_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-key\n")
    client = opened(api_key_file=tmp_path / "keys")
    assert [client.get(path).status_code for path in ("/", "/page/page.js", "/v1/models")] == [200, 200, 401]


def test_the_page_is_read_as_package_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an archive, where no file has a path of its own."""
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for name in [*FILES, "__init__.py"]:
            archive.write(str(PAGE / name), f"packed_page/{name}")
    monkeypatch.syspath_prepend(tmp_path / "packed.zip")
    app = FastAPI()
    app.include_router(importlib.import_module("packed_page").router())
    assert TestClient(app).get("/page/page.css").content == FILES["page.css"]
