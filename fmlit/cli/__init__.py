"""The command line: one module per command, and ``main`` in front of them."""
