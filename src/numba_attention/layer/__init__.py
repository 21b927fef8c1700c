"""The multi-head attention layer: its parameters, projections, inputs, and its use with caches."""
