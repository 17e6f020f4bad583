"""The inner loops of the CPU kernels (numba), one file per subject.

Notation as in ``reference``. A row keeps three vectors (cols,):

    δ_j,    a_j = q_j where kept, BIG where pruned,    b_j = q_j where pruned, BIG where kept

so that minima over kept or pruned weights need no branch: adding ``2 δ_j (...)`` to BIG leaves it
far above every real value, because rows are scaled to errors of about 1 (see ``scaling``).

Functions that take a range work on columns [first, last), one block of the pattern. Ties go to the lowest
index.
"""
