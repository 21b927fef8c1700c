"""Masks that are mostly blocks: what is stored, what users do with them, and the lists that kernels read."""
