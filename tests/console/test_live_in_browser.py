"""An open page in a real browser: it says when it is stale and renews itself, and what a person
types, chooses or reads in it is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browser import MISSING, Browser
from console_server import TOKEN, Site
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from contracts import examples
from leyline import Level
from leyline.streams import CHECKPOINTS, DEAD

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture
def signed_in(browser: Browser, site: Site) -> Iterator[Browser]:
    browser.show(f"{site.url}/fleet", width=1280, theme="light")
    browser.find_element(By.ID, "token").send_keys(TOKEN + Keys.ENTER)
    until(browser, lambda b: b.find_elements(By.ID, "trip"))
    yield browser
    browser.delete_all_cookies()


def until(browser: Browser, what: Callable[[Browser], Any]) -> Any:
    return WebDriverWait(browser, 60, ignored_exceptions=[Exception]).until(what)


@pytest.mark.slow
def test_a_page_that_is_stale_says_so_and_renews_itself(browser: Browser, site: Site, on_bus):
    browser.show(f"{site.url}/", width=1280, theme="light")
    live, stale = browser.find_element(By.ID, "live"), browser.find_element(By.ID, "stale")
    until(browser, lambda _: live.text == "live")
    assert not stale.is_displayed()
    browser.offline(True)
    until(browser, lambda _: stale.is_displayed())
    assert "not reached" in stale.text
    assert live.text == "not live"
    on_bus(lambda bus: bus.publish(CHECKPOINTS, examples.MESSAGES["CheckpointReady"], source="x"))
    browser.offline(False)
    until(browser, lambda b: b.find_element(By.LINK_TEXT, "digits-7"))
    until(browser, lambda _: not stale.is_displayed())


@pytest.mark.slow
def test_what_is_typed_and_chosen_survives_what_comes(signed_in: Browser, on_bus):
    form = signed_in.find_element(By.ID, "trip")
    level = Select(form.find_element(By.NAME, "level"))
    assert level.first_selected_option.get_attribute("value") == "", "nothing is chosen for you"
    run, reason = form.find_element(By.NAME, "run"), form.find_element(By.NAME, "reason")
    run.send_keys("digits-7")
    level.select_by_visible_text("head")
    reason.send_keys("looks wr")
    on_bus(lambda bus: bus.breakers.trip("another", Level.CHANNEL, "by hand"))
    table = "part-breakers"
    until(signed_in, lambda b: "another" in b.find_element(By.ID, table).text)
    reason.send_keys("ong")
    values = [each.get_attribute("value") for each in (run, reason)]
    assert values == ["digits-7", "looks wrong"]
    assert level.first_selected_option.text == "head"
    # In a part that is renewed itself, it waits until the person is done.
    why = signed_in.find_element(By.CSS_SELECTOR, f"#{table} [name=reason]")
    why.send_keys("all is well")
    on_bus(lambda bus: bus.breakers.trip("third", Level.CHANNEL, "by hand"))
    version = "return document.getElementById('main').dataset.live"
    before = signed_in.execute_script(version)
    until(signed_in, lambda b: b.execute_script(version) != before)
    assert why.get_attribute("value") == "all is well"
    why.clear()
    until(signed_in, lambda b: b.execute_script("document.activeElement.blur(); return true"))
    until(signed_in, lambda b: "third" in b.find_element(By.ID, table).text)


def test_a_destructive_act_names_its_object_before_it_is_done(signed_in: Browser, on_bus):
    asked = "window.asked = []; window.confirm = (text) => { asked.push(text); return false; }"
    signed_in.execute_script(asked)
    form = signed_in.find_element(By.ID, "trip")
    form.find_element(By.NAME, "run").send_keys("digits-7")
    Select(form.find_element(By.NAME, "level")).select_by_visible_text("channel")
    form.find_element(By.NAME, "reason").send_keys("looks wrong", Keys.ENTER)
    [question] = until(signed_in, lambda b: b.execute_script("return asked"))
    assert "digits-7" in question
    assert "channel" in question
    assert on_bus(lambda bus: bus.breakers.view("digits-7", Level.CHANNEL)).state == "closed"
    letter = on_bus(lambda bus: bus.publish(DEAD, examples.MESSAGES["DeadLetter"], source="x"))
    signed_in.get(signed_in.current_url.replace("/fleet", "/dead"))
    signed_in.execute_script(asked)
    signed_in.find_element(By.CSS_SELECTOR, "button.danger").click()
    [question] = signed_in.execute_script("return asked")
    assert letter in question
    assert len(on_bus(lambda bus: bus.dead_letters.all())) == 1
