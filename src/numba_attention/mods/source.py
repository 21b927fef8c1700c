"""Where a function's source is, as a syntax tree with the user's own lines, and errors that point into it."""

import __future__

import ast
import linecache
from functools import lru_cache
from inspect import CO_NESTED
from types import CodeType, FunctionType
from typing import Any, NamedTuple, NoReturn


class Source(NamedTuple):
    """The definition of one function."""

    function: FunctionType
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    lines: list[str]

    def refuse(self, node: ast.AST, message: str) -> NoReturn:
        """Raise a TypeError that shows a part of the source."""
        raise TypeError(f"{self.name}: {message}\n{self._place(node)}")

    def check(self) -> None:
        """Raise a TypeError if Python runs other code than the file has: it was edited since it was imported."""
        code = self.function.__code__
        codes = _codes("".join(self.lines), code.co_flags & _FUTURES)
        if codes and code not in codes:
            self.refuse(
                self.node,
                "this is not what Python runs under that name; if the file was changed since it was imported, import "
                "it again, and if an import hook changes functions, exclude this module from it",
            )

    @property
    def name(self) -> str:
        return self.function.__name__

    def _place(self, node: Any) -> str:
        code = self.function.__code__
        number = getattr(node, "lineno", code.co_firstlineno)
        text = self.lines[number - 1].rstrip("\n") if number <= len(self.lines) else ""
        stripped = text.lstrip()
        where = f'  File "{code.co_filename}", line {number}\n    {stripped}'
        if not hasattr(node, "col_offset"):
            return where
        raw = text.encode()  # columns of the syntax tree count bytes of UTF-8
        first = len(raw[: node.col_offset].decode(errors="replace"))
        end = len(raw[: node.end_col_offset].decode(errors="replace")) if node.end_lineno == number else len(text)
        indent = len(text) - len(stripped)
        return f"{where}\n    {' ' * (first - indent)}{'^' * max(end - first, 1)}"


def source_of(function: FunctionType) -> Source:
    """Find the definition of a function in its file.

    Raises
    ------
    TypeError
        There is no file, as for functions made by `exec` or typed at an old prompt, or it is not the function's.
    """
    code = function.__code__
    known = linecache.getlines(code.co_filename, function.__globals__)
    linecache.checkcache(code.co_filename)  # of a module that was edited and imported again, the old lines are kept
    lines = linecache.getlines(code.co_filename, function.__globals__) or known
    if not lines:
        raise TypeError(
            f"{function.__name__}: its source cannot be read (file {code.co_filename!r}), and it is compiled from its "
            "source; define it in a file or a notebook, or enter its source into linecache.cache"
        )
    parameters = list(code.co_varnames[: code.co_argcount])
    found = []
    for node in _tree("".join(lines), code.co_filename):
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
        same = isinstance(node, ast.Lambda) == (code.co_name == "<lambda>")
        same = same and first == code.co_firstlineno and [x.arg for x in _parameters(node)] == parameters
        if same and getattr(node, "name", code.co_name) == code.co_name:
            found.append(node)
    if len(found) > 1:
        found = [node for node in found if _has_code(node, code)]
    if len(found) != 1:
        raise TypeError(
            f"{function.__name__}: its definition is not at line {code.co_firstlineno} of {code.co_filename!r}; "
            "if the file was changed since it was imported, import it again"
        )
    return Source(function, found[0], lines)


_FUTURES = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names} - {CO_NESTED})


@lru_cache(maxsize=32)
def _codes(text: str, futures: int) -> list[CodeType]:
    """The code of all functions of a file; none where it cannot be compiled without what its cell had."""
    try:
        left = [compile(text, "", "exec", futures, dont_inherit=True)]
    except (SyntaxError, ValueError):
        return []
    codes: list[CodeType] = []
    while left:
        codes.append(left.pop())
        left += [x for x in codes[-1].co_consts if isinstance(x, CodeType)]
    return codes


@lru_cache(maxsize=32)
def _tree(text: str, name: str) -> list[Any]:
    """All functions of a file."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        raise TypeError(f"the source in {name!r} cannot be parsed") from None
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]


def _parameters(node: Any) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args]


def _has_code(node: Any, code: Any) -> bool:
    """Whether the positions of the code lie in the body: of several functions on one line, only one has them."""
    body = node.body if isinstance(node.body, list) else [node.body]
    first, last = (body[0].lineno, body[0].col_offset), (body[-1].end_lineno, body[-1].end_col_offset)
    places = [p for p in code.co_positions() if None not in p and p[2] != p[3]]
    begins = [(line, column) for line, _, column, _ in places]
    ends = [(line, column) for _, line, _, column in places]
    return bool(places) and first <= min(begins) and max(ends) <= last
