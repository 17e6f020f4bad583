"""Whole units of a layer's inputs: channels of an MLP, heads, groups of heads that share keys and values.

A unit ``u`` owns columns ``block(u)`` of one layer, the consumer, and all that produces these inputs. With
``x_u = 1`` where it is pruned, the consumer's output error under drift and output metric is

    ‖(T - W X̂) + W diag(x_cols) X̂‖_S² = xᵀ Q x + 2 hᵀ x + const,
    Q = blocksum(Ĝ ∘ WᵀSW),   h_u = Σ_{j∈u} Σ_i (S W)_ij H_ij,   H = (T - W X̂) X̂ᵀ,

positive semidefinite by Schur's product theorem: a ``LayerProblem`` of one row with weights one, for which
every solver, bound and certificate holds as it stands. The diagonal of ``Q`` is the score of Wanda-sp (An et
al., AAAI 2024, section 4); with the centred ``Ĝ - n μ μᵀ``, whose mean a bias absorbs, it is FLAP's (the same
paper).

Where the kept columns' weights are then set by least squares, with a ridge towards the old ones, the error of
the kept columns K is no quadratic of x. With ``A = G + λ I`` and ``C = W A + H`` it is

    F(K) = tr S (W A Wᵀ + 2 W Hᵀ + D) - tr S C_K A_KK⁻¹ C_Kᵀ,      Ŵ_K = C_K A_KK⁻¹,

``D`` the covariance of the drift.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InvalidProblemError
from .gram import Gram
from .layer import Drift, LayerProblem
from .pattern import SparsityPattern

# The ridge as a share of the Gram matrix's mean diagonal: 1e-4 to 1e-3 make no difference that resolves.
RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class UnitProblem:
    """Which units of a layer's inputs to keep.

    Args:
        layer: the consumer; its pattern is not looked at.
        columns: (units, width), the columns of each unit, every column once.
        pattern: how many units of how many neighbours are kept.
        ridge: λ of the update, as a share of the mean diagonal of the Gram matrix, positive.

    Raises:
        InvalidProblemError: for columns that are not those of the layer, or no ridge.
        InvalidPatternError: if the units do not divide into the pattern's blocks.
    """

    layer: LayerProblem
    columns: Tensor
    pattern: SparsityPattern
    ridge: float = RIDGE

    def __post_init__(self) -> None:
        columns = self.columns.to(self.layer.device)
        if columns.ndim != 2 or not torch.equal(
            columns.flatten().sort().values, torch.arange(self.layer.cols, device=columns.device)
        ):
            raise InvalidProblemError(
                f"columns of units (units, width) are those of the layer, each once: expected "
                f"{self.layer.cols} columns, found a tensor {tuple(columns.shape)} with "
                f"{len(set(columns.flatten().tolist()))} of them"
            )
        if self.ridge <= 0:
            raise InvalidProblemError(f"the ridge is positive: expected more than 0, found {self.ridge:g}")
        object.__setattr__(self, "columns", columns)
        self.pattern.check_cols(len(columns))

    @property
    def units(self) -> int:
        """Number of units."""
        return self.columns.shape[0]

    @property
    def width(self) -> int:
        """Columns of a unit."""
        return self.columns.shape[1]

    @cached_property
    def weight(self) -> Tensor:
        """``W`` (rows, cols), float64."""
        return self.layer.weight.double()

    @cached_property
    def linear(self) -> Tensor:
        """``H`` (rows, cols), float64."""
        drift = self.layer.drift
        return torch.zeros_like(self.weight) if drift is None else drift.linear

    @cached_property
    def ridged(self) -> Tensor:
        """``A = G + λ I`` (cols, cols), float64."""
        matrix = self.layer.gram.matrix.clone()
        matrix.diagonal().add_(self.ridge * float(matrix.diagonal().mean()))
        return matrix

    @cached_property
    def target(self) -> Tensor:
        """``C = W A + H`` (rows, cols), float64."""
        return self.weight @ self.ridged + self.linear

    @cached_property
    def constant(self) -> float:
        """``tr S D``: the error of keeping everything."""
        drift, metric = self.layer.drift, self.layer.metric
        if drift is None:
            return 0.0
        if metric is None or drift.covariance is None:
            return float(drift.constant.sum())
        return max(0.0, float((metric * drift.covariance).sum()))

    @cached_property
    def total(self) -> float:
        """``tr S (W A Wᵀ + 2 W Hᵀ + D)``: the error of keeping nothing."""
        products = self.weighed(self.weight) * (self.weight @ self.ridged + 2 * self.linear)
        return float(products.sum()) + self.constant

    def weighed(self, rows: Tensor) -> Tensor:
        """``S`` times a matrix (rows, .)."""
        return rows if self.layer.metric is None else self.layer.metric @ rows

    def as_row(self, centred: bool = False) -> LayerProblem:
        """The choice of units whose weights are not updated, as a problem of one row (1, units).

        Args:
            centred: a bias absorbs the mean of what is pruned (FLAP); without drift only, and with a Gram
                matrix that knows the means.

        Raises:
            InvalidProblemError: if the layer cannot be centred.
        """
        if centred:
            return self.centred().as_row()
        gram, drift = self.layer.gram, self.layer.drift
        matrix = gram.matrix * (self.weight.T @ self.weighed(self.weight))
        order = self.columns.flatten()
        shape = (self.units, self.width, self.units, self.width)
        quadratic = matrix[order][:, order].view(shape).sum((1, 3))
        quadratic = (quadratic + quadratic.T) / 2
        row = None
        if drift is not None:
            linear = (self.weighed(self.weight) * self.linear).sum(0)[order].view(self.units, self.width)
            live = quadratic.diagonal() > 0  # a unit without any input costs nothing, whatever rounding says
            row = Drift(linear.sum(1).masked_fill(~live, 0)[None], linear.new_tensor([self.constant]))
        ones = torch.ones((1, self.units), dtype=torch.float64, device=quadratic.device)
        return LayerProblem(ones, Gram(quadratic, gram.tokens), self.pattern, row, name=self.layer.name)

    def centred(self) -> UnitProblem:
        """The same units of centred inputs ``X̂ - μ``: every error is that with the best bias.

        Raises:
            InvalidProblemError: if the layer cannot be centred.
        """
        gram, drift = self.layer.gram, self.layer.drift
        if gram.mean is None or drift is not None:
            raise InvalidProblemError(
                "centred inputs: expected a layer without drift and with means of its inputs, found "
                f"{'no means' if gram.mean is None else 'drift'}"
            )
        matrix = gram.matrix - gram.tokens * torch.outer(gram.mean, gram.mean)
        # what a dead or a constant channel leaves is rounding
        matrix.diagonal().clamp_(min=0)
        around = Gram(matrix, gram.tokens, torch.zeros_like(gram.mean))
        return replace(self, layer=replace(self.layer, gram=around))

    def bias(self, weight: Tensor) -> Tensor:
        """What the best bias adds to the consumer's (rows,): ``(W - Ŵ) μ`` of a weight ``Ŵ`` (rows, cols).

        Raises:
            InvalidProblemError: without means of the inputs.
        """
        mean = self.layer.gram.mean
        if mean is None:
            raise InvalidProblemError("bias of a layer: expected means of its inputs, found none")
        return (self.weight - weight) @ mean

    def mask(self, kept: Tensor) -> Tensor:
        """The consumer's mask (rows, cols) with the columns of ``kept`` (units,), bool."""
        columns = torch.zeros(self.layer.cols, dtype=torch.bool, device=self.columns.device)
        columns[self.columns[kept].flatten()] = True
        return columns.expand(self.layer.rows, -1)

    def updated(self, kept: Tensor) -> Tensor:
        """``Ŵ`` (rows, cols) of least squares on the columns of ``kept`` (units,); else zero."""
        columns = self.columns[kept].flatten()
        factor = torch.linalg.cholesky(self.ridged[columns][:, columns])
        weight = torch.zeros_like(self.weight)
        weight[:, columns] = torch.cholesky_solve(self.target[:, columns].T, factor).T
        return weight

    def error(self, kept: Tensor, weight: Tensor | None = None) -> float:
        """The consumer's error with the units of ``kept`` (units,), with the old weights or ``weight``."""
        return self.layer.objective(self.mask(kept), weight)

    def updated_error(self, kept: Tensor) -> float:
        """``F`` of the units of ``kept`` (units,): the error after the update, the ridge's share included."""
        columns = self.columns[kept].flatten()
        weight = self.updated(kept)
        explained = (self.weighed(self.target)[:, columns] * weight[:, columns]).sum()
        return self.total - float(explained)
