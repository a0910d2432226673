"""Measurements: run from the repository's root, `python -m bench.<name>`, or by the targets of the Makefile."""
