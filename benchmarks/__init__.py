"""``scripts/benchmark.py``: speed of training, sampling and the rest, against a bare loop and other packages."""
