"""examples/serve.html in Debian's chromium, without a window: `make browser` installs it."""

import pytest

from tests.conftest import CHROMIUM

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=[1280, 400])
def page(browser, served, request):
    """The page at two widths, with its first images, and what went wrong in it."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("requestfailed", lambda failed: page.wrong.append(failed.url))
    page.goto(served)
    drawn(page, "seed=0&to=100&share=0&count=16")
    yield page
    assert page.wrong == []
    page.close()


def drawn(page, asked: str) -> str:
    """Wait until what is asked for is shown, and return the picture."""
    page.wait_for_function("asked => document.body.dataset.drawn === asked", arg=asked)
    return page.evaluate("document.querySelector('canvas').toDataURL()")


def slide(page, name: str, value: str) -> None:
    page.locator(f"#{name}").fill(value)


def test_a_slider_moves_the_picture_and_moving_it_back_brings_the_same(page):
    first = drawn(page, "seed=0&to=100&share=0&count=16")
    slide(page, "seed", "12")
    second = drawn(page, "seed=12&to=100&share=0&count=16")
    assert first != second
    slide(page, "share", "0.5")
    assert drawn(page, "seed=12&to=100&share=0.5&count=16") not in (first, second)
    slide(page, "share", "0")
    slide(page, "seed", "0")
    assert drawn(page, "seed=0&to=100&share=0&count=16") == first


def test_what_it_took_is_shown_as_numbers(page):
    for name in ("rate", "latency", "calls"):
        assert float(page.inner_text(f"#{name}").replace(",", "")) > 0


def test_a_class_and_a_number_of_images_are_chosen(page):
    assert page.locator("#labels label").all_inner_texts() == ["any", "a", "b", "c"]
    page.get_by_text("64", exact=True).click()
    page.get_by_text("b", exact=True).click()
    drawn(page, "seed=0&to=100&share=0&count=64&label=1")


def test_a_walk_goes_on_until_it_is_stopped(page):
    page.get_by_role("button", name="Walk").click()
    page.wait_for_function("Number(document.querySelector('#share').value) > 0.05")
    page.get_by_role("button", name="Stop").click()
    assert page.get_by_role("button", name="Walk").is_visible()


def test_nothing_is_wider_than_the_window(page):
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == page.viewport_size["width"]


def test_a_refusal_is_shown(page):
    page.evaluate("document.querySelector('#seed').max = 2000000")
    slide(page, "seed", "1500000")
    page.get_by_text("seed must be at most 999999, not 1500000").wait_for()
