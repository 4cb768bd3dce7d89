"""A headless Chromium that tests drive, where one is installed."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless=new",
    # Test machines run as root, without a graphics card and with little shared memory.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--window-size=1500,1100",
    # Nothing but this machine can be reached.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser that reaches nothing but this machine, or skip the test.

    A missing Chromium, or a missing driver, is the reason of the skip.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("Chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in _OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=Service(driver))
    session.set_page_load_timeout(120)
    session.set_script_timeout(60)
    try:
        yield session
    finally:
        session.quit()


def wait(session: Any, script: str, seconds: float = 90.0) -> Any:
    """Return the value of a JavaScript expression as soon as it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    until = WebDriverWait(session, seconds, poll_frequency=0.2)
    return until.until(lambda s: s.execute_script(f"return {script}"), f"never true: {script}")
