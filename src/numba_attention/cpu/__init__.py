"""The CPU kernels: vector IR, tiles, loops in the order of the paper, and how they are cached and launched."""
