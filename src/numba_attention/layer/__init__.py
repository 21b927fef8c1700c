"""Multi-head attention as a layer: its parameters, its projections, what a call is given, its use with caches."""
