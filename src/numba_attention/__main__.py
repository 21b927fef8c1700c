"""``python -m numba_attention``: the same as the ``numba-attention`` command."""

from .cli import main

if __name__ == "__main__":
    main()
