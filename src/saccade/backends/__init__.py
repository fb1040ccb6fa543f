"""Kernels of device families, one folder each; none imports another."""
