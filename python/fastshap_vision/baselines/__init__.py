"""Rivals, for comparison: how they are trained."""
