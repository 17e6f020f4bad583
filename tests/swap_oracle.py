"""All swaps of a row by definition, in numpy and float64: shares no code with the product."""

import numpy as np


def smallest_change(weight, gram, mask, block, linear=None):
    """Lowest Δ of any swap of each row, in the raw units of W (rows, cols) and G (cols, cols).

    Δ = 2 w_u c_u + w_u² G_uu - 2 w_p c_p + w_p² G_pp - 2 w_u w_p G_up,  c = G r + h.
    """
    weight, gram = np.asarray(weight, np.float64), np.asarray(gram, np.float64)
    mask = np.asarray(mask)
    rows, cols = weight.shape
    same_block = (np.arange(cols) // block)[:, None] == (np.arange(cols) // block)[None, :]
    lowest = np.full(rows, np.inf)
    for row in range(rows):
        w, m = weight[row], mask[row]
        c = gram @ np.where(m, 0.0, w)
        if linear is not None:
            c = c + np.asarray(linear, np.float64)[row]
        square = w * w * np.diag(gram)
        kept, pruned = np.flatnonzero(m), np.flatnonzero(~m)
        change = (2 * w * c + square)[kept][:, None] + (square - 2 * w * c)[pruned][None, :]
        change -= 2 * np.outer(w[kept], w[pruned]) * gram[np.ix_(kept, pruned)]
        lowest[row] = np.where(same_block[np.ix_(kept, pruned)], change, np.inf).min(initial=np.inf)
    return lowest


def errors_by_definition(weight, activations, mask, dense=None):
    """``‖W X - (M∘W) X̂‖²`` of each row from activations Xᵀ, X̂ᵀ (tokens, cols)."""
    weight, inputs = np.asarray(weight, np.float64), np.asarray(activations, np.float64)
    dense = inputs if dense is None else np.asarray(dense, np.float64)
    lost = weight @ dense.T - np.where(np.asarray(mask), weight, 0.0) @ inputs.T
    return (lost**2).sum(1)
