"""The page in headless Chromium, on a server of its own with the bundled models, and checked by axe-core."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.support.served import running
from tokenflow_sdk import Tokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need a browser: pip install playwright")

pytestmark = pytest.mark.slow
AXE = "axe-core@4.10.3"
PHOTO = ROOT / "examples" / "chelsea.jpg"
QUIET = "--no-access-log"
SEED_7 = "#prompt=a+red+apple&seed=7&preset=fast"
expect: Any = sync_api.expect
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"Chromium does not start (apt-get install chromium, or playwright install chromium): {error}")
        expect.set_options(timeout=60_000)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(QUIET) as served:
        yield served.url


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens the page, waits until its panels take input or it asks for a key, and fails if it logs an error."""
    contexts, errors = [], []

    def opened(url: str, prepare: Callable[[Any], None] | None = None, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda line: errors.append(line.text) if line.type == "error" and "server responded" not in line.text else 0,
        )
        if prepare is not None:
            prepare(page)
        page.goto(url)
        page.wait_for_selector("main:visible, #key-dialog:visible")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core."""
    folder = tmp_path_factory.mktemp("axe")
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, check=True, capture_output=True, timeout=120)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            found = archive.extractfile("package/axe.min.js")
            assert found is not None
            return found.read().decode()
    pytest.skip(f"npm cannot fetch {AXE}")


def encoded(page: Any, photo: Path = PHOTO) -> None:
    expect(page.locator("main")).to_be_visible()
    page.set_input_files("#file", photo)
    expect(page.locator("#psnr")).to_contain_text("dB")


def drawn(page: Any) -> bytes:
    """The picture's file, once it is drawn."""
    expect(page.locator("#drawing .state")).to_contain_text("Drawn in")
    return downloaded(page, "#drawn-png")[1]


def downloaded(page: Any, selector: str) -> tuple[str, bytes]:
    """Name and content of what a link downloads."""
    with page.expect_download() as found:
        page.click(selector)
    return found.value.suggested_filename, Path(found.value.path()).read_bytes()


def test_a_dropped_picture_is_shown_with_its_reconstructions_and_codes(url: str, visit: Open) -> None:
    tok = Tokenizer.from_pretrained("tiny", threads=1)
    pixels, codes = tok.preprocess(PHOTO), tok.encode(PHOTO)
    page = visit(url)
    script = """(data) => {
        const files = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
        files.items.add(new File([bytes], "cat.jpg", { type: "image/jpeg" }));
        return files;
    }"""
    files = page.evaluate_handle(script, base64.b64encode(PHOTO.read_bytes()).decode())
    page.dispatch_event("#drop", "drop", {"dataTransfer": files})
    for scales in (codes.n_scales, 3, 1):
        page.fill("#picture-scale", str(scales))
        error = np.asarray(tok.decode(codes.truncate(scales)), float) - pixels
        expect(page.locator("#psnr")).to_have_text(f"{10 * np.log10(255**2 / np.mean(error**2)):.1f} dB")
        expect(page.locator("#picture-bytes")).to_have_text(f"{codes.scale_ends[scales - 1]:,}")
        expect(page.locator("#picture-codes")).to_have_text(str(len(codes.truncate(scales))))
        expect(page.locator("#rebuilt")).to_have_attribute("alt", f"cat.jpg rebuilt from {scales} of {codes.n_scales} scales")
    assert downloaded(page, "#picture-tfc") == ("cat.tfc", codes.to_bytes())
    page.fill("#picture-scale", "3")
    box = page.locator("#map").bounding_box()
    side, start = codes.patch_nums[2], len(codes.truncate(2))
    page.hover("#map", position={"x": box["width"] * 1.5 / side, "y": box["height"] * 2.5 / side})
    expect(page.locator("#code")).to_have_text(f"row 3, column 2: code {codes.indices[start + 2 * side + 1]}")
    page.locator("#picture .strip > div").nth(4).hover()
    expect(page.locator("#code")).to_contain_text("scale 5: 8 × 8 codes")


def test_the_same_link_draws_the_same_picture_scale_by_scale(url: str, visit: Open) -> None:
    page = visit(url)
    expect(page.locator("#drawing")).to_be_visible()
    page.fill("#prompt", "a red apple")
    page.fill("#seed", "7")
    page.select_option("#preset", "fast")
    page.click("#draw [type=submit]")
    first = drawn(page)
    assert page.url.endswith(SEED_7)
    assert page.locator("#again").get_attribute("href") == SEED_7
    page.fill("#drawn-scale", "2")
    expect(page.locator("#drawn")).to_have_attribute("alt", re.compile("2 of 9 scales"))
    again = visit(url + "/" + SEED_7)
    assert drawn(again) == first
    again.goto(url + "/#prompt=a+red+apple&seed=8&preset=fast")
    expect(again.locator("#drawn-seed")).to_have_text("8")
    assert drawn(again) != first


def test_a_new_prompt_cancels_the_one_before_and_stop_stops(url: str, visit: Open) -> None:
    page = visit(f"{url}/#prompt=a+cat&seed=1&preset=paper")
    expect(page.locator("#drawn")).to_be_visible()
    page.evaluate(f"location.hash = '{SEED_7}'")
    drawn(page)
    expect(page.locator("#drawn")).to_have_attribute("alt", "Drawing of “a red apple”, 9 of 9 scales")
    page.click("#draw [type=submit]")
    page.click("#draw-stop")
    expect(page.locator("#drawing .state")).to_have_text("Stopped.")
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#drawn-frame")).to_have_attribute("aria-busy", "false")


def test_errors_are_the_servers_words(url: str, visit: Open) -> None:
    page = visit(url)
    expect(page.locator("#server")).to_contain_text("scales")
    page.set_input_files("#file", {"name": "no.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    expect(page.locator("#picture .state")).to_contain_text("not a picture in a known format")
    expect(page.locator("#picture .state")).to_have_class("state wrong")


def test_all_is_done_by_keyboard(url: str, visit: Open) -> None:
    page = visit(url)
    encoded(page)
    page.focus("#file")
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.type"))
        if seen[-1] == "map":
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowDown")
            expect(page.locator("#code")).to_contain_text("row 2, column 2: code")
            page.keyboard.press("Escape")
            expect(page.locator("#map")).not_to_have_class("shown")
        elif seen[-1] == "picture-scale":
            page.keyboard.press("Home")
            expect(page.locator("#picture-codes")).to_have_text("1")
        elif seen[-1] == "prompt":
            page.keyboard.type("a red apple")
            page.keyboard.press("Enter")
            expect(page.locator("#drawing .state")).to_contain_text("Drawn in")
    assert seen[:9] == [
        "map", "picture-scale", "picture-tfc", "prompt", "seed", "preset", "submit", "drawn-scale", "again"
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_axe_finds_nothing_and_nothing_moves(url: str, visit: Open, axe: str, scheme: str, width: int) -> None:
    page = visit(f"{url}/{SEED_7}", color_scheme=scheme, viewport={"width": width, "height": 800})
    expect(page.locator("#server")).to_contain_text("scales")
    for work in (lambda: None, lambda: encoded(page), lambda: drawn(page), lambda: page.focus("#map")):
        work()
        assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate(axe)
    found = page.evaluate("axe.run()")
    assert {each["id"]: [node["html"] for node in each["nodes"]] for each in found["violations"]} == {}
    moved = """() => new Promise((done) => new PerformanceObserver((list) => done(list.getEntries().map((each) => each.value)))
        .observe({ type: "layout-shift", buffered: true }) ?? setTimeout(() => done([]), 500))"""
    assert sum(page.evaluate(moved)) < 0.01
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (np.mean([int(each) for each in re.findall(r"\d+", paper)]) < 128) == (scheme == "dark")


def test_other_sizes_and_a_server_that_draws_nothing(visit: Open, mini_bundle: Path) -> None:
    tok = Tokenizer.from_pretrained(mini_bundle, threads=1)
    size, sides = tok.config.image_size, tok.config.patch_nums
    with running(QUIET, "--tokenizer", str(mini_bundle)) as served:
        url = served.url
        page = visit(url)
        encoded(page)
        expect(page.locator("#server")).to_contain_text(f"{size} × {size} pixels in {len(sides)} scales")
        assert page.locator("#picture .strip").inner_text().split() == [str(side) for side in sides]
        expect(page.locator("#picture-scale-text")).to_have_text(
            f"{len(sides)} of {len(sides)}, the finest {sides[-1]} × {sides[-1]}"
        )
        expect(page.locator("#drawing")).to_be_hidden()
        expect(page.locator("#asking")).to_be_hidden()


def test_the_page_asks_for_a_key_and_keeps_it(visit: Open, tmp_path: Path, axe: str) -> None:
    (tmp_path / "keys").write_text("right-key\n")
    with running(QUIET, "--generator", "none", "--api-key-file", str(tmp_path / "keys")) as served:
        url = served.url
        page = visit(url)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.evaluate(axe)
        assert page.evaluate("axe.run()")["violations"] == []
        # There are no panels yet that take a file; the browser must not open it in place of the page.
        dropped = """() => {
            const files = new DataTransfer();
            files.items.add(new File(["x"], "cat.jpg"));
            const drop = new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true });
            return !document.body.dispatchEvent(drop);
        }"""
        assert page.evaluate(dropped)
        page.keyboard.type("wrong-key")
        page.keyboard.press("Enter")
        expect(page.locator("#key-wrong")).to_contain_text("not one of this server’s")
        page.fill("#key", "right-key")
        page.keyboard.press("Enter")
        encoded(page)
        page.reload()
        encoded(page)
        assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]


def test_a_conversation_about_the_picture(url: str, visit: Open, axe: str) -> None:
    """The understander is played here; its route has tests of its own."""
    asked: list[dict[str, Any]] = []

    def answer(route: Any) -> None:
        asked.append(json.loads(route.request.post_data))
        deltas = [({"content": "A c"}, None), ({"content": "at."}, None), ({}, "stop")]
        lines = [json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]}) for delta, finish in deltas]
        body = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
        route.fulfill(body=body, content_type="text/event-stream")

    def played(page: Any) -> None:
        page.route("**/v1/chat/completions", answer)

    page = visit(url, played)
    expect(page.locator("#ask [type=submit]")).to_be_disabled()
    encoded(page)
    for count, question in enumerate(("What is this?", "Really?")):
        page.fill("#question", question)
        page.keyboard.press("Enter")
        expect(page.locator("#talk .answer").nth(count)).to_have_text("A cat.")
        expect(page.locator("#asking .state")).to_have_text("")
    first, second = (each["messages"] for each in asked)
    assert base64.b64decode(first[0]["content"][0]["image_codes"]["tfc"]) == downloaded(page, "#picture-tfc")[1]
    assert second == [
        *first,
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "Really?"}]},
    ]
    page.evaluate(axe)
    assert page.evaluate("axe.run()")["violations"] == []
    encoded(page, ROOT / "docs" / "images" / "drawn.jpg")
    expect(page.locator("#talk .answer")).to_have_count(0)
