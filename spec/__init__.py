"""The language: a decoder transformer as one declarative spec, and the one forward pass that every backend runs."""

from spec.config import Attention, Block, Norm, Rope, Spec
from spec.errors import MissingDependency, Problem, SpecError, UserError
from spec.load import dump, load, parse, presets
from spec.params import Param, params

__all__ = [
    "Attention",
    "Block",
    "MissingDependency",
    "Norm",
    "Param",
    "Problem",
    "Rope",
    "Spec",
    "SpecError",
    "UserError",
    "dump",
    "load",
    "params",
    "parse",
    "presets",
]
