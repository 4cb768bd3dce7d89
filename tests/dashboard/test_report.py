"""The report: what the page holds, and that it works in a browser without a network."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_linger.analysis.sensitivity import SensitivityRow, read_sensitivities
from lightning_linger.cli import main
from lightning_linger.core.errors import ConfigError
from lightning_linger.dashboard.records import RunRecord, WidthSwitch
from lightning_linger.dashboard.report import report_html
from lightning_linger.dashboard.run_log import FILE_NAME, RunLog
from lightning_linger.dashboard.sensitivity import MeasuredSensitivities, suggest_bits
from tests.browser import chromium, wait
from tests.dashboard.runs import ADD, CONV, FC, STEM, run

pytest.importorskip("plotly")

SENSITIVITIES = [
    SensitivityRow(STEM, 4, 0.05),
    SensitivityRow(STEM, 8, 0.001),
    SensitivityRow(FC, 4, 0.0),
    SensitivityRow(FC, 8, 0.0),
]

CHOSEN = {STEM: {"weight_bits": 8}, FC: {"weight_bits": 4}}


def a_run() -> RunRecord:
    """A run whose convolution is bad, and whose head inherits that."""
    return run(**{CONV: {"isolated_sqnr": 8.0, "sqnr": 7.5}, FC: {"sqnr": 12.0}})


def data_of(page: str) -> Any:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def write(record: RunRecord, folder: Path) -> None:
    log = RunLog(folder / FILE_NAME)
    log.run(record)
    for switch in record.switches:
        log.switch(switch)
    for epoch in record.epochs:
        log.epoch(epoch)
    log.histograms(record.histograms)


def test_the_page_holds_the_values_of_the_run() -> None:
    record = a_run()
    data = data_of(report_html(record, MeasuredSensitivities(SENSITIVITIES, tolerance=0.01)))
    assert [layer["site"] for layer in data["layers"]] == [STEM, CONV, ADD, FC]
    rows = {layer["site"]: layer for layer in data["layers"]}
    for error in record.epochs[-1].layers:
        assert rows[error.site]["sqnr"] == error.sqnr
        assert rows[error.site]["history"][-1]["isolated_sqnr"] == error.isolated_sqnr
    assert rows[ADD]["inputs"] == [STEM, CONV]
    assert rows[STEM]["outputs"] == [CONV, ADD]
    assert data["worst"][0] == CONV
    heat = data["figures"]["accumulated"]["data"][0]
    assert heat["y"][1] == "block.conv conv2d"
    assert heat["z"][1] == [7.5, 7.5]
    assert data["figures"]["isolated"]["data"][0]["z"][1] == [8.0, 8.0]
    assert data["metrics"]["QAT"]["val_accuracy"] == "0.8000"
    assert data["suggestion"] == {STEM: 8, FC: 4}


def test_the_page_holds_the_widths_in_force_and_those_before() -> None:
    record = a_run()
    for step, bits in ((0, "8/8/8"), (30, "4/8/8")):
        record.switch_widths(
            WidthSwitch(step // 10, step, {x.site: bits for x in record.layers}, {})
        )
    row = data_of(report_html(record))["layers"][0]
    assert row["bits"] == "4/8/8"
    assert row["widths"] == [[0, "8/8/8"], [30, "4/8/8"]]


def test_every_chart_is_one_that_plotly_accepts() -> None:
    import plotly.graph_objects as go

    data = data_of(report_html(a_run(), MeasuredSensitivities(SENSITIVITIES)))
    charts = [*data["figures"].values(), *data["groups"].values()]
    charts += [layer["histogram"] for layer in data["layers"]]
    assert len(charts) == 5 + 1 + 4
    for chart in charts:
        assert go.Figure(chart).data


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = report_html(a_run())
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=.?(https?:)?//", page)
    assert "@import" not in page.split("</style>")[0]


def test_names_cannot_break_out_of_the_page() -> None:
    record = run()
    record.name = "</title><script>alert(1)</script>"
    record.settings = {"evil": "</script><script>alert(2)</script>"}
    page = report_html(record)
    assert "<script>alert" not in page
    assert data_of(page)["settings"] == record.settings


def test_a_run_without_a_measured_epoch_has_no_report() -> None:
    with pytest.raises(ConfigError, match="no measured epoch"):
        report_html(RunRecord("empty"))


def test_the_command_writes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(a_run(), tmp_path / "version_0")
    table = tmp_path / "sensitivity.csv"
    table.write_text(
        "site,bits,drop\n" + "".join(f"{r.site},{r.bits},{r.drop}\n" for r in SENSITIVITIES)
    )
    target = tmp_path / "report.html"
    arguments = ["report", str(tmp_path / "version_0"), "-o", str(target)]
    assert main([*arguments, "--sensitivity", str(table), "--tolerance", "0.01"]) == 0
    assert "4 layers" in capsys.readouterr().out
    assert data_of(target.read_text())["suggestion"] == {STEM: 8, FC: 4}
    assert main(arguments) == 2
    assert "there already" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert "sensitivity" not in data_of(target.read_text())["figures"]
    # What the run itself has measured and chosen is shown without being asked for.
    (tmp_path / "version_0" / "sensitivity.csv").write_text(table.read_text())
    chosen = tmp_path / "version_0" / "mixed_precision.json"
    chosen.write_text(json.dumps({STEM: {"weight_bits": 4}, FC: {"activation_bits": 8}}))
    assert main([*arguments, "--force"]) == 0
    data = data_of(target.read_text())
    assert data["suggestion"] == {STEM: 4, FC: 8}
    assert data["drops"] == {STEM: [0.05, 0.001], FC: [0.0, 0.0]}
    assert "under the budget" in data["reason"]
    assert main([*arguments, "--force", "--tolerance", "0.01"]) == 0
    assert data_of(target.read_text())["suggestion"] == {STEM: 8, FC: 4}
    chosen.write_text("[]")
    assert main([*arguments, "--force"]) == 2
    assert "holds no overrides" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "sensitivity.csv",
        "version_0",
    ]


def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(tmp_path / "report.html")
    assert main(["report", str(tmp_path), "-o", target]) == 2
    assert "holds no linger.jsonl" in capsys.readouterr().err
    write(a_run(), tmp_path)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(tmp_path), "-o", target]) == 2
    assert 'pip install "lightning-linger[plots]"' in capsys.readouterr().err
    assert not Path(target).exists()


def test_the_suggestion_is_the_narrowest_width_that_is_good_enough() -> None:
    rows = [
        *(SensitivityRow("a", bits, drop) for bits, drop in ((2, 0.5), (4, 0.02), (8, 0.0))),
        # A narrow width that happens to do well does not count below one that does not.
        *(SensitivityRow("b", bits, drop) for bits, drop in ((2, 0.0), (4, 0.2), (8, 0.01))),
        *(SensitivityRow("c", bits, drop) for bits, drop in ((4, 0.9), (8, 0.8))),
    ]
    assert suggest_bits(rows, 0.05) == {"c": 8, "a": 4, "b": 8}
    assert list(suggest_bits(rows, 0.05)) == ["c", "a", "b"]
    assert suggest_bits([], 0.0) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "columns site, bits, drop"),
        ("site,bits\nstem,4\n", "columns site, bits, drop"),
        ("site,bits,drop\nstem,four,0.1\n", "line 2"),
        ("site,bits,drop\nstem,4,0.1\nstem,8\n", "line 3"),
        ("site,bits,drop\nstem,0,0.1\n", "`bits` positive"),
        ("site,bits,drop\nstem,4,nan\n", "`drop` finite"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_sensitivities(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_sensitivities(tmp_path / "missing.csv")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    target = tmp_path_factory.mktemp("report") / "report.html"
    target.write_text(report_html(a_run(), MeasuredSensitivities(SENSITIVITIES, CHOSEN)))
    with chromium() as session:
        session.get(target.as_uri())
        wait(session, "document.body.dataset.ready")
        yield session


def texts(page: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    found: list[str] = page.execute_script(script, selector)
    return found


def sites(page: Any) -> list[str]:
    script = "return [...document.querySelectorAll('#layers tbody tr')].map(e => e.dataset.site)"
    found: list[str] = page.execute_script(script)
    return found


def test_the_report_opens_offline_and_draws_every_chart(page: Any) -> None:
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    drawn = page.execute_script(
        "return [...document.querySelectorAll('.chart .main-svg')].map(e => e.closest('.chart').id)"
    )
    expected = {"timeline", "accumulated", "isolated", "mismatch", "group-lines", "sensitivity"}
    assert set(drawn) == expected
    # One cell per layer and quantized epoch, with its value in it.
    assert texts(page, "#accumulated .heatmap-label")[:2] == ["36", "36"]
    assert "0.20%" in texts(page, "#verdict")[0]
    assert texts(page, "#suggestion tr") == [
        "layer4 bits8 bitssuggested",
        f"{STEM}0.05000.001008",
        f"{FC}0.000.004",
    ]


def test_clicking_a_layer_shows_it(page: Any) -> None:
    from selenium.webdriver.common.by import By

    page.find_element(By.CSS_SELECTOR, f'tr[data-site="{CONV}"]').click()
    assert texts(page, "#detail-title") == [CONV]
    assert "wastes its grid" in texts(page, "#detail-advice")[0]
    assert texts(page, "#detail-links a") == ["stem conv2d", "block add"]
    assert texts(page, "tr.chosen td:nth-child(2)") == ["block.conv conv2d"]
    wait(page, "document.querySelector('#detail-histogram .main-svg')")
    assert len(page.find_elements(By.CSS_SELECTOR, "#detail-histogram .shapelayer path")) == 2
    page.find_element(By.CSS_SELECTOR, "#worst li a").click()
    assert texts(page, "#detail-title") == [CONV]
    page.find_elements(By.CSS_SELECTOR, "#detail-links a")[0].click()
    assert texts(page, "#detail-title") == [STEM]


def test_the_table_is_sorted_by_a_click_and_turned_by_the_next(page: Any) -> None:
    from selenium.webdriver.common.by import By

    head = page.find_element(By.CSS_SELECTOR, 'th[data-key="sqnr"]')
    head.click()
    assert sites(page) == [CONV, FC, STEM, ADD]
    assert head.get_attribute("aria-sort") == "ascending"
    head.click()
    assert sites(page) == [STEM, ADD, FC, CONV]
    page.find_element(By.CSS_SELECTOR, 'th[data-key="label"]').click()
    assert sites(page) == [ADD, CONV, FC, STEM]


def test_the_search_leaves_what_matches(page: Any) -> None:
    from selenium.webdriver.common.by import By

    search = page.find_element(By.ID, "search")
    search.send_keys("conv2d wastes")
    assert sites(page) == [CONV]
    assert texts(page, "#count") == ["1 of 4 layers"]
    search.clear()
    search.send_keys("nothing like this")
    assert sites(page) == []
    search.clear()
