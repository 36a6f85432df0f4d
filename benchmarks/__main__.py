"""``python -m benchmarks NAME``: measurements of this machine."""

from benchmarks.commands.main import app
from flexp.cli.main import main

main(app, prog="python -m benchmarks")
