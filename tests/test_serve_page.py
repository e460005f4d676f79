"""The page in a real browser: it streams text, and cannot be made to run markup."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.inference_models import FULL, small_model, write_run
from tests.serving import Server

webdriver = pytest.importorskip("selenium.webdriver")
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(write_run(tmp_path_factory.mktemp("runs") / "page", small_model(FULL)))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = shutil.which("chromium")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def complete(browser: Any, prompt: str, tokens: int) -> list[int]:
    """Type, press the button, and watch; how many pieces the page showed, polled every 0.1 s."""
    find = browser.find_element
    for name, value in (("prompt", prompt), ("max_tokens", str(tokens))):
        find("id", name).clear()
        find("id", name).send_keys(value)
    find("id", "go").click()
    return browser.execute_async_script(
        """const done = arguments[0], seen = [];
        const timer = setInterval(() => {
          seen.push(document.querySelectorAll("#text .token").length);
          if (!document.getElementById("go").disabled) { clearInterval(timer); done(seen); }
        }, 5);"""
    )


def test_text_streams_in_and_tokens_have_alternatives(browser: Any, server: Server) -> None:
    browser.get(server.url)
    find = browser.find_element
    seen = complete(browser, "Once upon", 28)
    assert seen[-1] == 28
    assert any(0 < count < 28 for count in seen), "it came in one piece"
    assert find("id", "text").text.startswith("Once upon")
    assert "28 tokens" in find("id", "note").text
    browser.find_elements("css selector", "#text .token")[3].click()
    assert len(browser.find_elements("css selector", "#alternatives tr")) >= 6
    assert find("css selector", "#alternatives td:last-child").text.endswith("%")


def test_markup_in_a_prompt_is_text(browser: Any, server: Server) -> None:
    browser.get(server.url)
    complete(browser, EVIL, 2)
    shown = browser.find_element("css selector", "#text .given")
    assert shown.text == EVIL
    assert browser.title == "sota_transformer"
    assert not browser.find_elements("css selector", "#text img, #text script")


def test_limits_are_shown_and_nothing_is_blocked(browser: Any, server: Server) -> None:
    browser.get(server.url)
    complete(browser, "word " * 50, 5)
    note = browser.find_element("id", "note")
    assert "context" in note.text and note.get_attribute("class") == "bad"
    log = [line["message"] for line in browser.get_log("browser")]
    assert not [line for line in log if "Content Security Policy" in line], log


def test_the_page_fits_a_phone(browser: Any, server: Server, tmp_path: Path) -> None:
    browser.set_window_size(400, 800)
    browser.get(server.url)
    script = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(script) <= 0
    assert browser.save_screenshot(str(tmp_path / "phone.png"))
