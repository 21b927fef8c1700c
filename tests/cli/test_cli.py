"""The command line: every command once, and every way to misuse `run`."""

import json
import subprocess
import sys

import numpy as np
import pytest

import numba_attention as na

typer_testing = pytest.importorskip("typer.testing")

from numba_attention.cli.commands import app  # noqa: E402


@pytest.fixture
def cli():
    runner = typer_testing.CliRunner()

    def call(*arguments, code=0):
        result = runner.invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result.output

    return call


@pytest.fixture
def arrays(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"query": (2, 4, 9, 8), "key": (2, 2, 11, 8), "value": (2, 2, 11, 5)}
    made = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, array in made.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "all.npz", **made)
    return made


def files(folder):
    return [folder / f"{name}.npy" for name in ("query", "key", "value")]


def test_info(cli):
    output = cli("info")
    for word in ("numba", "threads", "SIMD", "Kernel cache", "reference"):
        assert word in output


def test_info_shows_what_looks_like_markup(cli, monkeypatch):
    """Rich would take the name of an extra in brackets for a style."""
    facts = {"Backends": {"cuda": "not usable: pip install 'numba-attention[cuda13]'"}}
    monkeypatch.setattr(sys.modules["numba_attention.show_config"], "show_config", lambda mode: facts)
    assert "pip install 'numba-attention[cuda13]'" in cli("info")


def test_version(cli):
    assert cli("--version") == f"{na.__version__}\n"


def test_show_config(capsys):
    facts = na.show_config("dicts")
    na.show_config()
    printed = capsys.readouterr().out
    for section, values in facts.items():
        assert section in printed
        assert all(value in printed for value in values.values())
    with pytest.raises(ValueError, match="mode must be 'stdout' or 'dicts'"):
        na.show_config("json")


def test_warmup(cli):
    assert "kernels are ready" in cli("warmup")


OPTIONS = {
    "nothing": ([], {}),
    "causal": (["--causal"], {"is_causal": True}),
    "bottom-right": (["--causal", "--bottom-right"], {"is_causal": "bottom-right"}),
    "window": (["--window", "3,none"], {"window": (3, None)}),
    "offset": (["--causal", "--query-offset", "2"], {"is_causal": True, "query_offset": 2}),
    "lengths": (["--key-lengths", "5,11", "--query-lengths", "9"], {"key_lengths": [5, 11], "query_lengths": 9}),
    "prefix": (["--causal", "--prefix-lengths", "3,7"], {"is_causal": True, "prefix_lengths": [3, 7]}),
    "scale": (["--scale", "0.5", "--softcap", "3"], {"scale": 0.5, "softcap": 3.0}),
    "dropout": (["--dropout-p", "0.25", "--seed", "18446744073709551615"], {"dropout_p": 0.25, "seed": 2**64 - 1}),
    "slopes": (["--alibi-slopes", "1,.5,.25,0"], {"alibi_slopes": [1, 0.5, 0.25, 0]}),
    "sinks": (["--sinks", "1,-2,0,3"], {"sinks": [1.0, -2.0, 0.0, 3.0]}),
    "reference": (["--backend", "reference"], {"backend": "reference"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_run_option(cli, arrays, tmp_path, name):
    arguments, options = OPTIONS[name]
    cli("run", *files(tmp_path), "-o", tmp_path / "out.npy", *arguments)
    expected = na.attention(*arrays.values(), **options)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_run_arrays_from_files_and_lse(cli, arrays, tmp_path):
    rng = np.random.default_rng(1)
    options = {
        "mask": rng.random((2, 1, 1, 11)) < 0.7,
        "bias": rng.standard_normal((4, 9, 11), dtype=np.float32),
        "key_lengths": np.array([11, 4]),
        "sinks": rng.standard_normal(4),
    }
    arguments = []
    for name, array in options.items():
        np.save(tmp_path / f"{name}.npy", array)
        arguments += [f"--{name.replace('_', '-')}", tmp_path / f"{name}.npy"]
    cli("run", *files(tmp_path), "-o", tmp_path / "out.npy", "--lse", tmp_path / "lse.npy", *arguments)
    out, lse = na.attention(*arrays.values(), **options, return_lse=True)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), out)
    np.testing.assert_array_equal(np.load(tmp_path / "lse.npy"), lse)


def test_run_npz(cli, arrays, tmp_path):
    cli("run", tmp_path / "all.npz", "-o", tmp_path / "out.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), na.attention(*arrays.values()))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_run_dtype(cli, arrays, tmp_path, dtype):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    converted = [x.astype(dtype)[0, 0] for x in arrays.values()]
    for path, array in zip(files(tmp_path), converted, strict=True):
        np.save(path, array)
    cli("run", *files(tmp_path), "-o", tmp_path / "out.npy")
    out = np.load(tmp_path / "out.npy")
    np.testing.assert_array_equal(out.view(dtype), na.attention(*converted))
    assert out.shape == (9, 5)


def test_run_may_replace_its_input(cli, arrays, tmp_path):
    expected = na.attention(*arrays.values())
    cli("run", *files(tmp_path), "-o", tmp_path / "query.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "query.npy"), expected)


MISUSES = {
    "no such file": (["missing.npy", "key.npy", "value.npy"], "missing.npy"),
    "two files": (["query.npy", "key.npy"], "three .npy files or one .npz, got 2"),
    "an npz as an array": (["all.npz", "key.npy", "value.npy"], "must be a .npy"),
    "an array as an npz": (["query.npy"], "must be a .npz"),
    "other names": (["others.npz"], "has no key and no value"),
    "no array": (["text.npy", "key.npy", "value.npy"], "error"),
    "one dimension": (["flat.npy", "key.npy", "value.npy"], "query must have at least two dimensions"),
    "swapped": (["query.npy", "value.npy", "key.npy"], "head dimension"),
    "no window": (["query.npy", "key.npy", "value.npy", "--window", ""], "a window is LEFT,RIGHT"),
    "other batch": (["more.npy", "key.npy", "value.npy"], "leading dimensions of query and key and value"),
    "window": (["query.npy", "key.npy", "value.npy", "--window", "3"], "a window is LEFT,RIGHT"),
    "window of words": (["query.npy", "key.npy", "value.npy", "--window", "a,b"], "a window is LEFT,RIGHT"),
    "lengths": (["query.npy", "key.npy", "value.npy", "--key-lengths", "99"], "key_lengths must lie between 0 and 11"),
    "float mask": (["query.npy", "key.npy", "value.npy", "--mask", "query.npy"], "mask must be boolean"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_run_misused(cli, arrays, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    np.savez("others.npz", query=arrays["query"])
    np.save("flat.npy", np.ones(3, np.float32))
    np.save("more.npy", np.concatenate([arrays["query"]] * 2)[:3])
    (tmp_path / "text.npy").write_text("no array")
    before = sorted(tmp_path.iterdir())
    arguments, message = MISUSES[name]
    output = cli("run", *arguments, "-o", "out.npy", code=2)
    assert message in output
    assert sorted(tmp_path.iterdir()) == before  # no half-written result


def test_run_backend_that_cannot(cli, arrays, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_ATTENTION_BACKEND", "cuda")
    assert "cannot run here" in cli("run", *files(tmp_path), "-o", tmp_path / "out.npy", code=2)
    cli("run", *files(tmp_path), "-o", tmp_path / "out.npy", "--backend", "cpu")


def test_module_in_a_process(arrays, tmp_path):
    command = [sys.executable, "-m", "numba_attention", "run", *files(tmp_path), "-o", tmp_path / "out.npy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), na.attention(*arrays.values()))
    done = subprocess.run([*command, "--window", "1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: a window is")


def test_command_line_says_which_extra_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "numba_attention.cli.commands")
    from numba_attention.cli.main import main

    with pytest.raises(SystemExit, match=r"needs typer: pip install 'numba-attention\[cli\]'"):
        main()


def test_bench(cli, tmp_path):
    (tmp_path / "page.md").write_text("before <!-- bench:start --> old <!-- bench:end --> after")
    output = cli(
        "bench", "--quick", "--rows", "smallest", "--json", tmp_path / "b.json", "--into", tmp_path / "page.md"
    )
    assert "smallest 1x1x1x64: time " in output  # as soon as it is measured
    assert "smallest 1x1x1x64 " in output
    (row,) = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert set(row["seconds"]) >= {"ours", "einsum", "gemm", "read"}
    assert all(len(times) == 2 and min(times) > 0 for times in row["seconds"].values())
    assert set(row["verdicts"]) == {"us"}
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before <!--")
    assert page.endswith("--> after")
    assert "| smallest 1x1x1x64 |" in page
    assert "old" not in page


def test_bench_refuses_files_that_it_cannot_write_before_it_measures(cli, tmp_path, monkeypatch):
    def measure(*arguments, **options):
        raise AssertionError("it measured")

    monkeypatch.setattr("numba_attention.benchmarking.run", measure)
    (tmp_path / "page.md").write_text("no markers")
    for option, path, words in (
        ("--json", tmp_path / "missing" / "b.json", "No such file"),
        ("--json", tmp_path, "regular file"),
        ("--into", tmp_path / "missing.md", "No such file"),
        ("--into", tmp_path / "page.md", "bench:start"),
    ):
        assert words in cli("bench", option, path, code=2)


def test_bench_lists_and_refuses(cli, tmp_path):
    assert "full 4096 E64" in cli("bench", "--list")
    assert "no row's name contains" in cli("bench", "--rows", "nothing like it", code=2)
