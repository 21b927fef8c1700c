"""``python -m numba_attention``: the same as the ``numba-attention`` command."""

from .cli.main import main

if __name__ == "__main__":
    main()
