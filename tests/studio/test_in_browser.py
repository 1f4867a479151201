"""Pages of the Studio in a real browser: many pictures, keyboard, bad files, phones, a server restart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from spectune.studio.forms import TOOLS
from spectune.studio.rendering import NAVIGATION
from tests.studio.browser import UNLABELED, Studio, open_page, serving

pytestmark = pytest.mark.browser

MANY = 1000
MOST_CARDS = 100
SECONDS = 240.0  # for one reply: the assistant and each job import torch
PAGES = [path for path, _ in NAVIGATION] + [f"/tools/{name}" for name in TOOLS]
BAD_FILES = {
    "empty": b"",
    "text": b"<html>404: not found</html>" * 10,
    "cut": (9_000_000).to_bytes(8, "little") + b'{"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}',
    "pickle": b"PK\x03\x04" + bytes(200),
}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    expect.set_options(timeout=SECONDS * 1000)
    with serving(tmp_path_factory.mktemp("studio")) as made:
        many = made.folder / "pictures" / "many"
        many.mkdir()
        for number in range(MANY):
            color = (number % 256, number // 4, 99)
            Image.new("RGB", (32, 32), color).save(many / f"p{number:04d}.png")
            (many / f"p{number:04d}.txt").write_text(f"picture {number:04d}", encoding="utf-8")
        for name, data in BAD_FILES.items():
            (made.folder / "models" / f"{name}.safetensors").write_bytes(data)
        yield made


@pytest.fixture
def page(studio: Studio) -> Iterator[Page]:
    with open_page(studio.url) as made:
        yield made


def open_pictures(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/data?folder={studio.folder / 'pictures' / 'many'}")
    expect(page.locator("#facts")).to_contain_text("1,000 pictures")
    expect(page.get_by_label("Caption of p0000.png")).to_be_visible()


def focus_by_tab(page: Page, name: str, *, key: str = "Tab", most: int = 60) -> None:
    """Press `key` until the element with the id `name` has the focus."""
    for _ in range(most):
        page.keyboard.press(key)
        if page.evaluate("document.activeElement.id") == name:
            return
    raise AssertionError(f"{most} presses of {key} did not reach {name}")


def test_a_thousand_pictures(page: Page, studio: Studio) -> None:
    open_pictures(page, studio)
    page.locator("#grid").evaluate("(grid) => { grid.scrollTop = grid.scrollHeight; }")
    caption = page.get_by_label("Caption of p0999.png")
    expect(caption).to_have_value("picture 0999")
    assert page.locator(".picture-card").count() < MOST_CARDS

    file = studio.folder / "pictures" / "many" / "p0999.txt"
    caption.fill("a red\ncaption")
    expect(page.locator("#undo")).to_have_text("Undo (1)")
    assert file.read_text(encoding="utf-8") == "a red\ncaption"

    page.get_by_role("button", name="Find and replace").click()
    page.get_by_label("Find", exact=True).fill("picture 09")
    page.get_by_label("Replace by").fill("image 09")
    page.get_by_role("button", name="Count").click()
    expect(page.locator("#replace-state")).to_have_text("99 of the captions shown contain it.")

    page.locator("#undo").click()
    expect(page.locator("#undo")).to_have_text("Undo")
    assert file.read_text(encoding="utf-8") == "picture 0999"
    expect(page.locator("#undo")).to_be_disabled()


def test_the_recipe_by_keyboard_alone(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/recipe")
    expect(page.locator("#key-model-rank")).to_be_visible()
    focus_by_tab(page, "search")
    page.keyboard.type("model.rank")
    expect(page.locator("#key-model-base")).to_be_hidden()
    focus_by_tab(page, "key-model-rank")
    page.keyboard.type("many")
    page.keyboard.press("Tab")
    field = page.locator("#key-model-rank")
    error = page.locator(".key:has(#key-model-rank) .error")
    expect(error).to_contain_text("rank")
    expect(field).to_have_attribute("aria-invalid", "true")
    assert (error.get_attribute("id") or "?") in (field.get_attribute("aria-describedby") or "")

    focus_by_tab(page, "key-model-rank", key="Shift+Tab")  # its button `reset` lies between
    page.keyboard.press("Control+A")
    page.keyboard.type("32")
    page.keyboard.press("Tab")
    expect(error).to_have_count(0)
    assert "rank = 32" in text_when_it_has(page, "rank = 32")


def text_when_it_has(page: Page, wanted: str) -> str:
    """Return the TOML text once it contains `wanted`, or the text after some seconds."""
    text = ""
    for _ in range(100):
        text = page.locator("#text").input_value()
        if wanted in text:
            break
        page.wait_for_timeout(200)
    return text


def test_bad_checkpoints_give_readable_errors(page: Page, studio: Studio) -> None:
    for name in BAD_FILES:
        path = studio.folder / "models" / f"{name}.safetensors"
        page.goto(f"{studio.url}/new?model={path}")
        error = page.locator(".field .error:visible")
        expect(error).to_contain_text(path.name)
        assert "Traceback" not in error.inner_text()
        expect(page.get_by_role("button", name="Start", exact=True)).to_be_disabled()

    page.goto(f"{studio.url}/tools/inspect")
    page.locator("#form input[required]").first.fill(str(studio.folder / "models" / "cut.safetensors"))
    page.get_by_role("button", name="Run inspect").click()
    expect(page.locator("#state")).to_have_text("Failed")
    expect(page.locator("#messages .notice.bad")).to_contain_text("cut.safetensors")
    assert "Traceback" not in page.locator("main").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_each_page_without_scrolling_sideways(page: Page, studio: Studio, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    wide = {}
    for path in PAGES:
        page.goto(studio.url + path)
        page.wait_for_load_state("networkidle")
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > 390:
            wide[path] = width
    assert wide == {}
    red = page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0])")
    assert (red < 128) == (scheme == "dark")


def test_each_page_can_be_read_aloud(page: Page, studio: Studio) -> None:
    for path in PAGES:
        page.goto(studio.url + path)
        page.wait_for_load_state("networkidle")
        assert page.evaluate(UNLABELED) == [], path
        assert page.locator("img:not([alt])").count() == 0, path
        assert page.locator("h1").count() == 1, path
        assert page.locator("html").get_attribute("lang") == "en"
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
        assert len(ids) == len(set(ids)), path


def test_pages_wait_for_a_server_that_restarts(page: Page, studio: Studio) -> None:
    expect(page.locator("#idle, #running-title").first).to_be_attached()
    browser = page.context.browser
    assert browser is not None
    pictures = browser.new_page()
    toys = studio.folder / "pictures" / "toys"
    pictures.goto(f"{studio.url}/data?folder={toys}")
    caption = pictures.locator(".picture-card textarea").first
    expect(caption).to_be_visible()
    studio.stop()
    try:
        page.bring_to_front()
        expect(page.locator("#connection")).to_be_visible()
        pictures.bring_to_front()
        caption.fill("written meanwhile")
        expect(pictures.locator(".toast.bad")).to_contain_text("does not reply")
        expect(caption).to_have_attribute("aria-invalid", "true")
    finally:
        studio.start()
    expect(caption).to_have_attribute("aria-invalid", "false")
    assert "written meanwhile" in [file.read_text(encoding="utf-8") for file in toys.glob("*.txt")]
    page.bring_to_front()
    expect(page.locator("#connection")).to_be_hidden()
