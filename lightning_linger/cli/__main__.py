"""``python -m lightning_linger.cli``."""

import sys

from lightning_linger.cli import main

sys.exit(main())
