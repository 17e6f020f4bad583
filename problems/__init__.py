"""What is to be solved: sparsity patterns, Gram matrices, layer problems, instances."""

from .files import load_instance, save_instance
from .gram import Gram, GramAccumulator
from .layer import Drift, LayerProblem
from .pattern import SparsityPattern
from .synthetic import synthetic_activations, synthetic_layer

__all__ = [
    "Drift",
    "Gram",
    "GramAccumulator",
    "LayerProblem",
    "SparsityPattern",
    "load_instance",
    "save_instance",
    "synthetic_activations",
    "synthetic_layer",
]
