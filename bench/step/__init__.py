"""One training step in several ways: packed, dense, compiled, plain."""
