"""`python -m rlhf_engine.bench`."""

import sys

from rlhf_engine.bench.command import Mistaken, run

try:
    sys.exit(run(sys.argv[1:]))
except Mistaken as mistake:
    sys.exit(f"rlhf bench: {mistake}")
