"""Makes the pictures of the dashboards: runs of the digits example, in a browser.

Run with `python -m docs.screenshots` in the root of the repository. Needs Chromium, chromedriver
and `pip install ".[test,examples]"`. Runs that are in the folder already are not repeated; pages
that are named are the only ones that are taken.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

from lightning_linger.callbacks import (
    FuseBNCallback,
    QuantErrorCallback,
    QuantizeCallback,
    SensitivityCallback,
)
from lightning_linger.dashboard.report import report_html
from lightning_linger.dashboard.run_log import read_run
from lightning_linger.dashboard.sensitivity import read_measured
from tests.browser import chromium, tensorboard, wait, wait_for_elements, wait_for_text

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SPOILED = "stem"
EPOCHS = 12
MIXED_EPOCHS = 8
# Bytes of weights, for the run with a width per layer: about three and a half bits each.
BUDGET = 12_500
PAGES = ("tensorboard", "report", "sensitivity")
WIDTH = 1500
# Lines move into their place.
SETTLED = 3.0


def train(out: Path, spoil: str | None) -> Path:
    """Run the example unless it was run, and return the folder of its first target's logger."""
    folder = out / "tensorboard" / "venusa"
    if not folder.exists():
        sys.path.insert(0, str(ROOT / "examples"))
        import digits

        digits.main(out, EPOCHS, spoil)
    return folder


def train_mixed(out: Path) -> Path:
    """Train with widths that a budget chooses, unless it was, and return the logger's folder."""
    folder = out / "run"
    if not folder.exists():
        sys.path.insert(0, str(ROOT / "examples"))
        from digits import Digits, digits_data

        pl.seed_everything(0)
        trainer = pl.Trainer(
            max_epochs=MIXED_EPOCHS,
            accelerator="cpu",
            callbacks=[
                FuseBNCallback(),
                QuantizeCallback(at_epoch=MIXED_EPOCHS // 2),
                SensitivityCallback(at_epoch=MIXED_EPOCHS * 3 // 4, budget=BUDGET, apply=True),
                QuantErrorCallback(),
            ],
            logger=CSVLogger(out, name="", version="run"),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(Digits(), digits_data())
    return folder


def save(browser: Any, name: str, box: tuple[int, int, int, int] | None = None) -> None:
    """Write what the browser shows, or a part of it, as a small PNG file."""
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture = picture.crop(box) if box is not None else picture
    colours = picture.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    target = IMAGES / name
    colours.save(target, optimize=True)
    print(f"{target}: {picture.size[0]} x {picture.size[1]}, {target.stat().st_size / 1000:.0f} kB")


def show_tensorboard(browser: Any, runs: dict[str, Path]) -> None:
    """Take a picture of the page of custom scalars, with all runs."""
    # TensorBoard prints this path into the picture.
    folder = Path("runs") / "compared"
    folder.mkdir(parents=True, exist_ok=True)
    for name, run in runs.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(run.resolve())
    with tensorboard(folder) as address:
        browser.set_window_size(WIDTH, 1180)
        browser.get(f"{address}#custom_scalars&_smoothingWeight=0")
        wait_for_text(browser, "All layers", *runs)
        wait_for_elements(browser, 'path.line[d^="M"]', 20)
        time.sleep(2 * SETTLED)
        save(browser, "dashboard.png")


def show_report(browser: Any, run: Path, parts: Mapping[str, tuple[str, str]], layer: str) -> None:
    """Take pictures of parts of a report.

    Args:
        browser: Takes them.
        run: Folder of the run.
        parts: First and last element that a picture shows, by its name.
        layer: The layer that is chosen in the report's table.
    """
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(report_html(read_run(run), read_measured(run)), encoding="utf-8")
        browser.set_window_size(WIDTH, 1100)
        browser.get(page.as_uri())
        wait(browser, "document.body.dataset.ready")
        browser.execute_script(
            "document.querySelector(`tr[data-site^='${arguments[0]}/']`).click()", layer
        )
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.set_window_size(WIDTH, height + 200)
        time.sleep(SETTLED)
        for name, (first, last) in parts.items():
            script = "return document.querySelector(arguments[0]).getBoundingClientRect()"
            top = browser.execute_script(script, first)["top"]
            bottom = browser.execute_script(script, last)["bottom"]
            save(browser, name, (0, int(top), WIDTH, int(bottom)))


SPOILED_PARTS = {
    "report.png": ("header", "#isolated"),
    "report_layer.png": ("#layers-section", "#layers-section"),
}
MIXED_PARTS = {
    "report_widths.png": ("#stages", "#timeline"),
    "report_sensitivity.png": ("#sensitivity-section", "#sensitivity-section"),
}


def main() -> None:
    """Train what is missing, and take the pictures."""
    parser = argparse.ArgumentParser(prog="python -m docs.screenshots", description=__doc__)
    parser.add_argument("pages", nargs="*", choices=PAGES, default=PAGES)
    parser.add_argument("--out", type=Path, default=Path("runs/screenshots"))
    arguments = parser.parse_args()
    out, pages = arguments.out, arguments.pages
    with chromium() as browser:
        if "tensorboard" in pages:
            plain, spoiled = train(out / "plain", None), train(out / "spoiled", SPOILED)
            show_tensorboard(browser, {"plain": plain, "spoiled": spoiled})
        if "report" in pages:
            show_report(browser, train(out / "spoiled", SPOILED), SPOILED_PARTS, SPOILED)
        if "sensitivity" in pages:
            show_report(browser, train_mixed(out / "mixed"), MIXED_PARTS, "stem")


if __name__ == "__main__":
    main()
