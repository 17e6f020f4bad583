"""Solvers that change kept weights too."""
