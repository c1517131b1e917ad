"""Chromium without a window, driven by Selenium; neither is a dependency of the project."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chromium(*options: str) -> Iterator[Any]:
    """A browser, or a skipped test where it is not installed. options: more words of Chromium's command line."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("chromium with chromedriver is not installed")
    settings = webdriver.ChromeOptions()
    settings.binary_location = browser
    settings.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *options):
        settings.add_argument(word)
    chrome = webdriver.Chrome(settings, webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()
