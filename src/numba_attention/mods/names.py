"""Names and numbers outside of a mod: what they mean, and that a rule depends on them."""

import ast
import builtins
import math
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from .reads import MISSING, Path, content
from .source import Source
from .values import Env, Whole


class Names:
    """One function at work, and what it knows of the world outside."""

    def __init__(self, whole: Whole, source: Source, depth: int, path: Path) -> None:
        self.whole, self.b, self.source, self.depth, self.path = whole, whole.b, source, depth, path
        self.true, self.false = self.b.constant(True), self.b.constant(False)
        self.guarded = False  # whether what is computed now is wanted for some pairs only

    def constant(self, node: ast.AST, x: Any) -> int:
        """A number from outside as an instruction."""
        if isinstance(x, np.generic) or (isinstance(x, np.ndarray) and x.ndim == 0):
            x = x.item()
        if isinstance(x, bool | int | float):
            if isinstance(x, int) and not -(2**63) <= x < 2**63:
                self.source.refuse(node, "integers of more than 64 bits are not available in a mod")
            return self.b.constant(x if isinstance(x, bool) else int(x) if isinstance(x, int) else float(x))
        if isinstance(x, np.ndarray) or hasattr(x, "__array__"):
            self.source.refuse(
                node, "arrays outside of the mod would be copied into its code: pass it in mod_args, as a parameter"
            )
        if isinstance(x, complex):
            self.source.refuse(node, "complex numbers are not available in a mod")
        if isinstance(x, FunctionType | ModuleType | type) or callable(x):
            self.source.refuse(node, "functions and modules can only be called or looked into here")
        kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
        self.source.refuse(node, f"only numbers are available in a mod, got {kind}; arrays can be passed in mod_args")

    def find(self, node: ast.expr, env: Env) -> Any:
        """The Python object outside of the function that a name or a dotted name means, or None."""
        if isinstance(node, ast.Name) and node.id not in env:
            return self.name(node)
        if isinstance(node, ast.Attribute):
            base = self.find(node.value, env)
            if isinstance(base, ModuleType):
                x = getattr(base, node.attr, MISSING)
                if x is MISSING:
                    self.source.refuse(node, f"module {base.__name__} has no attribute {node.attr!r}")
                if base not in (math, np):
                    self.whole.read(*self.path_of(node))
                return x
        return None

    def path_of(self, node: ast.expr) -> Path:
        """The steps to what a name or a dotted name outside of the function means."""
        if isinstance(node, ast.Attribute):
            return *self.path_of(node.value), ("attribute", node.attr)
        assert isinstance(node, ast.Name)
        free = self.source.function.__code__.co_freevars
        return *self.path, (("cell", free.index(node.id)) if node.id in free else ("global", node.id))

    def name(self, node: ast.Name) -> Any:
        function: Any = self.source.function
        name = node.id
        code = function.__code__
        if name in code.co_freevars:
            self.whole.read(*self.path_of(node))
            x = content(function, code.co_freevars.index(name))
            if x is MISSING:
                self.source.refuse(node, f"{name} has no value yet")
            return x
        if name in code.co_varnames:
            self.source.refuse(node, f"{name} has no value yet here")
        x = function.__globals__.get(name, MISSING)
        self.whole.read(*self.path_of(node))
        if x is MISSING:
            x = getattr(builtins, name, MISSING)
        if x is MISSING:
            self.source.refuse(node, f"name {name!r} is not defined")
        return x
