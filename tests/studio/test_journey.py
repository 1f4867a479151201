"""From a checkpoint and a folder of pictures to a built checkpoint, by clicks in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.studio.browser import UNLABELED, Clicks, Shots, Studio, open_page, serving

pytestmark = pytest.mark.browser

MOST_CLICKS = 6
STEPS = 8
PROMPTS = ("a red balloon --d 1 --s 4", "an axe --d 2 --s 4")
SECONDS = 240.0  # for one thing to happen: torch is imported by the assistant and by each job


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    with serving(tmp_path) as made:
        yield made


def test_from_a_checkpoint_and_pictures_to_a_built_checkpoint(
    studio: Studio, shots_folder: Path | None
) -> None:
    expect.set_options(timeout=SECONDS * 1000)
    running = re.compile("^Step [1-9]")
    with open_page(studio.url) as page:
        clicks, shots = Clicks(page), Shots(page, shots_folder)

        clicks("New tune", role="link")
        start = page.get_by_role("button", name="Start", exact=True)
        expect(start).to_be_enabled()
        page.locator("#own-steps").fill(str(STEPS))
        page.locator("#prompts").fill("\n".join(PROMPTS))
        page.locator("#prompts").blur()
        expect(page.locator("#plan dd").first).to_have_text(re.compile(rf"^{STEPS}\b"))
        expect(start).to_be_enabled()
        assert page.evaluate(UNLABELED) == []
        shots("1-new-tune")
        shots("1-new-tune-dark", dark=True)
        check_narrow(page, shots, "1-new-tune-phone")

        clicks("Start")
        page.wait_for_url("**/runs/*")
        expect(page.locator("#stage")).to_have_text(running)
        page.reload()  # changes nothing
        expect(page.locator("#stage")).to_have_text(running)
        shots("2-run")
        expect(page.locator("#state")).to_have_text("finished")
        expect(page.locator("#stage")).to_have_text(f"Step {STEPS} of {STEPS}")
        assert page.locator("#previews img").count() >= 2 * len(PROMPTS)
        assert page.evaluate(UNLABELED) == []
        shots("3-run-finished")
        shots("3-run-dark", dark=True)
        check_narrow(page, shots, "3-run-phone")

        clicks("See the result", role="link")
        clicks("Build checkpoint")
        expect(page.locator(".built")).to_have_count(1)
        assert clicks.count <= MOST_CLICKS

        built = Path(page.locator(".built .mono").first.text_content() or "")
        base = studio.folder / "models" / "base.safetensors"
        assert built.stat().st_size == pytest.approx(base.stat().st_size, rel=0.01)
        assert built.read_bytes()[-1_000_000:] != base.read_bytes()[-1_000_000:]
        expect(page.locator("#built")).to_contain_text("Load Checkpoint")
        page.get_by_role("button", name="Verify").click()
        expect(page.locator(".built .good")).to_contain_text("can be read")
        if shots_folder is not None:
            page.get_by_role("button", name="Draw the comparison").click()
            expect(page.locator("#sheet img")).to_be_visible()
        shots("4-result")
        shots("4-result-dark", dark=True)
        check_narrow(page, shots, "4-result-phone")


def check_narrow(page: Page, shots: Shots, name: str) -> None:
    """Check that a phone shows the page without scrolling sideways."""
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shots(name, width=390)
    page.set_viewport_size({"width": 1200, "height": 900})
