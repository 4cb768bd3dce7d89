"""Running the packer, with a program that does what it is told in its place."""

import json
import stat
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import lightning_linger as linger
from lightning_linger.export.packer import pack

SAYS_ARGUMENTS = """
import json, os, pathlib, sys
pathlib.Path("left behind").write_text("in its own folder")
target = sys.argv[sys.argv.index("-o") + 1]
pathlib.Path(target).write_text(json.dumps([sys.argv[1:], os.getcwd()]))
print("\\033[96m  total ops of model:1234\\033[0m")
"""
FAILS = "import sys; print({!r}); sys.exit(1)"


@pytest.fixture
def program(tmp_path: Path):
    def make(source: str) -> Path:
        path = tmp_path / "packer"
        path.write_text(f"#!{sys.executable}\n{source}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


def model(tmp_path: Path, op_type: str = "QConv2d", batch: int = 1, **attributes: str) -> Path:
    """A file with one node; the program in the packer's place does not look into it."""
    node = helper.make_node(op_type, ["x", "w"], ["y"], "the_node", domain="linger", **attributes)
    weight = onnx.numpy_helper.from_array(np.ones((1, 1, 1, 1), np.int8), "w")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.INT8, [batch, 1, 4, 4]) for name in "xy"
    ]
    graph = helper.make_graph([node], "graph", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_the_packer_is_told_the_platform_and_keeps_to_its_folder(tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = model(tmp_path, platform="venusA")
    packed = pack("model.onnx", "model.pkg", program(SAYS_ARGUMENTS), options=["--psramsize", "1"])
    arguments, folder = json.loads((tmp_path / "model.pkg").read_text())
    assert arguments[:2] == ["-g", str(path)]
    assert arguments[4:] == ["-p", "venusa", "-d", "False", "--psramsize", "1"]
    assert (packed.platform, packed.operations) == ("venusA", 1234)
    assert "\033" not in packed.log
    assert not Path(folder).exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"packer", "model.onnx", "model.pkg"}


@pytest.mark.parametrize(
    ("op_type", "platform", "expected"),
    [
        ("QConv2d", "venus", []),
        ("QConvTranspose2d", "venus", ["-m", "params:share-mem"]),
        ("QConvTranspose2d", "arcs", []),
        ("QLSTM", "arcs", ["--dma_prefetch", "False"]),
        ("QLinear", None, []),
    ],
)
def test_options_that_a_model_needs(tmp_path, program, op_type, platform, expected):
    named = {} if platform is None else {"platform": platform}
    packed = pack(model(tmp_path, op_type, **named), tmp_path / "a.pkg", program(SAYS_ARGUMENTS))
    arguments, _ = json.loads(packed.path.read_text())
    # Nodes that name no platform are packed for the first one.
    assert arguments[5:] == [platform or "venus", "-d", "False", *expected]


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("\033[91mError occurred: Scale mismatch\033[0m\nTraceback:\n ...", "Scale mismatch."),
        (
            "Error occurred: \nTraceback:\n  File x\n    assert a == b\nAssertionError\n===",
            "assert a",
        ),
        ("usage: tpacker\ntpacker: error: invalid choice", "error: invalid choice."),
        ("", "it printed nothing."),
    ],
)
def test_the_reason_of_a_refusal(tmp_path, program, printed, reason):
    with pytest.raises(linger.UnsupportedError, match="refused") as error:
        pack(model(tmp_path), tmp_path / "a.pkg", program(FAILS.format(printed)))
    assert reason in str(error.value)
    assert not (tmp_path / "a.pkg").exists()


def test_a_refusal_leaves_the_last_image(tmp_path, program):
    image = tmp_path / "a.pkg"
    image.write_bytes(b"the last one")
    with pytest.raises(linger.UnsupportedError):
        pack(model(tmp_path), image, program(FAILS.format("Error occurred: no")))
    assert image.read_bytes() == b"the last one"


def test_a_packer_that_does_not_finish_is_stopped(tmp_path, program):
    with pytest.raises(linger.UnsupportedError, match=r"did not finish .* in 0\.3 s"):
        pack(model(tmp_path), tmp_path / "a.pkg", program("while True: pass"), timeout=0.3)


def test_batches_are_refused_where_an_image_is_computed(tmp_path, program):
    packer = program(SAYS_ARGUMENTS)
    with pytest.raises(linger.UnsupportedError, match=r"`the_node` gets 3 images.* batch of one"):
        pack(model(tmp_path, batch=3), tmp_path / "a.pkg", packer)
    assert pack(model(tmp_path, "QLinear", batch=3), tmp_path / "a.pkg", packer)


def test_wrong_paths(tmp_path, program):
    path, packer = model(tmp_path), program(SAYS_ARGUMENTS)
    with pytest.raises(linger.ConfigError, match="no such file"):
        pack(tmp_path / "other.onnx", tmp_path / "a.pkg", packer)
    with pytest.raises(linger.ConfigError, match=r"no packer at .*make thinker-env"):
        pack(path, tmp_path / "a.pkg", tmp_path / "nothing")
    with pytest.raises(linger.ConfigError, match="does not exist"):
        pack(path, tmp_path / "nowhere" / "a.pkg", packer)
    path.write_bytes(b"no graph")
    with pytest.raises(linger.ConfigError, match="cannot read an ONNX model from"):
        pack(path, tmp_path / "a.pkg", packer)


def test_damaged_files_never_reach_the_packer(tmp_path, program):
    packer = program(SAYS_ARGUMENTS)
    path = model(tmp_path)
    damaged = onnx.load(path)
    damaged.graph.node[0].input[0] = "nothing"
    onnx.save(damaged, path)
    with pytest.raises(linger.ConfigError, match="reads 'nothing', which nothing makes"):
        pack(path, tmp_path / "a.pkg", packer)
    onnx.save(onnx.ModelProto(), path)
    with pytest.raises(linger.ConfigError, match="no ONNX graph with outputs"):
        pack(path, tmp_path / "a.pkg", packer)
    path = model(tmp_path, platform="arcs")
    several = onnx.load(path)
    other = several.graph.node.add()
    other.CopyFrom(several.graph.node[0])
    other.name, other.output[0], other.attribute[0].s = "the_other", "z", b"venus"
    onnx.save(several, path)
    with pytest.raises(linger.UnsupportedError, match="several platforms"):
        pack(path, tmp_path / "a.pkg", packer)
    assert not (tmp_path / "a.pkg").exists()


def test_weights_in_a_file_of_their_own_are_left_to_the_packer(tmp_path, program):
    path = model(tmp_path)
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, location="weights", size_threshold=0
    )
    (tmp_path / "weights").unlink()
    assert pack(path, tmp_path / "a.pkg", program(SAYS_ARGUMENTS)).path.exists()


def test_a_command_that_does_not_start(tmp_path):
    path = tmp_path / "packer"
    path.write_text("#!/does/not/exist\n")
    path.chmod(0o755)
    with pytest.raises(linger.ConfigError, match="cannot start"):
        pack(model(tmp_path), tmp_path / "a.pkg", path)
