"""A headless Chromium, and a TensorBoard for it, where they are installed."""

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
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
    "--hide-scrollbars",
    "--window-size=1500,1100",
    # Nothing but this machine can be reached.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)
# The text of a page, through shadow roots.
_TEXT = """
const collect = (node) => {
  let text = node.nodeType === Node.TEXT_NODE ? node.textContent : "";
  if (["STYLE", "SCRIPT"].includes(node.nodeName)) return "";
  if (node.shadowRoot) text += collect(node.shadowRoot);
  for (const child of node.childNodes) text += collect(child) + " ";
  return text;
};
return collect(document.body).replace(/\\s+/g, " ");
"""
_COUNT = """
const count = (node) => {
  let found = node.querySelectorAll(arguments[0]).length;
  for (const child of node.querySelectorAll("*"))
    if (child.shadowRoot) found += count(child.shadowRoot);
  return found;
};
return count(document);
"""


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


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Start TensorBoard on this machine alone, and return its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", "0", "--reload_interval", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        lines = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                yield found[0]
                return
        pytest.fail("TensorBoard did not start:\n" + "".join(lines))
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait(session: Any, script: str, seconds: float = 90.0) -> Any:
    """Return the value of a JavaScript expression as soon as it is true."""
    return _until(lambda: session.execute_script(f"return {script}"), script, session, seconds)


def wait_for_text(session: Any, *texts: str, seconds: float = 90.0) -> str:
    """Return the text of the page, shadow roots included, as soon as it holds all of these."""

    def found() -> str | None:
        page: str = session.execute_script(_TEXT)
        return page if all(text in page for text in texts) else None

    return str(_until(found, f"{texts} on the page", session, seconds))


def wait_for_elements(session: Any, selector: str, least: int, seconds: float = 90.0) -> int:
    """Return the number of elements, shadow roots included, as soon as there are enough."""

    def found() -> int | None:
        number: int = session.execute_script(_COUNT, selector)
        return number if number >= least else None

    return int(_until(found, f"{least} of {selector}", session, seconds))


def _until(condition: Any, what: str, session: Any, seconds: float) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(session, seconds, poll_frequency=0.3)
    return waiting.until(lambda _: condition(), f"never came: {what}")
