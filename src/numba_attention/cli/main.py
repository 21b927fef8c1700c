"""The ``numba-attention`` command: its commands are in `commands`, which needs the ``cli`` extra."""

import sys


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from .commands import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich"):
            raise
        sys.exit(f"the command line needs {missing.name}: pip install 'numba-attention[cli]'")
    app(prog_name="numba-attention")


__all__ = ["main"]
