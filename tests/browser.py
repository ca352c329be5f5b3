"""A browser for tests of pages; without one they are skipped, with the reason."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WIDE, NARROW = (1300, 900), (320, 700)
_PROGRAMS = ("chromium", "chromedriver")
# Seconds until a page must have done what it was told to.
_PATIENCE = 20


class Page:
    """A page in a headless Chromium, and what a user does with it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, size: tuple[int, int] = WIDE) -> None:
        """Load a file into a window of a size, (width, height), and forget what was before."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get("about:blank")
        self.requests(), self.driver.get_log("browser")
        self.driver.get(path.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def set(self, name: str, value: Any) -> None:
        """Set a control to a value, as by hand, and let the page draw."""
        self.run(
            "const control = document.getElementById(arguments[0]); control.value = arguments[1];"
            "for (const name of ['input', 'change'])"
            "  control.dispatchEvent(new Event(name, { bubbles: true }));",
            name,
            value,
        )
        self.settle()

    def settle(self) -> None:
        """Wait for two pictures of the screen, in the first of which the page counts."""
        self.driver.execute_async_script(
            "requestAnimationFrame(() => requestAnimationFrame(arguments[0]));"
        )

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(x => x.textContent);"
        return self.run(script, selector)

    def wait_for(self, selector: str) -> list[str]:
        """The texts of elements that come in their time."""
        end = time.monotonic() + _PATIENCE
        while not self.texts(selector):
            assert time.monotonic() < end, f"no {selector}"
            time.sleep(0.02)
        return self.texts(selector)

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)
        self.settle()

    def requests(self) -> list[str]:
        """Addresses that have been asked for since the last call."""
        messages = [json.loads(x["message"])["message"] for x in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """What the page has written to the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@contextmanager
def running_browser() -> Iterator[Page]:
    """A headless Chromium of the system."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [shutil.which(name) for name in _PROGRAMS]
    for name, program in zip(_PROGRAMS, programs, strict=True):
        if program is None:
            pytest.skip(f"no {name} (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    if os.getuid() == 0:  # where Chromium refuses its sandbox
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    try:
        yield Page(driver)
    finally:
        driver.quit()
