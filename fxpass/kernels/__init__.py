"""Kernels: programs over vector lanes, printed, built and bound."""
