"""Dumps: what is written, that the run is not changed, and reading back.

``rowNN`` in a name is the row of the checklist of dumper features that the test covers.
"""

import copy
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import cli
from lightning_linger.analysis.dumps import DumpedOp
from lightning_linger.analysis.dumps.values import describe, describe_codes
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.tags import Tag, with_tag
from tests.models import Lambda, ResNet


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        return self.fc(self.drop(x.mean((2, 3))))


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 1])
IMAGES = images()


def step(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Forward, loss and backward; return everything that they leave."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients, *(b.clone() for b in model.buffers()), torch.rand(1)]


def dumped(path: Path, run: Any, **arguments: Any) -> Any:
    with linger.Dumper(path, **arguments) as dumper:
        run()
    return linger.read_dump(dumper.folder)


def quantized_net(training: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net()
    linger.prepare(model, (IMAGES,))
    linger.fuse_bn(model)
    linger.quantize(model)
    linger.calibrate(model, [IMAGES])
    return model.train(training)


def paths(ops: tuple[DumpedOp, ...]) -> list[str]:
    return [op.path for op in ops]


# --- where dumps go -----------------------------------------------------------------------------


def test_row52_enabled_by_step_in_the_first_four_batches(tmp_path: Path) -> None:
    model = Net()
    for index in range(6):
        with linger.Dumper(tmp_path / f"iter_{index}", enable=index < 4):
            model(IMAGES)
    assert sorted(x.name for x in tmp_path.iterdir()) == [f"iter_{index}" for index in range(4)]


def test_row53_a_folder_that_exists_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / "mine").write_text("kept")
    folders = []
    for _ in range(2):
        with linger.Dumper(tmp_path / "dump") as dumper:
            torch.ones(2) + 1
        folders.append(dumper.folder)
    assert folders == [tmp_path / "dump1", tmp_path / "dump2"]
    assert [x.name for x in (tmp_path / "dump").iterdir()] == ["mine"]


def test_row53_disabled_makes_nothing(tmp_path: Path) -> None:
    with linger.Dumper(tmp_path / "deep" / "dump", enable=False) as dumper:
        torch.ones(2) + 1
    assert dumper.folder is None
    assert not list(tmp_path.iterdir())


def test_folders_above_are_made_and_a_file_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with linger.Dumper(f"{tmp_path}/a/b/dump/") as dumper:
        pass
    assert dumper.folder == tmp_path / "a" / "b" / "dump"
    monkeypatch.chdir(tmp_path)
    with linger.Dumper("") as dumper:
        pass
    assert dumper.folder == Path("dump")
    with pytest.raises(linger.ConfigError, match="can be made"), linger.Dumper(tmp_path / ".."):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(linger.ConfigError, match="file"), linger.Dumper(tmp_path / "file" / "dump"):
        pass


def _dump_as(rank: int, path: str, barrier: Any) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    barrier.wait()
    for _ in range(2):
        with linger.Dumper(path, level=2):
            torch.full((2,), float(rank)) + 1


def test_row61_each_process_has_a_folder_of_its_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [
        context.Process(target=_dump_as, args=(rank, str(tmp_path / "dump"), barrier))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    for rank in range(2):
        for name in (f"dump_rank{rank}", f"dump1_rank{rank}"):
            dump = linger.read_dump(tmp_path / name)
            assert dump["2_add"].values["result"].tensor.tolist() == [rank + 1.0] * 2
    assert len(list(tmp_path.iterdir())) == 4


# --- what is in a dump --------------------------------------------------------------------------


def test_row54_forward_loss_and_backward_in_numbered_folders(tmp_path: Path) -> None:
    model = Net()
    dump = dumped(tmp_path / "dump", lambda: step(model, IMAGES, LABELS))
    names = paths(dump.ops)
    assert [int(name.split("_")[0]) for name in names] == list(range(1, len(names) + 1))
    ops = [op.op for op in dump.ops]
    forward = ["conv2d", "add_", "batch_norm", "relu", "mean", "dropout", "linear"]
    assert ops[: len(forward)] == forward
    assert ops[len(forward) : len(forward) + 2] == ["cross_entropy", "backward"]
    conv, backward = dump.ops[0], dump.ops[len(forward) + 1]
    assert paths(conv.children) == ["1_conv2d/1_convolution"]
    inner = [op.op for op in backward.children]
    assert {"convolution_backward", "native_batch_norm_backward"} <= set(inner)
    assert [op.number for op in backward.children] == list(range(1, len(inner) + 1))
    # What calls one op of its own name is that op.
    assert not dump.ops[3].children
    assert not dump.ops[4].children


def test_an_op_says_where_it_comes_from(tmp_path: Path) -> None:
    model = Net()
    dump = dumped(tmp_path / "dump", lambda: model(IMAGES))
    conv = dump["1_conv2d"]
    assert conv.info["module"] == "stem"
    assert conv.info["location"].startswith(__file__)
    assert dump["1_conv2d/1_convolution"].info["overload"] == "aten.convolution.default"
    quantized = quantized_net()
    sites = dumped(tmp_path / "sites", lambda: quantized(IMAGES), pattern="stem/*").ops
    assert [op.info.get("site") for op in sites] == ["stem/conv2d/0"]


def test_row55_a_file_per_argument_and_a_header_with_the_count(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(3, 4).t()
    texts = {}
    for level in (0, 1, 2):
        dump = dumped(tmp_path / f"level{level}", lambda: torch.add(x, 1, alpha=2), level=level)
        folder = dump.folder / "1_add"
        assert {p.name for p in folder.iterdir()} == {
            *("arg_self.txt", "arg_self.npy", "arg_other.txt", "arg_alpha.txt"),
            *("result.txt", "result.npy", "op.json"),
        }
        texts[level] = (folder / "arg_self.txt").read_text().splitlines()
        result = (folder / "result.txt").read_text().splitlines()
        assert result[0].endswith(f"Dumped = {(10, 1, 12)[level]}")
        assert len(result) == 1 + (10, 1, 12)[level]
        assert (folder / "arg_alpha.txt").read_text() == "Scalar : Type = int\n2\n"
    header = "Tensor : Type = Float : Shape = [4, 3] : Stride = [1, 4] : Dumped = "
    rows = [f"{value:.1f}" for value in x.flatten().tolist()]
    assert texts[0] == [f"{header}10", *rows[:10]]
    assert texts[1] == [f"{header}1", "66.0"]
    assert texts[2] == [f"{header}12", *rows]


@pytest.mark.parametrize("level", [-1, 3, "all", None, True])
def test_row55_other_levels_are_refused(level: Any) -> None:
    with pytest.raises(linger.ConfigError, match="level"):
        linger.Dumper(level=level)


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ([-2.1, -1.1, 0.0, 1.5, 2.5, 3.5, 4.5, 5.0, 5.5, 6.5, 7.9, 9.1], ["49.2"]),
        ([True, False, True, True], ["3"]),
        ([-(2**62) - 1, 2**62, 7], [str(2**63 + 8)]),
        ([2**53 + 1, -1], [str(2**53 + 2)]),
        ([], ["0.0"]),
    ],
)
def test_row56_level_1_is_the_sum_of_magnitudes(values: list[Any], lines: list[str]) -> None:
    x = torch.tensor(values, dtype=torch.float64 if isinstance(sum(values), float) else None)
    assert describe(x, 1).lines[1:] == lines


def test_row56_integers_are_exact_and_scalars_of_no_dimension_are_shown() -> None:
    x = torch.tensor([2**62 + 1, -(2**53) - 1])
    assert describe(x, 2).lines[1:] == [str(2**62 + 1), str(-(2**53) - 1)]
    assert describe(torch.tensor(2.5), 0).lines == [
        "Tensor : Type = Float : Shape = [] : Stride = [] : Dumped = 1",
        "2.5",
    ]
    assert describe(torch.tensor([True, False]), 0).lines[1:] == ["1", "0"]
    assert describe(torch.empty(0, 3), 2).lines == [
        "Tensor : Type = Float : Shape = [0, 3] : Stride = [3, 1] : Dumped = 0"
    ]


def test_row57_scalars_lists_tuples_optionals_and_generators() -> None:
    generator = torch.Generator().manual_seed(3)
    value = [1, (True, 2.5), None, {"a": "text"}, generator, torch.float16]
    assert describe(value, 0).lines == [
        "List : Size = 6",
        *("Scalar : Type = int", "1", "Tuple : Size = 2", "Scalar : Type = bool", "1"),
        *("Scalar : Type = float", "2.5", "Optional : None", "Dict : Size = 1", "Key : a", "text"),
        *("Generator :", "3", "cpu", "torch.float16"),
    ]


def test_row57_a_tuple_of_results_and_a_list_of_tensors(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, 4.0], [3.0, 2.0]])

    def run() -> None:
        torch.max(x, dim=1)
        torch.cat([x, x + 1])

    dump = dumped(tmp_path / "dump", run, level=2)
    values, indices = dump["1_max"].values["result"].tensors
    assert values.values is not None
    assert indices.values is not None
    assert values.values.tolist() == [4.0, 3.0]
    assert torch.equal(indices.values, torch.tensor([1, 0]))
    parts = dump["3_cat"].values["arg_tensors"].tensors
    assert [part.shape for part in parts] == [(2, 2), (2, 2)]
    assert torch.equal(parts[1].values, x + 1)


def test_row59_copies_and_empty_memory_are_left_out(tmp_path: Path) -> None:
    x = torch.ones(2)

    def run() -> None:
        y = torch.empty(2)
        y.copy_(x)
        y.mul_(2).detach().to(torch.float64).sum().item()

    assert [op.op for op in dumped(tmp_path / "dump", run).ops] == ["mul_", "sum"]


def test_pattern_picks_ops_and_keeps_their_numbers(tmp_path: Path) -> None:
    model = Net()

    def run() -> None:
        step(model, IMAGES, LABELS)

    everything = {op.path for op in dumped(tmp_path / "all", run).walk()}
    for pattern, expected in (
        ("stem/*", {"1_conv2d", "1_conv2d/1_convolution"}),
        ("fc", {"7_linear", *(path for path in everything if path.startswith("7_linear/"))}),
        ("relu", {"4_relu"}),
    ):
        found = dumped(tmp_path / pattern.replace("/", "").strip("*"), run, pattern=pattern)
        assert {op.path for op in found.walk()} == expected


# --- the run is not changed ---------------------------------------------------------------------


@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize("kind", ["plain", "prepared", "training", "evaluation", "resnet"])
def test_row58_the_run_has_the_same_bits(tmp_path: Path, kind: str, compare: bool) -> None:
    if kind in ("training", "evaluation"):
        model: nn.Module = quantized_net(kind == "training")
    elif kind == "resnet":
        model = ResNet(dropout=0.2)
        linger.prepare(model, (torch.randn(4, 3, 8, 8),))
        linger.fuse_bn(model)
        linger.normalize(model, output="99.9%")
        linger.quantize(model)
        model.train()
    else:
        model = Net()
        if kind == "prepared":
            linger.prepare(model, (IMAGES,))
    x = torch.randn(4, 3, 8, 8) if kind == "resnet" else IMAGES
    twin = copy.deepcopy(model)
    with linger.Dumper(tmp_path / "dump", level=2, compare=compare):
        watched = [step(model, x, LABELS) for _ in range(2)]
    expected = [step(twin, x, LABELS) for _ in range(2)]
    for a, b in zip(watched, expected, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    state, twin_state = model.state_dict(), twin.state_dict()
    assert all(torch.equal(state[name], twin_state[name]) for name in twin_state)


def test_row58_a_transformer_layer_keeps_its_one_kernel(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = layer(x)
        with linger.Dumper(tmp_path / "dump"):
            found = layer(x)
            after = x + 1
    dump = linger.read_dump(tmp_path / "dump")
    assert [op.op for op in dump.ops] == ["_transformer_encoder_layer_fwd", "add"]
    assert torch.equal(found, expected)
    assert torch.equal(after, x + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_row58_the_run_has_the_same_bits_on_a_gpu(tmp_path: Path) -> None:
    model = Net().cuda()
    twin = copy.deepcopy(model)
    x, labels = IMAGES.cuda(), LABELS.cuda()
    with linger.Dumper(tmp_path / "dump", level=2, compare=True):
        watched = step(model, x, labels)
    assert all(torch.equal(a, b) for a, b in zip(watched, step(twin, x, labels), strict=True))
    ops = [op.op for op in linger.read_dump(tmp_path / "dump").walk()]
    assert "convolution_backward" in ops


# --- references ---------------------------------------------------------------------------------


def test_row58_a_reference_stands_beside_the_result(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    weight = torch.randn(2, 4)
    dump = dumped(tmp_path / "dump", lambda: F.linear(x, weight).exp(), level=2, compare=True)
    mm, exp = dump["1_linear/2_mm"], dump["2_exp"]
    for op, double in (
        (mm, x.double() @ weight.double().t()),
        (exp, (x @ weight.t()).double().exp()),
    ):
        assert torch.equal(op.values["reference_float"].tensor, double)
        error = (op.values["result"].tensor.double() - double).abs().max()
        row = next(r for r in linger.compare_references(dump) if r.op == op.path)
        assert row.max_error == float(error)


def test_row58_in_place_ops_outs_and_random_ops_are_not_compared(tmp_path: Path) -> None:
    x = torch.rand(4)

    def run() -> None:
        y = x * 2
        y.add_(1)
        torch.add(x, x, out=torch.empty(4))
        torch.bernoulli(x)
        F.relu(y, inplace=True)

    dump = dumped(tmp_path / "dump", run, compare=True)
    compared = {op.path for op in dump.walk() if "reference_float" in op.values}
    assert [op.op for op in dump.ops] == ["mul", "add_", "add", "bernoulli", "relu"]
    assert compared == {"1_mul"}
    assert all("result" in op.values for op in dump.ops)
    assert dump.failed_references == 0


def test_row58_a_reference_that_fails_is_counted(tmp_path: Path) -> None:
    library = torch.library.Library("linger_dump_test", "DEF")
    library.define("fussy(Tensor x) -> Tensor")

    def fussy(x: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            msg = "single precision only"
            raise ValueError(msg)
        return x * 2

    library.impl("fussy", fussy, "CompositeExplicitAutograd")
    x = torch.ones(2)
    dump = dumped(
        tmp_path / "dump", lambda: torch.ops.linger_dump_test.fussy(x), level=2, compare=True
    )
    op = dump.ops[0]
    assert op.op == "fussy"
    assert dump.failed_references == 1
    assert "single precision only" in op.info["no_reference_float"]
    assert op.values["result"].tensor.tolist() == [2.0, 2.0]


def test_row58_sites_are_compared_with_float_and_with_integers(tmp_path: Path) -> None:
    model = quantized_net()
    x = IMAGES
    with torch.no_grad():
        dump = dumped(tmp_path / "dump", lambda: model(x), level=2, compare=True)
        rows = {row.site: row for row in linger.divergence(model, x)}
    sites = {op.info["site"]: op for op in dump.walk() if "site" in op.info}
    assert set(rows) <= set(sites)
    for site in rows:
        values = sites[site].values
        result, integers = values["result"].tensor, values["reference_integer"].tensor
        assert torch.equal(result, integers)
    conv = sites["stem/conv2d/0"].values
    stem, bn = model.stem, model.bn
    with torch.no_grad():
        y = F.conv2d(x, stem.weight, stem.bias, padding=1)
        folded = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    torch.testing.assert_close(conv["reference_float"].tensor, folded)
    assert not torch.equal(conv["reference_float"].tensor, conv["result"].tensor)


def test_row58_a_site_that_works_in_place_is_not_compared(tmp_path: Path) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        return y + x

    model = Lambda(forward, a=nn.Conv2d(1, 1, 1), b=nn.Conv2d(1, 1, 1))
    linger.prepare(model, (IMAGES,))
    linger.quantize(model)
    linger.calibrate(model, [IMAGES]).eval()
    dump = dumped(tmp_path / "dump", lambda: model(IMAGES), compare=True)
    compared = {op.info["site"]: "reference_float" in op.values for op in dump.ops}
    assert compared == {"a/conv2d/0": True, "b/conv2d/0": True, "/add/0": False, "/add/1": True}


def test_references_see_no_integers_while_ranges_move(tmp_path: Path) -> None:
    model = quantized_net(training=True)
    dump = dumped(tmp_path / "dump", lambda: model(IMAGES), compare=True)
    names = {name for op in dump.walk() for name in op.values}
    assert "reference_float" in names
    assert "reference_integer" not in names


# --- quantized tensors --------------------------------------------------------------------------


def test_row62_codes_scale_and_zero_point(tmp_path: Path) -> None:
    model = quantized_net()
    with torch.no_grad():
        dump = dumped(tmp_path / "fake", lambda: model(IMAGES), level=2)
        with linger.integer(model):
            integers = dumped(tmp_path / "integer", lambda: model(IMAGES), level=2)
    site = instrumentation_of(model).find("stem/conv2d/0")
    assert site.output is not None
    step = float(site.output.step())
    for found in (dump, integers):
        op = next(op for op in found.ops if op.info.get("site") == "stem/conv2d/0")
        codes = op.values["result_codes"].tensors[0]
        assert (codes.scale, codes.zero_point, codes.bits) == (step, 0, 8)
        assert codes.values is not None
        assert codes.values.dtype is torch.int8
        assert torch.equal(codes.values.float() * step, op.values["result"].tensor)
        assert op.values["result"].tensors[0].scale == step
    assert integers["1_conv2d"].info["system"] == "integer"


def test_row62_a_zero_point_that_is_not_zero_is_shown() -> None:
    x = with_tag(torch.tensor([0.5, -0.5]), Tag(0.25, 9, "site", zero_point=3))
    found = describe_codes(x, 2)
    assert found is not None
    assert found.lines[1:] == ["5", "1"]  # as they are stored
    assert found.lines[0].endswith(": Scale = 0.25 : Zero point = 3 : Bits = 8")
    assert describe_codes(torch.ones(2), 2) is None


# --- nesting and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("enable", [True, False])
def test_row60_an_inner_dumper_does_not_stop_the_outer(tmp_path: Path, enable: bool) -> None:
    x = torch.ones(2)
    with linger.Dumper(tmp_path / "outer", compare=True):
        x + 1
        with linger.Dumper(tmp_path / "inner", enable=enable, compare=True):
            x * 2
        x - 1
    outer = linger.read_dump(tmp_path / "outer")
    assert [op.path for op in outer.walk()] == ["1_add", "2_mul", "3_sub"]
    if enable:
        assert paths(linger.read_dump(tmp_path / "inner").ops) == ["1_mul"]


def test_row60_an_exception_comes_through_and_closes_the_dump(tmp_path: Path) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be"), linger.Dumper(tmp_path / "dump"):
        x @ x
    x + 1
    dump = linger.read_dump(tmp_path / "dump")
    assert [op.op for op in dump.ops] == ["matmul"]
    # The arguments of the op that failed are there; a result is not.
    assert set(dump.ops[0].children[0].values) == {"arg_self", "arg_mat2"}


def test_a_dumper_that_runs_cannot_be_entered_again(tmp_path: Path) -> None:
    dumper = linger.Dumper(tmp_path / "dump")
    with dumper, pytest.raises(linger.ConfigError, match="running already"):
        dumper.__enter__()
    with dumper:
        pass
    assert dumper.folder == tmp_path / "dump1"


# --- reading and comparing ----------------------------------------------------------------------


def test_row63_nan_equals_nan_and_infinity_is_a_difference(tmp_path: Path) -> None:
    values = [[float("nan"), 1.0, float("inf")], [float("nan"), 2.0, float("-inf")]]
    dumps = []
    for index, row in enumerate([*values, values[0]]):
        x = torch.tensor(row)
        dumps.append(dumped(tmp_path / f"{index}", lambda x=x: x + 0, level=2))
    assert not len(linger.diff_dumps(dumps[0], dumps[2]))
    first = linger.diff_dumps(dumps[0], dumps[1]).first
    assert first is not None
    assert (first.mismatches, first.max_error, first.mean_error) == (2, float("inf"), 0.5)


def test_row63_what_a_site_prepares_once_is_no_difference(tmp_path: Path) -> None:
    model = quantized_net()
    for name in ("first", "second"):
        model.zero_grad()
        with linger.Dumper(tmp_path / name, level=2):
            F.cross_entropy(model(IMAGES), LABELS).backward()
    first, second = (linger.read_dump(tmp_path / name) for name in ("first", "second"))
    assert len(first["1_conv2d"].children) > len(second["1_conv2d"].children)
    assert not len(linger.diff_dumps(first, second))
    with torch.no_grad():
        model.stem.weight.mul_(2)
    model.train().eval()
    with linger.Dumper(tmp_path / "third", level=2):
        model(IMAGES)
    found = linger.diff_dumps(second, tmp_path / "third")
    assert found.first is not None
    assert (found.first.op, found.first.value) == ("1_conv2d", "arg_weight")


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 4).t(),
        torch.randn(5).to(torch.bfloat16),
        torch.randn(5).half(),
        torch.tensor([2**62 + 1, -5]),
        torch.tensor([True, False]),
        torch.randn(2, 2, dtype=torch.complex64),
        torch.tensor(float("nan")),
        torch.empty(0, 2),
    ],
    ids=["strided", "bfloat16", "half", "int64", "bool", "complex", "nan", "empty"],
)
def test_row63_a_tensor_is_read_back_as_it_was(tmp_path: Path, x: Tensor) -> None:
    dump = dumped(tmp_path / "dump", lambda: x.clone(), level=2)
    found = dump["1_clone"].values["result"].tensor
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    assert torch.equal(found.nan_to_num(), x.nan_to_num())


def test_row63_two_equal_runs_do_not_differ_and_the_first_difference_is_named(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bn.running_mean[2] += 0.5
    runs = {"a": model, "b": copy.deepcopy(model), "c": other}
    for name, net in runs.items():
        with torch.no_grad(), linger.Dumper(tmp_path / name, level=2):
            net(IMAGES)
    same = linger.diff_dumps(tmp_path / "a", tmp_path / "b")
    assert len(same) == 0
    assert same.first is None
    found = linger.diff_dumps(tmp_path / "a", tmp_path / "c")
    first = found.first
    assert first is not None
    assert (first.op, first.module) == ("2_batch_norm", "bn")
    assert first.value == "arg_running_mean"
    assert (first.mismatches, first.elements) == (1, 4)
    assert first.max_error == pytest.approx(0.5)
    assert first.mean_error == pytest.approx(0.125)
    errors = [row.max_error for row in found.ranked()]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) > 2


def test_row63_the_command_says_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, number in (("a", 1.0), ("b", 1.0), ("c", 1.5)):
        with linger.Dumper(tmp_path / name, compare=True):
            torch.full((3,), number).exp()
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert cli.main(["diff-dumps", a, b]) == 0
    assert capsys.readouterr().out == "nothing differs\n"
    assert cli.main(["diff-dumps", a, c]) == 1
    assert capsys.readouterr().out.startswith("first difference: 1_full: arg_fill_value: content\n")
    assert cli.main(["diff-dumps", a]) == 1
    assert "reference_float" in capsys.readouterr().out
    assert cli.main(["diff-dumps", a, str(tmp_path)]) == 2
    assert "is no dump" in capsys.readouterr().err


def test_dumps_of_other_ops_shapes_and_levels_are_told_apart(tmp_path: Path) -> None:
    x = torch.ones(2)
    a = dumped(tmp_path / "a", lambda: (x + 1, x * 2))
    b = dumped(tmp_path / "b", lambda: (x + 1, x.exp()))
    found = linger.diff_dumps(a, b)
    assert {(row.op, row.found) for row in found} == {
        ("2_mul", "only in the first"),
        ("2_exp", "only in the second"),
    }
    wider = dumped(tmp_path / "wider", lambda: (torch.ones(3) + 1,))
    assert linger.diff_dumps(a, wider)[0].found in ("only in the first", "only in the second")
    c = dumped(tmp_path / "c", lambda: x.double() + 1)
    first = linger.diff_dumps(dumped(tmp_path / "d", lambda: x + 1), c).first
    assert first is not None
    assert first.found == "type"
    with pytest.raises(linger.ConfigError, match="level"):
        linger.diff_dumps(a, dumped(tmp_path / "e", lambda: x + 1, level=2))


def test_a_dump_that_has_not_ended_or_lost_a_file_is_an_error(tmp_path: Path) -> None:
    dump = dumped(tmp_path / "dump", lambda: torch.ones(2) + 1)
    (dump.folder / "2_add" / "result.npy").unlink()
    with pytest.raises(linger.ConfigError, match=r"result\.npy"):
        _ = dump["2_add"].values["result"].tensor
    (dump.folder / "dump.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(linger.ConfigError):
        linger.read_dump(dump.folder)
    (dump.folder / "dump.json").unlink()
    with pytest.raises(linger.ConfigError, match="not ended"):
        linger.read_dump(dump.folder)


def test_arrays_hold_what_the_text_holds(tmp_path: Path) -> None:
    dump = dumped(tmp_path / "dump", lambda: torch.randn(3, 5).exp(), level=2)
    folder = dump.folder / "2_exp"
    lines = (folder / "result.txt").read_text().splitlines()[1:]
    array = np.load(folder / "result.npy")
    assert array.shape == (3, 5)
    assert np.array_equal(np.array([np.float32(line) for line in lines]), array.reshape(-1))
