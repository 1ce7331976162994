"""`python -m rlhf_engine.bench`, which is `rlhf bench`."""

import sys

from rlhf_engine.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
