"""What is to be solved: sparsity patterns, Gram matrices, layer problems, instances."""

from .export import export_row, read_references, write_references
from .files import load_instance, save_instance
from .gram import Gram, GramAccumulator
from .layer import Drift, LayerProblem
from .metric import CoupledErrors, coupled_row, output_metric
from .pattern import Coupling, LayerBudget, Pattern, PatternRule, SparsityPattern, parse_pattern
from .synthetic import synthetic_activations, synthetic_layer

__all__ = [
    "CoupledErrors",
    "Coupling",
    "Drift",
    "Gram",
    "GramAccumulator",
    "LayerBudget",
    "LayerProblem",
    "Pattern",
    "PatternRule",
    "SparsityPattern",
    "coupled_row",
    "export_row",
    "load_instance",
    "output_metric",
    "parse_pattern",
    "read_references",
    "save_instance",
    "synthetic_activations",
    "synthetic_layer",
    "write_references",
]
