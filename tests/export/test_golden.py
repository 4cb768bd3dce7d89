"""The runner against vectors measured on the engine, for every op that the exporter writes.

What an engine computes wrongly was not recorded, so every vector has to be equal. The known defects
of the engines are: ``Conv1dInt`` with a kernel above 1 or pads, ``iqCat`` of an operand finer than
its result (both venusA), ``AvgPool2dInt`` between different scales (venus), ``Transpose`` by 0213
and 0321 (venusA), and ``iqSub`` (all).
"""

import numpy as np
import pytest

from lightning_linger.export import OnnxIntegerRunner
from tests.export import golden


def test_there_are_vectors_for_every_platform():
    platforms = {name.partition("__")[2] for name in golden.names()}
    assert platforms == {"venus", "arcs", "venusA"}


@pytest.mark.parametrize("name", golden.names())
def test_runner_equals_the_engine(name):
    vector = golden.load(name)
    runner = OnnxIntegerRunner(vector.model)
    for run in range(vector.runs):
        results = runner.run({key: array[run] for key, array in vector.inputs.items()})
        for key, measured in vector.outputs.items():
            expected = measured[run]
            # A Dequant at the graph's end is removed by the packer: the engine returns codes.
            found = _codes(results[key], key, vector)
            assert found.shape == expected.shape
            assert np.array_equal(found, expected)


def _codes(result, output, vector):
    if not np.issubdtype(result.dtype, np.floating):
        return result
    producer = next(node for node in vector.model.graph.node if output in node.output)
    scale = next(a.f for a in producer.attribute if a.name == "scale_o")
    return np.round(result * scale).astype(np.int64)
