"""Python functions as programs: the language of `score_mod` and `mask_mod`.

A function is read from its source, and its statements are carried out on instructions in place of numbers. Branches
that depend on the data are followed both ways, and what they assign and return is selected; helper functions are
expanded where they are called; loops are unrolled. The types are Python's but for their widths: integers have 32 bits
(64 where an array or a constant has), real numbers the width of the scores.

No Numba and no LLVM here: what cannot be said in the language is refused with the user's own line.
"""

from types import FunctionType
from typing import Any, NamedTuple

from .program import REAL, Builder
from .reads import Path
from .source import source_of
from .statements import Frame
from .values import Argument, Array, Whole

SCORE, MASK = "score_mod", "mask_mod"
PARAMETERS = {SCORE: ("score", "batch", "head", "i", "j"), MASK: ("batch", "head", "i", "j")}


class Lowered(NamedTuple):
    """A function as instructions of a builder."""

    output: int
    reads: tuple[Path, ...]


def lower(
    b: Builder,
    role: str,
    function: FunctionType,
    arguments: tuple[Argument, ...],
    values: tuple[Any, ...],
    root: int = 0,
) -> Lowered:
    """Write the instructions of a function.

    Parameters
    ----------
    b : Builder
    role : {"score_mod", "mask_mod"}
    function : function
    arguments : tuple of Argument
        The kinds of `mod_args`.
    values : tuple
        `mod_args` themselves, of which shapes and integers are read where a loop depends on them.
    root : int
        The first step of the paths that it reads: 0, or 1 for the derivative of a rule.

    Returns
    -------
    Lowered
        The number of the instruction that is returned, and which names outside of the function it depends on.

    Raises
    ------
    TypeError
        The function says what the language cannot; the message shows where.
    """
    whole = Whole(b, arguments, values, {})
    names = PARAMETERS[role]
    operands: list[Any] = [b.argument(name) for name in names]
    for place, argument in enumerate(arguments):
        operands.append(Array(place) if argument.ndim else b.scalar(place, argument.kind))
    frame = Frame(whole, source_of(function), 0, (root,))
    code = function.__code__
    least = code.co_argcount - len(function.__defaults__ or ())
    if not least <= len(operands) <= code.co_argcount:
        given = f" and the {len(arguments)} of mod_args" if arguments else ", and mod_args is empty"
        frame.source.refuse(
            frame.source.node,
            f"a {role} is called as {role}({', '.join(names)}, *mod_args), with {len(names)} arguments{given}; "
            f"this function takes {code.co_argcount}",
        )
    result = frame.run(operands, False)
    frame.source.check()
    if not isinstance(result, int):
        frame.source.refuse(frame.source.node, f"a {role} must return a number")
    if role == MASK:
        if b.kind(result) == REAL:
            frame.source.refuse(frame.source.node, "a mask_mod must return a truth value, True where it may attend")
        return Lowered(b.truth(result), tuple(whole.reads))
    return Lowered(b.to(REAL, result), tuple(whole.reads))
