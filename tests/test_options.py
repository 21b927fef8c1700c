"""Every entry point takes every option: compared, both ways, with the one place that declares them."""

import inspect
from typing import get_type_hints

import numpy as np
import pytest

import numba_attention as na
from numba_attention import options
from numba_attention.options import OptionArguments, Options

LAYER = na.MultiHeadAttention(8, 2, rng=0)

# How the tasks of Dask run, which all functions for its arrays take.
RUNNING = ("backend", "threads", "split_every", "stream")
# What each has besides options.
ENTRY_POINTS = {
    "attention": (lambda: na.attention, {"query", "key", "value", "return_lse", "out", "backend"}),
    "attention_backward": (
        lambda: na.attention_backward,
        {"grad_out", "query", "key", "value", "out", "lse", "grad_lse", "mod_grads", "backend"},
    ),
    "attention_jvp": (
        lambda: na.attention_jvp,
        {"tangents", "query", "key", "value", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "backend"},
    ),
    "attention_backward_jvp": (
        lambda: na.attention_backward_jvp,
        {
            "tangents", "grad_out", "query", "key", "value", "out", "lse", "out_tangent", "lse_tangent", "grad_lse",
            "grad_out_tangent", "grad_lse_tangent", "cu_seqlens_q", "cu_seqlens_k", "backend",
        },
    ),
    "attention_double_backward": (
        lambda: na.attention_double_backward,
        {
            "grad_grads", "grad_out", "query", "key", "value", "out", "lse", "grad_lse", "through_saved",
            "cu_seqlens_q", "cu_seqlens_k", "backend",
        },
    ),
    "attention_weights": (lambda: na.attention_weights, {"query", "key", "heads", "rows", "backend"}),
    "attention_varlen": (
        lambda: na.attention_varlen,
        {"query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "return_lse", "out", "backend"},
    ),
    "attention_varlen_backward": (
        lambda: na.attention_varlen_backward,
        {
            "grad_out", "query", "key", "value", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "grad_lse", "mod_grads",
            "backend",
        },
    ),
    "attention_decode": (lambda: na.attention_decode, {"query", "cache", "ids", "return_lse", "out", "backend"}),
    "layer": (
        lambda: LAYER.__call__,
        {"query", "key", "value", "key_padding_mask", "cache", "ids", "cu_seqlens", "positions", "need_weights",
         "average_weights", "training"},
    ),
    "layer.forward": (
        lambda: LAYER.forward,
        {
            "query", "key", "value", "key_padding_mask", "cu_seqlens", "positions", "need_weights", "average_weights",
            "training",
        },
    ),
    "dask": (lambda: _bridge("dask"), {"query", "key", "value", "return_lse", *RUNNING}),
    "dask_backward": (
        lambda: _bridge("dask", "attention_backward"),
        {"grad_out", "query", "key", "value", "out", "lse", "grad_lse", "mod_grads", *RUNNING},
    ),
    "dask_varlen": (
        lambda: _bridge("dask", "attention_varlen"),
        {"query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "return_lse", *RUNNING},
    ),
    "dask_varlen_backward": (
        lambda: _bridge("dask", "attention_varlen_backward"),
        {
            "grad_out", "query", "key", "value", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "grad_lse", "mod_grads",
            *RUNNING,
        },
    ),
    "torch": (lambda: _bridge("torch"), {"query", "key", "value", "return_lse", "backend"}),
    "jax": (lambda: _bridge("jax"), {"query", "key", "value", "return_lse", "backend"}),
}  # fmt: skip
DEFAULTS = {"attention_decode": {"is_causal": "bottom-right"}}


def _bridge(name, function="attention"):
    pytest.importorskip(name)
    return getattr(pytest.importorskip(f"numba_attention.{name}"), function)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_signature_shows_every_option_and_nothing_else(name):
    find, own = ENTRY_POINTS[name]
    parameters = inspect.signature(find()).parameters
    assert set(parameters) == own | set(Options._fields)
    expected = Options._field_defaults | DEFAULTS.get(name, {})
    assert {option: parameters[option].default for option in Options._fields} == expected
    assert all(parameters[option].kind is inspect.Parameter.KEYWORD_ONLY for option in Options._fields)


def test_the_two_declarations_agree():
    assert tuple(OptionArguments.__annotations__) == Options._fields
    types, of_fields = get_type_hints(OptionArguments), get_type_hints(Options)
    assert types == {name: of_fields[name] for name in types}


def test_the_two_declarations_of_how_tasks_run_agree():
    arguments = pytest.importorskip("numba_attention.dask.arguments")
    types, of_fields = get_type_hints(arguments.Arguments), get_type_hints(arguments.Running)
    assert types == get_type_hints(OptionArguments) | of_fields
    assert arguments.Running._fields == RUNNING
    text = inspect.getdoc(_bridge("dask"))
    for name in RUNNING:
        assert f"\n{name} : " in text


def test_every_array_option_says_what_its_axes_are():
    kinds = [options.PER_SCORE, options.PER_HEAD, options.PER_SEQUENCE, options.PER_CALL]
    listed = [name for kind in kinds for name in kind]
    assert len(set(listed)) == len(listed)
    others = {"is_causal", "window", "scale", "softcap", "dropout_p", "seed", *options.IN_PYTHON}
    assert set(listed) | others == set(Options._fields)


def test_the_command_line_has_every_option():
    typer = pytest.importorskip("typer")
    from numba_attention.cli.commands import app

    command = typer.main.get_command(app).commands["run"]
    files_and_numbers = {*Options._fields} - {"is_causal", *options.IN_PYTHON}
    assert {p.name for p in command.params} >= files_and_numbers | {"causal", "bottom_right"}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_unknown_names_are_refused_with_the_nearest(name):
    find, _ = ENTRY_POINTS[name]
    function = find()
    positional = [None for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if name in ("torch", "jax"):
        array = pytest.importorskip(name).numpy if name == "jax" else pytest.importorskip(name)
        positional = [array.ones((3, 4)) for _ in positional]
    for wrong, meant in {"alibi_slope": "alibi_slopes", "causal": "is_causal", "softmax_scale": "scale"}.items():
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{wrong}'; did you mean {meant}\?"):
            function(*positional, **{wrong: 1})
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz'; it takes .*query, .*key_lengths"):
        function(*positional, zzz=1)


def test_text_of_every_option_stands_in_attention():
    text = inspect.getdoc(na.attention)
    for option in Options._fields:
        assert any(option in line.split(" : ")[0].split(", ") for line in text.splitlines() if " : " in line), option


@pytest.mark.parametrize("name", ["attention", "layer", "layer.forward"])
def test_help_fits_a_screen(name):
    find, own = ENTRY_POINTS[name]
    assert len(str(inspect.signature(find()))) < 700 + 50 * len(own)


def test_options_given_as_their_defaults_change_nothing():
    q = np.random.default_rng(0).standard_normal((2, 5, 8), dtype=np.float32)
    np.testing.assert_array_equal(na.attention(q, q, q), na.attention(q, q, q, **Options()._asdict()))
