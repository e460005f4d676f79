"""The page in a real browser: it streams text, and cannot be made to run markup.

Skipped without `chromium` and `chromedriver` in PATH. Package registries have both: npm's
@sparticuz/chromium unpacks a browser, PyPI's chromedriver-py of its version holds the driver.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.inference_models import FULL, small_model, write_run
from tests.serving import Server

webdriver = pytest.importorskip("selenium.webdriver")
keys = webdriver.Keys
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

SHOWN = """const done = arguments[0], seen = [];  // how many tokens are shown, until the end
const timer = setInterval(() => {
  seen.push(document.querySelectorAll("#text .token").length);
  if (!document.getElementById("go").disabled) { clearInterval(timer); done(seen); }
}, 5);"""


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
    return browser.execute_async_script(SHOWN)


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


def test_an_empty_number_is_not_zero(browser: Any, server: Server) -> None:
    browser.get(server.url)
    browser.find_element("id", "temperature").clear()
    complete(browser, "Once", 2)
    assert browser.find_element("id", "note").text == "Temperature: give a number"
    assert not browser.find_elements("css selector", "#text .token")


def test_the_keyboard_is_enough(browser: Any, server: Server) -> None:
    """Ctrl-Enter and Enter start, focus stays on the buttons, arrows choose a token."""

    def press(*pressed: str) -> str:
        browser.switch_to.active_element.send_keys(*pressed)
        return browser.switch_to.active_element.get_attribute("id")

    def tokens(start: str, *pressed: str, count: int) -> int:
        number = f"document.getElementById('max_tokens').value = {count};"
        browser.execute_script(f"{number} document.getElementById('{start}').focus()")
        press(*pressed)
        return browser.execute_async_script(SHOWN)[-1]

    browser.get(server.url)
    assert tokens("prompt", keys.CONTROL, keys.ENTER, count=3) == 3
    assert tokens("seed", keys.ENTER, count=4) == 4
    assert tokens("go", keys.ENTER, count=5) == 5
    assert press() == "go" and press(keys.TAB) == "text"
    press(keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.ARROW_LEFT)
    chosen = browser.find_elements("css selector", "#text .token")[1]
    assert "chosen" in chosen.get_attribute("class")
    assert browser.find_element("id", "which").text.startswith("Instead of ")
    complete(browser, "Once", 2)
    assert browser.find_element("id", "which").text == "Alternatives", "of the previous text"


def test_a_server_that_is_gone_is_said_in_words(browser: Any, server: Server) -> None:
    browser.get(server.url)
    browser.execute_script("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    complete(browser, "Once", 2)
    assert browser.find_element("id", "note").text == "the server is not responding"
    page = "<h1>502 Bad Gateway</h1>"  # as a proxy answers
    browser.execute_script(f"window.fetch = async () => new Response('{page}', {{status: 502}})")
    complete(browser, "Once", 2)
    assert browser.find_element("id", "note").text == "the server answered 502"
    browser.execute_script("window.fetch = async () => new Response('')")  # a proxy cut it off
    complete(browser, "Once", 2)
    assert browser.find_element("id", "note").text.startswith("the text was cut off")


def test_a_curve_of_any_run_is_readable(browser: Any, server: Server) -> None:
    browser.get(server.url)
    for high, shown in ((10.9, "10.9"), (91234.5, "91230")):
        browser.execute_script(
            "document.getElementById('curve').replaceChildren();"
            f"draw({{train: [[1, 3]], validation: [[1, {high}]]}})"
        )
        assert len(browser.find_elements("css selector", "#curve circle")) == 2, "one is unseen"
        assert browser.find_element("css selector", "#curve text").text == shown
        wide = "return document.querySelector('#curve text').getBBox().width"
        assert browser.execute_script(wide) <= 36, "over the axis"


def test_the_page_fits_a_phone(browser: Any, server: Server, tmp_path: Path) -> None:
    browser.set_window_size(400, 800)
    browser.get(server.url)
    script = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(script) <= 0
    assert browser.save_screenshot(str(tmp_path / "phone.png"))
