"""Mainspring's kernels: one op a file, each with a reference in plain PyTorch."""
