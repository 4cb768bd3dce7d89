"""What is packed: one op at a time, and small networks, with what the packer makes of each.

A verdict is expected for every platform. Packing proves that the packer reads the file; that the
engine computes the integers of the file is proven by the vectors that were recorded from it, which
`tests/export/test_golden.py` runs. `vectors` names those of a case.
"""

from tests.thinker.cases.case import PackCase
from tests.thinker.cases.elementwise import ELEMENTWISE
from tests.thinker.cases.layers import LAYERS
from tests.thinker.cases.movement import MOVEMENT
from tests.thinker.cases.networks import NETWORKS
from tests.thinker.cases.pools import POOLS
from tests.thinker.cases.sequences import SEQUENCES

GROUPS: dict[str, list[PackCase]] = {
    "Layers": LAYERS,
    "Sums, products, activations": ELEMENTWISE,
    "Pools": POOLS,
    "Movement": MOVEMENT,
    "Functions, attention, sequences": SEQUENCES,
    "Networks": NETWORKS,
}

ALL = [case for cases in GROUPS.values() for case in cases]
