"""``python -m benchmarks NAME``: measurements of this machine."""

import sys

from benchmarks import NAMES, app
from flexp.cli.main import main

main(app(set(NAMES).intersection(sys.argv[1:2]) or NAMES), prog="python -m benchmarks")
