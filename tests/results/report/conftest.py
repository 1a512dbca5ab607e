"""A headless Chromium, for all tests of a report in a browser."""

from __future__ import annotations

import os
import shutil

import pytest

SIZES = {"wide": (1280, 900), "narrow": (400, 800)}


@pytest.fixture(scope="session")
def chromium():
    """The browser's driver; tests are skipped where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("Chromium or its driver is not installed: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("headless=new", "disable-gpu", "disable-dev-shm-usage", *["no-sandbox"] * (os.geteuid() == 0)):
        options.add_argument(f"--{argument}")  # its sandbox refuses root
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Browser:
    """One page at a time, and what the console said of it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, address=""):
        self.driver.get("about:blank")  # another address of the same file would not load it again
        self.driver.get(path.as_uri() + address)

    def emulate(self, size="wide", scheme="light", media="screen"):
        width, height = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, selector):
        """The elements that are shown, in one request."""
        script = "return [...document.querySelectorAll(arguments[0])].filter((found) => found.checkVisibility())"
        return self.run(script, selector)

    def texts(self, selector):
        """Their texts, as they are shown."""
        script = "return [...document.querySelectorAll(arguments[0])].filter((found) => found.checkVisibility())"
        return [text.replace("\u202f", "") for text in self.run(f"{script}.map((found) => found.innerText)", selector)]

    def one(self, selector):
        (found,) = self.all(selector)
        return found

    def text(self, selector):
        (found,) = self.texts(selector)
        return found

    def button(self, text, within="body"):
        selector = f"{within} button"
        return self.all(selector)[self.texts(selector).index(text)]

    def click(self, selector):
        """Click where nothing sticks over it."""
        found = self.one(selector)
        self.run("arguments[0].scrollIntoView({ block: 'center' })", found)
        found.click()

    def go(self, address):
        """Change the part of the address behind #, and wait until the page has followed."""
        self.driver.execute_async_script(
            "if (location.hash === arguments[0]) return arguments[1]();"
            "window.addEventListener('hashchange', () => setTimeout(arguments[1]), { once: true });"
            "location.hash = arguments[0]",
            address,
        )

    def until(self, condition):
        """Wait until a condition holds."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 10).until(lambda _: condition())

    def keys(self, *keys):
        """Press keys where the focus is."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    @property
    def focused(self):
        return self.driver.switch_to.active_element

    @property
    def console(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def browser(chromium):
    """Fails the test if the console has said anything at its end."""
    found = Browser(chromium)
    found.emulate()
    found.console  # noqa: B018 - forgets what earlier tests left
    yield found
    assert found.console == []
