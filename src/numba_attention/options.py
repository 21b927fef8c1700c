"""The options of attention, declared once: every entry point takes them by name and gathers them into `Options`.

An option is a field of `Options`, with its default, and of its twin `OptionArguments`, with its type. Entry points end
with ``**options: Unpack[OptionArguments]``, call `gather` and are decorated with `takes_options`, so that ``help()``
and editors show the names. The text of an option stands in the docstring of `attention`.
"""

from __future__ import annotations  # short types in help()

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, TypeVar

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, Any]
Causal = bool | Literal["top-left", "bottom-right"]
Window = tuple[int | None, int | None]
Mod = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])


class Blocks(Protocol):
    """A mask that is stored by blocks: `BlockMask`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch or 1, heads or 1, L, S)."""

    def to_dense(self) -> Array:
        """Return the mask as an array of bool."""


class OptionArguments(TypedDict, total=False):
    """The options by name, for type checkers."""

    mask: ArrayLike | Blocks | None
    bias: ArrayLike | None
    is_causal: Causal
    window: Window | Sequence[int | None] | None
    query_offset: ArrayLike | None
    scale: float | None
    softcap: float | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None
    query_lengths: ArrayLike | None
    key_lengths: ArrayLike | None
    prefix_lengths: ArrayLike | None
    score_mod: Mod | None
    mask_mod: Mod | None
    mod_args: Sequence[Any]
    dropout_p: float
    seed: int | None


class Options(NamedTuple):
    """The options of one call, exactly as the caller passed them (see `attention`).

    A named tuple and not a dataclass, because one is built in every call: a frozen dataclass of this size takes 3 us,
    and the whole of a small call about 12.
    """

    mask: ArrayLike | Blocks | None = None
    bias: ArrayLike | None = None
    is_causal: Causal = False
    window: Window | Sequence[int | None] | None = None
    query_offset: ArrayLike | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: ArrayLike | None = None
    sinks: ArrayLike | None = None
    query_lengths: ArrayLike | None = None
    key_lengths: ArrayLike | None = None
    prefix_lengths: ArrayLike | None = None
    score_mod: Mod | None = None
    mask_mod: Mod | None = None
    mod_args: Sequence[Any] = ()
    dropout_p: float = 0.0
    seed: int | None = None


NO_OPTIONS = Options()
_KNOWN = frozenset(Options._fields)

# Arrays among the options, by what their axes are: those of the scores (..., H, L, S); one number for each head, or for
# each head and sequence (..., H); one for each sequence (...,); one for each head of the whole call (H,).
PER_SCORE = ("mask", "bias")
PER_HEAD = ("alibi_slopes",)
PER_SEQUENCE = ("query_offset", "query_lengths", "key_lengths", "prefix_lengths")
PER_CALL = ("sinks",)
# Python functions and what they are called with: the command line, whose options are files and numbers, has none.
IN_PYTHON = ("score_mod", "mask_mod", "mod_args")

# Names of these options in other libraries: PyTorch, flash-attn, xFormers, JAX, ONNX, Hugging Face's transformers.
_ELSEWHERE = {
    "attn_mask": "mask, where True = may attend, or bias",
    "attention_mask": "mask, where True = may attend, or bias",
    "attn_bias": "bias",
    "position_bias": "bias",
    "causal": "is_causal",
    "softmax_scale": "scale",
    "sm_scale": "scale",
    "scaling": "scale",
    "window_size": "window",
    "sliding_window": "window",
    "local_window_size": "window",
    "logits_soft_cap": "softcap",
    "s_aux": "sinks",
    "dropout": "dropout_p",
    "dropout_rate": "dropout_p",
    "p_dropout": "dropout_p",
    "philox_seed": "seed",
    "key_padding_mask": "mask, where True = may attend, or key_lengths",
    "query_seq_lengths": "query_lengths",
    "key_value_seq_lengths": "key_lengths",
    "return_attn_probs": "attention_weights, a function of its own",
    "enable_gqa": "nothing: key and value may have fewer heads than query",
}


# Bridges hand each array in `mod_args` on by a name of its own.


def is_mod_arg(name: str) -> bool:
    """Whether `split_mod_args` gave this name."""
    return name.startswith("mod_args[")


def place_of(name: str) -> int:
    """The place in `mod_args` of what `split_mod_args` named."""
    return int(name.removeprefix("mod_args[").removesuffix("]"))


def split_mod_args(
    options: Mapping[str, Any], is_array: Callable[[Any], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the arrays out of the option `mod_args`; return the options without them, and them by name."""
    mod_args = options.get("mod_args", ())
    if not isinstance(mod_args, tuple | list):
        return dict(options), {}  # refused later
    arrays = {f"mod_args[{n}]": x for n, x in enumerate(mod_args) if is_array(x)}
    if not arrays:
        return dict(options), {}
    return {**options, "mod_args": tuple(None if is_array(x) else x for x in mod_args)}, arrays


def join_mod_args(options: Mapping[str, Any]) -> dict[str, Any]:
    """Put the arrays back that `split_mod_args` took out."""
    arrays = {place_of(name): x for name, x in options.items() if is_mod_arg(name)}
    rest = {name: x for name, x in options.items() if not is_mod_arg(name)}
    if arrays:
        rest["mod_args"] = tuple(arrays.get(n, x) for n, x in enumerate(rest["mod_args"]))
    return rest


class Gradients(NamedTuple):
    """Gradients with respect to each input, of its shape and dtype; None for an input that was not passed.

    Axes along which an input was broadcast are summed, as are the query heads that share a key/value head.
    """

    query: Array | None
    key: Array | None
    value: Array | None
    bias: Array | None = None
    sinks: Array | None = None
    mod_args: tuple[Array | None, ...] | None = None

    def of(self, name: str | None) -> Array | None:
        """Return the gradient of an argument, or of an array in `mod_args` as `split_mod_args` names it."""
        if name is not None and is_mod_arg(name):
            return None if self.mod_args is None else self.mod_args[place_of(name)]
        return None if name is None else getattr(self, name)


class Tangents(NamedTuple):
    """What `attention_jvp` returns: the results of `attention`, and their derivatives along a direction."""

    out: Array
    lse: Array
    out_tangent: Array
    lse_tangent: Array


class SecondGradients(NamedTuple):
    """Gradients of a function of what `attention_backward` returned, with respect to each of its arguments.

    `out` and `lse` are None unless they were taken as arguments of their own (``through_saved=True``), and `bias` and
    `sinks` if they were not passed.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None
    sinks: Array | None
    grad_out: Array
    grad_lse: Array
    out: Array | None = None
    lse: Array | None = None


def check_names(entry: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check that `entry` has arguments of these names, as `gather` does."""
    if not arguments.keys() <= _KNOWN:
        raise unknown(entry, arguments)


def gather(entry: Callable[..., Any], arguments: Mapping[str, Any]) -> Options:
    """Return the options that `entry` was called with; an unknown name is a TypeError that suggests the right one."""
    if not arguments:
        return NO_OPTIONS
    try:
        return Options(**arguments)
    except TypeError:
        raise unknown(entry, arguments) from None


def unknown(entry: Callable[..., Any], arguments: Mapping[str, Any]) -> TypeError:
    """Return the error for a name that `entry` does not take, with the nearest name that it takes."""
    names = [p.name for p in inspect.signature(entry).parameters.values() if p.kind is not p.VAR_KEYWORD]
    name = next(name for name in arguments if name not in names)
    near = difflib.get_close_matches(name, names, 1)
    meant = _ELSEWHERE.get(name) or (near[0] if near else "")
    hint = f"; did you mean {meant}?" if meant else f"; it takes {', '.join(names)}"
    return TypeError(f"{entry.__qualname__}() got an unexpected keyword argument {name!r}{hint}")


def takes_options(also: Any = None, **defaults: Any) -> Callable[[Function], Function]:
    """Let the signature of a function that ends with ``**options`` name every option, with its type and default.

    Parameters
    ----------
    also : type, optional
        A named tuple like `Options`, with the further arguments that several functions share. They come last.
    **defaults
        Defaults of this function that differ from those of `Options`.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]

        def parameters(types: Mapping[str, Any], of: Any) -> list[inspect.Parameter]:
            return [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=defaults.get(name, of._field_defaults[name]),
                    annotation=annotation.__forward_arg__,
                )
                for name, annotation in types.items()
                if name not in signature.parameters
            ]

        options = parameters(OptionArguments.__annotations__, Options)
        shared = [] if also is None else parameters(also.__annotations__, also)
        first = next((n for n, p in enumerate(own) if p.kind is p.KEYWORD_ONLY), len(own))
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own[:first], *options, *own[first:], *shared]
        )
        return function

    return decorate
