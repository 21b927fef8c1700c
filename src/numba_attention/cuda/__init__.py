"""Kernels for NVIDIA GPUs: registers, tiles and algorithms, as Python that Numba compiles and a NumPy emulator runs."""
