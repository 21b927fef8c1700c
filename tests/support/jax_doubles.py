"""JAX with numbers of 64 bits, for a while."""

import importlib
from contextlib import contextmanager


@contextmanager
def doubles(jax):
    switch = jax.enable_x64 if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental").enable_x64
    with switch(True):
        yield
