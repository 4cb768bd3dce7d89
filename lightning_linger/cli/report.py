"""``lightning-linger report``: one HTML file that holds a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_linger.analysis.sensitivity import read_sensitivities
from lightning_linger.core.errors import ConfigError
from lightning_linger.dashboard.report import report_html
from lightning_linger.dashboard.run_log import read_run
from lightning_linger.dashboard.sensitivity import MeasuredSensitivities, read_measured
from lightning_linger.export.files import check_target, write_atomically

_DESCRIPTION = """\
Write one HTML file with the pictures, the advice and the layers of a run.

RUN_DIR is the folder of a Trainer's logger (trainer.log_dir), in which QuantErrorCallback and
IntegerValidatorCallback have left linger.jsonl. The file works offline.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "report",
        help="write a run as one HTML file",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", type=Path, help="folder of the run")
    add("-o", "--output", metavar="FILE", type=Path, default=Path("report.html"))
    add(
        "--sensitivity",
        metavar="CSV",
        type=Path,
        help="table with the columns site, bits and drop, to show in the place of the run's own",
    )
    add(
        "--tolerance",
        metavar="DROP",
        type=float,
        help="suggest the narrowest widths that cost no more of the metric than this (0), rather "
        "than those the run has chosen under its budget",
    )
    add("--force", action="store_true", help="overwrite FILE if it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the report.

    Raises:
        ConfigError: If RUN_DIR holds no measured run, or FILE cannot be written or exists.
        UnsupportedError: Without plotly.
    """
    target = check_target(arguments.output)
    if target.exists() and not arguments.force:
        msg = f"{str(target)!r} is there already. Pass another file with -o, or --force."
        raise ConfigError(msg)
    record = read_run(arguments.run_dir)
    folder = arguments.run_dir if arguments.run_dir.is_dir() else arguments.run_dir.parent
    measured = read_measured(folder)
    if arguments.sensitivity is not None:
        measured = MeasuredSensitivities(list(read_sensitivities(arguments.sensitivity)))
    if arguments.tolerance is not None:
        measured = MeasuredSensitivities(measured.rows, tolerance=arguments.tolerance)
    page = report_html(record, measured)
    write_atomically(target, page.encode("utf-8"))
    print(f"{target}: {len(record.measured_layers)} layers, {len(page) / 1e6:.1f} MB")
