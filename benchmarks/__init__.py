"""Benchmarks for asv: see "Compare two commits" in the README."""
