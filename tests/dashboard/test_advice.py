"""Which layers are named, in which order, and what is said about them."""

import dataclasses

import pytest

from lightning_linger.dashboard.advice import RULES, advise, judge_outputs, markdown
from lightning_linger.dashboard.groups import LARGEST, group_layers
from lightning_linger.dashboard.records import EpochRecord, OutputErrors, RunRecord
from tests.dashboard.runs import ADD, CONV, FC, STEM, good, run


@pytest.mark.parametrize(
    ("site", "changed", "rule", "says"),
    [
        (STEM, {"mismatch_rate": 1e-4}, "integers differ", "report it"),
        (STEM, {"saturation": 0.031}, "saturates", "saturates 3.1%"),
        (STEM, {"isolated_sqnr": 22.0}, "wastes its grid", "'stem': {'output_bits': 16"),
        (ADD, {"isolated_sqnr": 22.0}, "wastes its grid", "'block': {'output_bits': 16}"),
        (STEM, {}, "fine", "as good as its bits allow"),
    ],
)
def test_each_rule_speaks_of_its_layer(
    site: str, changed: dict[str, object], rule: str, says: str
) -> None:
    advice = {item.error.site: item for item in advise(run(**{site: changed}))}
    assert advice[site].rule == rule
    assert says in advice[site].text


def test_a_narrow_layer_is_told_to_grow() -> None:
    record = run(**{CONV: {"isolated_sqnr": 8.0, "sqnr": 8.0}})
    record.layers[1] = dataclasses.replace(record.layers[1], bits="3/8/3", output_bits=3)
    first = advise(record)[0]
    assert (first.error.site, first.rule) == (CONV, "too coarse")
    assert "'block.conv': {'output_bits': 8, 'weight_bits': 8}" in first.text


def test_a_layer_that_inherits_its_error_points_at_the_source() -> None:
    record = run(**{CONV: {"isolated_sqnr": 10.0, "sqnr": 10.0}, FC: {"sqnr": 12.0}})
    by_site = {item.error.site: item for item in advise(record)}
    assert by_site[FC].rule == "inherits"
    assert f"look at {CONV} first" in by_site[FC].text
    assert by_site[CONV].rule != "inherits"


def test_a_step_that_moves_between_powers_of_two_is_named() -> None:
    record = run()
    moved = tuple(good(error.site, exponent=-3.0) for error in record.epochs[-1].layers)
    record.epochs.append(EpochRecord(4, 50, record.epochs[-1].stages, {}, moved))
    advice = advise(record)
    assert {item.rule for item in advice} == {"step jumps"}
    assert "2^-4, 2^-3" in advice[0].text


def test_free_scales_may_differ_in_ties() -> None:
    record = dataclasses.replace(run(**{STEM: {"mismatch_rate": 1e-4}}), exact=False)
    by_site = {item.error.site: item.rule for item in advise(record)}
    assert by_site[STEM] == "rounding ties"


def test_the_worst_come_first() -> None:
    record = run(**{FC: {"isolated_sqnr": 20.0}, ADD: {"isolated_sqnr": 10.0}})
    assert [item.error.site for item in advise(record, 2)] == [ADD, FC]
    record = run(**{FC: {"isolated_sqnr": 20.0}, STEM: {"mismatch_rate": 1e-6}})
    assert [item.error.site for item in advise(record, 2)] == [STEM, FC]
    assert advise(RunRecord()) == []


def test_every_layer_gets_advice_and_every_rule_has_a_name_of_its_own() -> None:
    assert len(advise(run())) == 4
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_the_output_is_judged_for_the_task() -> None:
    said = judge_outputs(OutputErrors(30.0, 0.0123, 0.0, 0.0))
    assert "1.23% of the decisions" in said
    assert "exactly what fake-quant returns" in said
    said = judge_outputs(OutputErrors(30.0, None, 0.25, 0.125))
    assert "30.0 dB" in said
    assert "25.00%" in said
    assert "12.50% of its decisions" in said
    assert judge_outputs(OutputErrors()) == ""


def test_the_table_has_a_row_per_layer() -> None:
    record = run(**{STEM: {"saturation": 0.5}})
    rows = markdown(advise(record, 3), record.epochs[-1].outputs).splitlines()
    assert rows[0].startswith("Quantization changes 0.20%")
    assert sum(row.startswith("| `") for row in rows) == 3
    assert len({row.count("|") for row in rows[2:]}) == 1


def test_groups_follow_the_modules() -> None:
    sites = [f"layer{i}.{j}.conv/conv2d/0" for i in range(1, 4) for j in range(8)]
    groups = group_layers(["stem/conv2d/0", "/add/0", *sites, "head@1/linear/0"])
    titles = [group.title for group in groups]
    assert titles == ["stem, model", "layer1", "layer2", "layer3", "head"]
    assert [site for group in groups for site in group.sites][2:-1] == sites


def test_a_large_module_is_divided_by_its_submodules() -> None:
    sites = [f"net.{i}.conv{j}/conv2d/0" for i in range(3) for j in range(LARGEST)]
    assert [group.title for group in group_layers(sites)] == ["net.0", "net.1", "net.2"]
    flat = [f"net/add/{i}" for i in range(LARGEST + 5)]
    assert [len(group.sites) for group in group_layers(flat)] == [LARGEST + 5]
