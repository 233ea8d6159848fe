"""Compiled and Numba kernels: arrays and numbers only, nothing of the package is imported here."""
