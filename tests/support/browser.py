"""MLflow's UI in a real browser: headless Chromium, driven through its own driver."""

import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Seconds to wait for a page: the first one takes long on a busy machine."""


def why_no_browser() -> str | None:
    """Return what is missing for a browser, or None."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        return "Chromium is not installed (Debian: apt-get install chromium chromium-driver)"
    return None if find_spec("selenium") else "selenium missing: pip install '.[deployments]'"


class Browser:
    """A window on the UI at `uri`. Close it when done."""

    def __init__(self, uri: str, width: int = 1360, height: int = 860) -> None:
        from selenium import webdriver

        self.uri = uri
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for word in (
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
            *(f"--user-data-dir={self._profile}", f"--window-size={width},{height}"),
        ):
            options.add_argument(word)
        service = webdriver.ChromeService(executable_path=str(shutil.which("chromedriver")))
        self.driver = webdriver.Chrome(options=options, service=service)
        # The assistant's panel, which opens by itself, covers a quarter of the window.
        self.driver.get(uri)
        for name, value in (("autoOpenedOnFirstLoad", "true"), ("panelOpen", "false")):
            key = f"mlflow.assistant.{'fab.' if name[0] == 'a' else ''}{name}_v1"
            self.driver.execute_script("localStorage.setItem(arguments[0], arguments[1])", key, value)
        self.driver.refresh()  # going to another page of the UI does not reload it

    def open(self, page: str, *texts: str) -> None:
        """Open a page of the UI, such as `/#/experiments/1`, and wait until it shows all these texts."""
        self.driver.get(f"{self.uri}{page}")
        self.wait_for(*texts)

    def text(self) -> str:
        """Return the text that the page shows."""
        return str(self.driver.execute_script("return document.body ? document.body.innerText : ''"))

    def wait_for(self, *texts: str) -> None:
        """Wait until the page shows all these texts."""
        deadline = time.monotonic() + PATIENCE
        while missing := [text for text in texts if text not in self.text()]:
            assert time.monotonic() < deadline, f"{missing} not on {self.driver.current_url}:\n{self.text()[:3000]}"
            time.sleep(0.2)

    def click(self, text: str) -> None:
        """Click the first element that shows exactly this text."""
        found = self.find(f"//*[normalize-space(text())={text!r}]")
        self.driver.execute_script("arguments[0].click()", found)

    def find(self, path: str) -> Any:
        """Wait for an element at an XPath and return the first."""
        deadline = time.monotonic() + PATIENCE
        while not (found := self.driver.find_elements("xpath", path)):
            assert time.monotonic() < deadline, f"{path} not on {self.driver.current_url}:\n{self.text()[:3000]}"
            time.sleep(0.2)
        return found[0]

    def count(self, selector: str, at_least: int) -> int:
        """Wait until a CSS selector finds at least so many elements, and return their number."""
        deadline = time.monotonic() + PATIENCE
        while (number := len(self.driver.find_elements("css selector", selector))) < at_least:
            assert time.monotonic() < deadline, f"{number} {selector} on {self.driver.current_url}"
            time.sleep(0.2)
        return number

    def scroll_to(self, text: str) -> None:
        """Scroll to the first element that shows exactly this text."""
        found = self.find(f"//*[normalize-space(text())={text!r}]")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", found)

    def picture(self, path: Path) -> None:
        """Save what the window shows as a PNG."""
        self.driver.save_screenshot(str(path))

    def close(self) -> None:
        """Close the window and end the browser."""
        self.driver.quit()
        shutil.rmtree(self._profile, ignore_errors=True)
