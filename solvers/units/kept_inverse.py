"""The inverse on kept columns and the weights of least squares, as units are dropped and added.

With ``A`` the ridged Gram matrix and K the kept columns, ``B = A_KK⁻¹`` and ``Ŵ_K = C_K B`` (see
``problems.units``). Dropping the columns ``u`` raises the error after the update by, and adding ``p`` lowers
it by,

    tr S Ŵ_u B_uu⁻¹ Ŵ_uᵀ,      tr S r_p s_p⁻¹ r_pᵀ,

``r_p = C_p - Ŵ_K A_Kp`` and ``s_p = A_pp - A_pK B A_Kp`` the Schur complement (optimal brain surgeon: Hassibi
and Stork, NeurIPS 1992; for blocks of columns ZipLM, Kurtic et al., NeurIPS 2023, section 3). Either is an
update of rank ``width`` of both matrices: nothing is inverted again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problems.units import UnitProblem


class KeptInverse:
    """``B`` and ``Ŵ`` of kept units, embedded with zeros in all columns.

    Args:
        problem: the units and their consumer.
        kept: to begin with (units,), bool; all by default.

    Attributes:
        kept: (units,), bool.
        inverse: ``B`` (cols, cols), float64, zero outside of K.
        weight: ``Ŵ`` (rows, cols), float64, zero outside of K.
    """

    def __init__(self, problem: UnitProblem, kept: Tensor | None = None) -> None:
        self._problem = problem
        device = problem.columns.device
        self.kept = torch.ones(problem.units, dtype=torch.bool, device=device)
        if kept is not None:
            self.kept = kept.to(device).clone()
        self.refresh()

    def refresh(self) -> None:
        """Both anew, without what many updates have left in them."""
        ridged, target = self._problem.ridged, self._problem.target
        columns = self._problem.columns[self.kept].flatten()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged[columns][:, columns]))
        self.inverse = torch.zeros_like(ridged)
        self.inverse[columns[:, None], columns] = inverse
        self.weight = torch.zeros_like(target)
        self.weight[:, columns] = target[:, columns] @ inverse

    def blocks(self, matrix: Tensor, units: Tensor) -> Tensor:
        """Diagonal blocks (len(units), width, width) of a matrix (cols, cols)."""
        columns = self._problem.columns[units]
        return matrix[columns[:, :, None], columns[:, None, :]]

    def weight_products(self, units: Tensor) -> Tensor:
        """``Ŵ_uᵀ S Ŵ_u`` (len(units), width, width)."""
        columns = self._problem.columns[units]
        weighed = self._problem.weighed(self.weight)
        if columns.shape[1] == 1:  # of channels: nothing is gathered
            products: Tensor = torch.linalg.vecdot(self.weight, weighed, dim=0)
            return products[columns][..., None]
        return torch.einsum("rua,rub->uab", self.weight[:, columns], weighed[:, columns])

    def drop_costs(self, units: Tensor) -> Tensor:
        """What dropping each of ``units`` (kept ones) costs (len(units),)."""
        return _traces(self.weight_products(units), self.blocks(self.inverse, units))

    def add_gains(self, units: Tensor) -> Tensor:
        """By what taking in each of ``units`` (none of them kept) lowers the error (len(units),)."""
        columns = self._problem.columns[units]
        across = self._problem.ridged[:, columns.flatten()]
        through = (self.inverse @ across).view(-1, *columns.shape)
        missing = self._problem.target[:, columns.flatten()] - self.weight @ across
        own = self._problem.ridged[columns[:, :, None], columns[:, None, :]]
        schur = own - torch.einsum("kpa,kpb->pab", across.view(-1, *columns.shape), through)
        weighed = self._problem.weighed(missing).view(-1, *columns.shape)
        return _traces(torch.einsum("rpa,rpb->pab", missing.view(-1, *columns.shape), weighed), schur)

    def drop(self, unit: int) -> None:
        """Leave out a kept unit."""
        columns = self._problem.columns[unit]
        own = torch.linalg.inv(self.inverse[columns][:, columns])
        rows = self.inverse[columns].clone()
        self.weight.addmm_(self.weight[:, columns] @ own, rows, alpha=-1)
        self.inverse.addmm_(rows.T @ own, rows, alpha=-1)
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0
        self.weight[:, columns] = 0
        self.kept[unit] = False

    def add(self, unit: int) -> None:
        """Take in a unit that is not kept."""
        columns = self._problem.columns[unit]
        across = self._problem.ridged[:, columns]
        through = self.inverse @ across  # zero outside of K
        schur = torch.linalg.inv(self._problem.ridged[columns][:, columns] - across.T @ through)
        missing = (self._problem.target[:, columns] - self.weight @ across) @ schur
        through[columns] = -torch.eye(len(columns), dtype=through.dtype, device=through.device)
        self.inverse.addmm_(through @ schur, through.T)
        self.weight.addmm_(missing, through.T, alpha=-1)
        self.kept[unit] = True


def _traces(products: Tensor, blocks: Tensor) -> Tensor:
    """``tr P B⁻¹`` of blocks (., width, width)."""
    solved: Tensor = products / blocks
    if blocks.shape[-1] > 1:
        solved = torch.linalg.solve(blocks, products)
    return solved.diagonal(dim1=-2, dim2=-1).sum(-1)
