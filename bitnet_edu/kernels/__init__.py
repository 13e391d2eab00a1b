"""Ternary arithmetic compiled by Numba: the teaching ladder and the production kernels."""
