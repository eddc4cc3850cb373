"""The pages in a real browser, on a real run: readable, accessible, live, and in need of nothing.

Where ``ELESH_SHOTS`` names a folder, screenshots go there, to be looked at; those in its folder
``docs`` are what docs/screenshots.md shows: copy them to docs/screenshots.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import MISSING, Browser
from console_server import TOKEN, Site, serving_console
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from contracts import examples
from elesh.bus import Bus
from elesh.console import write_report
from elesh.settings import BusSettings, ConsoleSettings, Settings
from leyline.streams import DEAD

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
WIDTHS = (1280, 390)
THEMES = ("light", "dark")
INSPECTED = ((1280, "light"), (390, "dark"))
"""What axe-core looks at: each layout and each set of colours once."""
DOCUMENTED = {
    ("overview", 1280, "light"), ("overview", 390, "dark"), ("run", 1280, "light"),
    ("run", 390, "light"), ("decision", 1280, "light"), ("decision", 390, "dark"),
    ("fleet", 1280, "dark"), ("dead", 1280, "light"), ("audit", 390, "light"),
    ("report", 1280, "light"), ("report", 1280, "dark"),
}  # fmt: skip
"""What docs/screenshots.md shows, of ``docs`` in the folder of screenshots."""
_NAMELESS = """
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  walk.currentNode.data = walk.currentNode.data.replaceAll(arguments[0], "host");
}
"""
DOCUMENTED_TO = 1500
"""Height of those pictures in pixels, at most."""


@pytest.fixture(scope="module")
def live(recorded) -> Iterator[Site]:
    # The settings of the demo's workers: a replay asks for the same.
    settings = Settings.load(recorded.settings)
    settings = settings.model_copy(update={"console": ConsoleSettings(token=TOKEN)})
    with (
        pytest.MonkeyPatch.context() as patch,
        serving_console(recorded.url, settings) as site,
    ):
        patch.setenv("ELESH_STATE_DIR", str(recorded.home))  # spans are looked for there
        yield site


def pictures(browser: Browser, page: str, width: int, theme: str) -> None:
    """Where they are wanted."""
    if not (folder := os.environ.get("ELESH_SHOTS")):
        return
    shots = Path(folder).resolve()
    browser.picture(shots / f"{page}-{width}-{theme}.png")
    if (page, width, theme) in DOCUMENTED:
        browser.execute_script(_NAMELESS, socket.gethostname())
        browser.picture(shots / f"docs/{page}-{width}-{theme}.webp", height=DOCUMENTED_TO)


def decision(browser: Browser, live: Site) -> str:
    """The page of a decision that was applied."""
    browser.show(f"{live.url}/", width=1280, theme="light")
    marks = browser.find_elements(By.CSS_SELECTOR, ".wide a:has(.mark.applied)")
    assert marks, "the run has an applied decision on its time line"
    return live.url + str(marks[-1].get_dom_attribute("href"))


@pytest.mark.parametrize("page", ["overview", "run", "decision", "fleet", "dead", "audit"])
@pytest.mark.sampled
def test_a_page_is_readable_at_any_width_in_any_light(browser, live, recorded, page):
    paths = {"overview": "/", "run": f"/runs/{recorded.run_id}"}
    url = decision(browser, live) if page == "decision" else live.url + paths.get(page, f"/{page}")
    for width in WIDTHS:
        for theme in THEMES:
            browser.show(url, width=width, theme=theme)
            pictures(browser, page, width, theme)
            if (width, theme) in INSPECTED:
                # A strip has hundreds of squares: they are looked at once.
                without = () if theme == "light" else (".strip", ".dots")
                assert browser.serious_faults(without=without) == [], (page, width, theme)
            assert browser.too_wide() <= 0, (page, width, theme)
            assert browser.complaints() == [], (page, width, theme)


def test_a_decision_shows_its_evidence(browser, live):
    browser.show(decision(browser, live), width=1280, theme="light")
    text = browser.find_element(By.ID, "main").text
    for told in (
        "Applied: removes",
        "Predicted and measured",
        "trainer, masked",
        "gates that passed",
        "✕ removed",
    ):
        assert told in text, told
    crosses = browser.find_elements(By.CSS_SELECTOR, ".wide .strip .cross")
    removed = browser.find_elements(By.CSS_SELECTOR, "tr.removed")
    assert len(crosses) == len(removed) > 0
    assert "joint" not in text.replace("joint cost", "").replace(":joint", "")
    folded = browser.find_element(By.CSS_SELECTOR, "details[id^=passed] .gates")
    assert not folded.is_displayed()
    assert browser.find_elements(By.CSS_SELECTOR, ".dots .whisker"), "error bars"
    assert browser.find_elements(By.CSS_SELECTOR, ".span .bar"), "the trace"


@pytest.mark.slow
def test_reasons_and_keys_are_read_on_a_phone(browser, live, recorded):
    browser.show(f"{live.url}/runs/{recorded.run_id}", width=390, theme="light")
    reasons = browser.find_elements(By.CSS_SELECTOR, "td.why:not(:empty)")
    assert reasons
    for reason in reasons:
        assert 0 <= reason.rect["x"] <= reason.rect["x"] + reason.rect["width"] <= 390
    url = decision(browser, live)
    browser.show(url, width=390, theme="light")
    assert browser.find_element(By.CSS_SELECTOR, ".key code").rect["height"] < 40, "one line"


@pytest.mark.slow
def test_an_operator_signs_in_replays_and_the_bytes_are_the_same(browser, live):
    browser.show(decision(browser, live), width=1280, theme="dark")
    browser.find_element(By.ID, "token").send_keys(TOKEN + Keys.ENTER)
    wait = WebDriverWait(browser, 60)
    button = wait.until(lambda b: b.find_element(By.XPATH, "//button[contains(., 'Analyse')]"))
    button.click()
    wait.until(lambda b: b.current_url.endswith("/replay#replay-title"))
    assert "Bit-identical" in browser.find_element(By.ID, "main").text
    browser.delete_all_cookies()


_FOCUSED = """
const focused = document.activeElement;
return focused.getAttribute("aria-label") || focused.textContent.trim() || focused.tagName;
"""


@pytest.mark.slow
def test_it_is_used_by_keyboard(browser, live):
    browser.show(f"{live.url}/", width=1280, theme="light")
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element.text == "Skip to content"
    reached = []
    for _ in range(60):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        # In one step: the page is live, and what was in focus may be replaced between two.
        reached.append(browser.execute_script(_FOCUSED))
    for wanted in ("Fleet", "Dead letters", "Audit", "Dark"):
        assert wanted in reached, wanted
    assert any("applied" in each for each in reached), "marks on the time line"


def test_the_theme_is_switched_and_kept(browser, live):
    browser.show(f"{live.url}/", width=1280, theme="light")
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(ground)
    browser.find_element(By.ID, "theme").send_keys(Keys.ENTER)
    dark = browser.execute_script(ground)
    assert dark != light
    browser.get(f"{live.url}/fleet")
    assert browser.execute_script(ground) == dark
    browser.execute_script("localStorage.clear()")


@pytest.mark.slow
def test_a_page_stays_current_without_losing_what_is_open(browser, live, recorded):
    browser.show(f"{live.url}/dead", width=1280, theme="light")
    WebDriverWait(browser, 60).until(lambda b: b.find_element(By.ID, "live").text == "live")
    browser.find_element(By.TAG_NAME, "summary").click()
    before = len(browser.find_elements(By.CSS_SELECTOR, ".dead"))

    async def dead_letter() -> None:
        bus = await Bus.connect(recorded.url, BusSettings())
        dead_letter = await bus.publish(DEAD, examples.MESSAGES["DeadLetter"], source="test")
        page = WebDriverWait(browser, 60)
        count = before + 1
        await asyncio.to_thread(
            page.until, lambda b: len(b.find_elements(By.CSS_SELECTOR, ".dead")) == count
        )
        await bus.dead_letters.drop(dead_letter, "test")
        await bus.close()

    asyncio.run(dead_letter())
    assert browser.find_elements(By.CSS_SELECTOR, "details[open]"), "what was opened stays open"


@pytest.mark.slow
def test_a_report_is_one_file_that_works_from_disk(browser, recorded, tmp_path):
    path = tmp_path / "report.html"

    async def write() -> int:
        settings = Settings()
        bus = await Bus.connect(recorded.url, settings.bus)
        try:
            return await write_report(bus, settings, recorded.run_id, path)
        finally:
            await bus.close()

    assert asyncio.run(write()) == len(recorded.figures["decisions"])
    assert path.stat().st_size < 500_000
    text = path.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert 'src="' not in text
    for theme in THEMES:
        browser.show(path.as_uri(), width=1280, theme=theme)
        pictures(browser, "report", 1280, theme)
        assert browser.complaints() == []
        # The decisions in it are the parts that the decision's page was tested with.
        assert browser.serious_faults(within=("header", ".tiles", ".chart", "footer")) == []
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
    assert len(re.findall(rb"/Type\s*/Page[^s]", base64.b64decode(printed))) < 10
    asked = "return performance.getEntriesByType('resource').length"
    assert browser.execute_script(asked) == 0
    browser.find_element(By.CSS_SELECTOR, ".wide a:has(.mark.applied)").click()
    assert "#d-" in browser.current_url
