"""docs/play.html in a headless Chromium: what clicks, taps, keys and drags reach."""

import re
from pathlib import Path

import pytest
from browser import EXECUTABLE, Browser

PAGE = Path(__file__).parent.parent / "docs" / "play.html"
pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="Chromium is not installed")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(params=SIZES)
def page(request, browser):
    """The page at one of both sizes. `press` is a click, or a tap on the phone."""
    browser.open(PAGE, *SIZES[request.param], dark=request.param == "phone")
    browser.press_on = browser.tap if request.param == "phone" else browser.click
    browser.touch = request.param == "phone"
    yield browser
    assert not browser.errors, browser.errors


def numbers(words: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", words)]


def rows(page) -> list[list[float]]:
    """Where the ten filled dots are drawn, in units of the picture."""
    dots = """[...document.querySelectorAll("#rows circle[r='10']:not(.ghost)")]"""
    return page.evaluate(f"{dots}.map(dot => [dot.cx.baseVal.value, dot.cy.baseVal.value])")


def set_slider(page, name: str, value: float) -> None:
    """By keys: to the end of the slider, and back in steps of a hundredth."""
    page.evaluate(f"document.getElementById('{name}').focus()")
    page.press("End")
    page.press("ArrowLeft", round(100 * (page.evaluate(f"+document.getElementById('{name}').max") - value)))
    assert float(page.text(f"#{name}-value")) == pytest.approx(value)


def test_npid_moves_one_dot_and_the_corrected_rule_all_that_have_room(page):
    moved = {}
    for rule in ("npid", "corrected"):
        page.press_on("#try-0")
        before = rows(page)
        page.press_on(f"#step-{rule}")
        moved[rule] = [k for k, (old, new) in enumerate(zip(before, rows(page))) if old != new]
        assert f"moved {1 if rule == 'npid' else 10} of 10 rows" in page.text("#said")
    assert moved["npid"] == [2]
    assert len(moved["corrected"]) >= 9  # the picture has two decimals


def test_m_below_a_half_throws_rows_about_and_m_above_does_not(page):
    page.press_on("#try-1")
    assert float(page.text("#m-value")) < 0.5
    page.press_on("#epoch")
    low = numbers(page.text("#said"))
    page.press_on("#start-forward")
    set_slider(page, "m", 0.75)
    page.press_on("#epoch")
    high = numbers(page.text("#said"))
    assert low[0] > 5 * low[1] and low[2] > 90  # degrees from the images, after and before; the largest turn
    assert high[0] <= high[1] + 1 and high[2] < 30


def test_sqrt_kl_is_another_temperature_until_lambda_and_its_own_temperature_are_large(page):
    page.press_on("#try-2")
    page.press_on("#find")
    cosine = "#alike tr:first-child td:last-child"
    found, formula = numbers(page.text("#verdict"))
    assert 0.8 < found / formula < 1 and float(page.text(cosine)) > 0.9999
    assert float(page.text("#alike tr:first-child td")) < float(page.text(cosine))
    assert page.evaluate(
        "profile.getBoundingClientRect().top >= 0 && alike.rows[1].getBoundingClientRect().bottom < innerHeight"
    )
    set_slider(page, "lam", 20)
    set_slider(page, "T", 1)
    assert 0.85 < float(page.text(cosine)) < 0.95
    page.press_on("#find")
    assert page.evaluate("found.hidden")


def test_rows_age_more_in_a_random_order_than_in_a_window(page):
    for _ in range(10):
        page.press_on("#age")
    steps, n, random_order, w, window = numbers(page.evaluate("ages.getAttribute('aria-label')"))
    assert steps == 1200 and random_order == pytest.approx(n, rel=0.1) and window == pytest.approx(w, rel=0.1)
    assert page.evaluate("ages.querySelectorAll('rect').length") == 32 + 8


def test_a_forward_pass_is_the_better_start(page):
    page.press_on("#try-3")
    for _ in range(3):
        page.press_on("#epoch")
    after = numbers(page.text("#said"))[0]
    page.press_on("#start-forward")
    assert numbers(page.text("#said"))[0] < after


def test_z_follows_the_pointer_and_the_arrow_keys(page):
    x, y = page.centre("#z-name")
    left, top, width, height = page.evaluate("(b => [b.x, b.y, b.width, b.height])(circle.getBoundingClientRect())")
    middle = left + width / 2, top + height / 2
    page.drag([(x, y), (middle[0] - 30, middle[1] - 20), (middle[0] - 60, middle[1])], page.touch)
    assert page.evaluate("z.getAttribute('aria-valuenow')") in ("180", "179", "181")
    first = page.text("#bars tr:first-child td")
    page.evaluate("z.focus()")
    page.press("ArrowRight", 5)
    page.press("PageDown")
    assert 154 <= int(page.evaluate("z.getAttribute('aria-valuenow')")) <= 156
    assert page.text("#bars tr:first-child td") != first  # the cosine with row 1


def test_the_tab_key_reaches_every_control_and_none_lies_covered(page):
    seen, count = [], page.evaluate("document.querySelectorAll('button, select, input, a, [tabindex]').length")
    for _ in range(count - 1):  # of two radio buttons Tab visits the one that is chosen
        page.press("Tab")
        seen.append(
            page.evaluate("""(() => {
          const e = document.activeElement, b = e.getClientRects()[0], x = b.x + b.width / 2, y = b.y + b.height / 2
          const top = document.elementFromPoint(x, y)
          return [e.id || e.textContent, top === e || e.contains(top)]
        })()""")
        )
    assert len({name for name, _ in seen}) == count - 1
    assert not [name for name, free in seen if not free]


def test_nothing_is_wider_than_the_window_and_no_drawn_word_is_cut_off(page):
    page.press_on("#find")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    cut = page.evaluate("""[...document.querySelectorAll("svg text")].filter(text => {
      const a = text.getBoundingClientRect(), b = text.closest("svg").getBoundingClientRect()
      return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1
    }).map(text => text.textContent)""")
    assert not cut


def test_an_epoch_takes_its_time_and_stops_where_something_else_is_pressed(browser):
    browser.open(PAGE, motion=True)
    browser.click("#epoch")
    browser.click("#step-npid")
    assert "NPID’s rule moved" in browser.text("#said")
    browser.evaluate("new Promise(done => setTimeout(done, 500))")
    assert "NPID’s rule moved" in browser.text("#said")
    browser.click("#epoch")
    browser.evaluate("new Promise(done => setTimeout(done, 3500))")
    assert "One epoch by NPID’s rule" in browser.text("#said")
