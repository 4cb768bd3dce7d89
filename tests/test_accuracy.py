"""The accuracy benchmark: its page is that of its results, and a run can be cut short and go on."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import quantized
from benchmarks.accuracy.page import MARK, PAGE, TABLES, page, summary_of, verdict
from benchmarks.accuracy.peers import Exported, Freeze, prepared_graph
from benchmarks.accuracy.recipes import (
    BITS,
    FLOAT,
    FROZEN_SCHEME,
    FROZEN_TASK,
    PEERS,
    PLAN,
    Still,
    ours,
    peer,
)
from benchmarks.accuracy.results import SEEDS, STORED, Results, Summary, behind
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import Score, fit
from lightning_linger.core.instrumentation import instrumentation_of

LEARNED_8 = ("linger", "QAT", "lsq", 8)
TEMPLATE = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in TABLES)


def run(folder: Path, *arguments: str) -> str:
    """Run the command with everything it writes in a folder; return the page."""
    (folder / "page.md").write_text(TEMPLATE)
    places = {name: str(folder / name) for name in ("results", "networks", "figure")}
    places = {**places, "figure": str(folder / "figure.png"), "page": str(folder / "page.md")}
    command.main([*arguments, *(f"--{name}={place}" for name, place in places.items())])
    return (folder / "page.md").read_text()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    task = dataclasses.replace(TASKS["sequence"], epochs=1, tuning_epochs=1)
    monkeypatch.setitem(TASKS, "sequence", task)


def test_the_page_is_that_of_the_stored_results() -> None:
    text = PAGE.read_text()
    assert {found[1] for found in MARK.findall(text)} == set(TABLES)
    assert page(text, Results(STORED)) == text, "run `python -m benchmarks.accuracy --render`"


def test_the_readme_says_what_the_results_say() -> None:
    results, readme = Results(STORED), (PAGE.parents[1] / "README.md").read_text()
    for recipe in (FLOAT, *(ours("linger", "QAT", "lsq", bits) for bits in (8, 4))):
        found = summary_of(results, "digits", recipe)
        assert found is not None
        assert f"{found.mean:.2f} ± {found.deviation:.2f} %" in readme


def test_what_is_stored_is_of_the_recipes_there_are() -> None:
    stored = Results(STORED)
    planned = [(step, name, r) for step in PLAN for name in step.tasks for r in step.recipes]
    assert any(stored.accuracies(name, recipe) for _, name, recipe in planned)
    assert stored.accuracies("digits", FLOAT).keys() >= set(range(SEEDS))


@pytest.mark.usefixtures("short")
@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--task", "sequence", "--seeds", "2", "--only", "float float", "linger PTQ mse 8")
    text = run(tmp_path, *arguments)
    results = Results(tmp_path / "results")
    calibrated = results.accuracies("sequence", ours("linger", "PTQ", "mse", 8))
    assert results.accuracies("sequence", FLOAT).keys() == calibrated.keys() == {0, 1}
    assert all(10 < accuracy < 90 for accuracy in calibrated.values())
    assert f"{Summary.of(calibrated.values()).mean:.2f} ±" in text
    assert (tmp_path / "figure.png").stat().st_size > 0

    def refuse(*arguments: object) -> None:
        pytest.fail("ran again")

    capsys.readouterr()
    before = (tmp_path / "results").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(command, "run", refuse)
        assert run(tmp_path, *arguments) == text
    assert "seed" not in capsys.readouterr().out
    (tmp_path / "results").write_text("".join(before.splitlines(keepends=True)[:-1]))
    assert run(tmp_path, *arguments) == text, "the same seeds give the same results"
    assert (tmp_path / "results").read_text() == before


@pytest.mark.usefixtures("short")
@pytest.mark.filterwarnings("ignore")
def test_training_is_measured_on_integers(tmp_path: Path) -> None:
    run(tmp_path, "--task", "sequence", "--seeds", "1", "--only", "linger QAT lsq 4")
    score = Results(tmp_path / "results").get(TASKS["sequence"], 0, ours("linger", "QAT", "lsq", 4))
    assert score is not None
    assert score.differing == 0
    assert score.count == 898


def test_a_changed_setting_makes_a_result_stale(tmp_path: Path) -> None:
    results, task = Results(tmp_path / "results"), TASKS["digits"]
    learned = ours("linger", "QAT", "lsq", 4)
    results.put(task, 0, learned, Score(9, 10, 0))
    assert Results(tmp_path / "results").get(task, 0, learned) == Score(9, 10, 0)
    assert results.accuracies("digits", learned) == {0: 90.0}
    longer = dataclasses.replace(task, tuning_epochs=task.tuning_epochs + 1)
    assert results.get(longer, 0, learned) is None
    changed = dataclasses.replace(learned, fields={**learned.fields, "weight_range": "absmax"})
    assert results.get(task, 0, changed) is None


def test_where_ranges_stand_still_makes_only_results_of_qat_with_few_bits_stale(
    tmp_path: Path,
) -> None:
    task = TASKS["kws"]
    later = dataclasses.replace(task, frozen_from=9)
    results = Results(tmp_path / "results")
    few = (ours("linger", "QAT", "lsq", 4), ours("linger", "QAT", "mse", 4), peer("torchao", 4))
    others = (FLOAT, ours("linger", "PTQ", "mse", 4), ours(*LEARNED_8), peer("torchao", 8))
    for recipe in (*few, *others):
        results.put(task, 0, recipe, Score(9, 10))
    assert all(results.get(task, 0, recipe) for recipe in (*few, *others))
    assert all(results.get(later, 0, recipe) is None for recipe in few)
    assert all(results.get(later, 0, recipe) for recipe in others)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "bits", "asked", "still"),
    [
        ("absmax", 4, None, {"ranges", "statistics"}),
        ("lsq", 4, None, {"statistics"}),
        ("absmax", 8, None, set()),
        ("absmax", 4, "nothing", set()),
        ("absmax", 8, "statistics", {"statistics"}),
        ("lsq", 4, "statistics and ranges", {"ranges", "statistics"}),
    ],
)
def test_with_few_bits_or_as_asked_statistics_and_ranges_stand_still_from_an_epoch_on(
    method: str,
    bits: int,
    asked: Still | None,
    still: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = dataclasses.replace(TASKS["digits"], tuning_epochs=2, frozen_from=1)
    seen: list[dict[str, list[torch.Tensor]]] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            sites = instrumentation_of(pl_module).sites
            steps = [q.wanted_step().clone() for site in sites for q in site.quantizers()]
            mean = pl_module.network.bn.running_mean.clone()
            seen.append({"ranges": steps, "statistics": [mean]})

    def watched_fit(*arguments: Any, callbacks: Any) -> Any:
        return fit(*arguments, callbacks=[*callbacks, Watch()])

    monkeypatch.setattr(quantized, "fit", watched_fit)
    recipe = ours("onnxruntime", "QAT", method, bits)
    recipe = recipe if asked is None else recipe.with_still(asked)
    quantized.train_quantized(recipe, task, task.network(), task.data(0), 0)
    before, after = seen
    same = {what: [*map(torch.equal, before[what], after[what])] for what in before}
    assert {what for what, equal in same.items() if all(equal)} == still


def test_what_stands_still_has_a_table_of_its_own(tmp_path: Path) -> None:
    results, task = Results(tmp_path / "results"), TASKS[FROZEN_TASK]
    recipe = ours(FROZEN_SCHEME, "QAT", "lsq", 4)
    assert recipe.with_still(recipe.protocol) == recipe
    for correct, found in ((70, FLOAT), (60, recipe), (50, recipe.with_still("nothing"))):
        for seed in range(SEEDS):
            results.put(task, seed, found, Score(correct, 100))
    text = page(TEMPLATE, results)
    assert "| onnxruntime | lsq | 4 | 50.00 ± 0.00 | 60.00 ± 0.00 |  |" in text
    assert text.count("50.00 ± 0.00") == 1


def test_each_network_that_others_train_is_compared_with_them(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    for name, others in (("digits", ("torchao", "brevitas")), ("kws", ("torchao",))):
        for seed in range(SEEDS):
            results.put(TASKS[name], seed, ours("tflite", "QAT", "lsq", 4), Score(70, 100, 0))
            for other in others:
                results.put(TASKS[name], seed, peer(other, 4), Score(60, 100))
    text = TABLES["peers"](results)
    assert "`tflite` - torchao | `tflite` - brevitas |" in text
    assert "`tflite` - torchao |\n" in text
    assert text.count("+10.00 ± 0.00") == 3
    assert text.count("### ") == 2


def test_a_library_that_is_not_there_is_left_out_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "why_missing", lambda name: f"No module named '{name}'")
    run(tmp_path, "--task", "digits", "--only", "brevitas")
    assert "brevitas is left out: No module named 'brevitas'" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEERS)
def test_another_library_trains_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip(name)
    monkeypatch.setitem(
        TASKS, "digits", dataclasses.replace(TASKS["digits"], epochs=4, tuning_epochs=1)
    )
    run(tmp_path, "--task", "digits", "--seeds", "1", "--only", peer(name, 8).name, "float float")
    results = Results(tmp_path / "results")
    theirs, reference = (results.accuracies("digits", r)[0] for r in (peer(name, 8), FLOAT))
    assert reference > 80
    assert abs(theirs - reference) < 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torchao_has_the_widths_of_our_recipes() -> None:
    pytest.importorskip("torchao")
    modules = dict(prepared_graph(TASKS["digits"], 4).named_modules())
    tops = {
        node.args[0].name: modules[node.target].quant_max
        for node in modules[""].graph.nodes
        if hasattr(modules.get(str(node.target)), "quant_max")
    }
    # The first weight is read behind its scale by the batch norm, as the product `mul`.
    assert {name for name, top in tops.items() if top == 127} == {"x", "mul", "fc_weight", "linear"}
    assert {name for name, top in tops.items() if top == 7} >= {"relu", "mul_1", "mean"}
    assert set(tops.values()) == {7, 127}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torchao_stands_still_from_the_same_epoch_on() -> None:
    pytest.importorskip("torchao")
    task = dataclasses.replace(TASKS["digits"], tuning_epochs=2, frozen_from=1)
    model = Exported(copy.deepcopy(prepared_graph(task, 8)))
    kept: list[dict[str, torch.Tensor]] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            kept.append({name: x.clone() for name, x in model.graph.named_buffers()})

    callbacks = [Freeze(task.frozen_from), Watch()]
    fit(model, task.data(0), 0, task.tuning_epochs, task.tuning_rate, callbacks)
    assert kept[0]["bn.running_mean"].any()
    observed = [name for name in kept[0] if name.endswith("min_val")]
    assert observed
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in (*observed, "bn.running_mean"))


def test_differences_are_taken_seed_by_seed() -> None:
    found = behind({0: 90.0, 1: 80.0, 2: 1.0}, {0: 91.0, 1: 80.0})
    assert found == Summary(-0.5, pytest.approx(0.7071, abs=1e-4), 2)
    assert behind({}, {0: 1.0}) is None


def test_seeds_that_few_recipes_have_count_for_targets_alone(tmp_path: Path) -> None:
    results, task, quantized = Results(tmp_path / "results"), TASKS["digits"], ours(*LEARNED_8)
    for seed in range(SEEDS + 1):
        results.put(task, seed, FLOAT, Score(500 if seed < SEEDS else 0, 1000))
        results.put(task, seed, quantized, Score(500 if seed < SEEDS else 600, 1000, 0))
    mean = 60.0 / (SEEDS + 1)
    text = page(TEMPLATE, results)
    assert f"| {SEEDS + 1} | +{mean:.2f} ±" in text
    assert "Float: 50.00 ± 0.00 %" in text
    assert summary_of(results, "digits", quantized) == Summary(50.0, 0.0, SEEDS)


def test_a_target_missed_by_less_than_the_standard_error_is_undecided() -> None:
    def found(*differences: float) -> str:
        return verdict(Summary.of(differences), -1.0)

    assert found(-0.9, -1.1) == "met"
    assert found(-0.9, -1.3) == "undecided", "-1.1 with an error of 0.2"
    assert found(-1.2, -1.3) == "missed"


def test_every_recipe_has_a_name_of_its_own() -> None:
    names = [(name, r.name) for step in PLAN for name in step.tasks for r in step.recipes]
    assert len(set(names)) == len(names)
    assert {r.bits for step in PLAN for r in step.recipes} == {*BITS, FLOAT.bits}
