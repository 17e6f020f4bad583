"""Inner loops for CUDA devices, in Triton: one program descends one row.

A row's state lies in global memory and is left to the caches; what is kept low is how often a loop passes
over it and how much of ``R`` it reads. The state of a row:

- ``q``, ``delta`` (cols,): as in ``reference``;
- ``flags`` (cols,), bits: 1 kept, 2 its line has been tried since the last swap, 4 may not move now;
- ``level`` (cols,): level of ``s_j``; ``levels`` (LEVELS + 1,): the levels;
- work space: ``bounds`` (cols,), ``queue`` (cols,) and ``lows`` (LEVELS + 1 for each block).

Loops go over tiles of (BLOCKS, WIDE) columns: BLOCKS neighbouring blocks of the pattern, a part of each, or
all of it. ``cols`` is the index of no column. Every store that another thread reads has a barrier behind it,
and every load of what a store changes has one before it.
"""
