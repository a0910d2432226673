"""Rivals, for comparison: how they are trained."""

from .fastshap import FastSHAPExplainer, FastSHAPObjective, SurrogateObjective
from .viashap import ViaSHAPObjective

__all__ = ["FastSHAPExplainer", "FastSHAPObjective", "SurrogateObjective", "ViaSHAPObjective"]
