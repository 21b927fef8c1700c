"""Statements of a mod: branches that are followed both ways, loops that are unrolled, returns that are selected."""

from __future__ import annotations

import ast
from typing import Any

from .expressions import Expressions
from .program import LENGTH
from .reads import Path
from .source import Source
from .values import Array, Env, Loop, Range, Undefined, Whole


class Frame(Expressions):
    """One function at work.

    A mask is the instruction that says for which pairs a statement is carried out; FALSE where it never is.
    """

    def __init__(self, whole: Whole, source: Source, depth: int, path: Path) -> None:
        super().__init__(whole, source, depth, path)
        self.result: Any = None
        self.loops: list[Loop] = []

    def run(self, operands: list[Any], guarded: bool) -> Any:
        """Bind the parameters, carry out the body, and return the result."""
        node, function = self.source.node, self.source.function
        self.guarded = guarded
        if isinstance(node, ast.AsyncFunctionDef):
            self.source.refuse(node, "a mod is a plain function, without async")
        names = [x.arg for x in [*node.args.posonlyargs, *node.args.args]]
        if node.args.vararg or node.args.kwarg or node.args.kwonlyargs:
            self.source.refuse(node, "a mod takes positional parameters only, without * and **")
        defaults = function.__defaults__ or ()
        missing = len(names) - len(operands)
        if missing < 0 or missing > len(defaults):
            listed = ", ".join(names)
            self.source.refuse(node, f"takes {len(names)} arguments ({listed}), and is called with {len(operands)}")
        for default in defaults[len(defaults) - missing :]:
            operands = [*operands, self.constant(node, default)]
        env: Env = dict(zip(names, operands, strict=True))
        if isinstance(node, ast.Lambda):
            return self.value(node.body, env)
        alive = self.statements(node.body, env, self.true)
        if alive != self.false:
            last = node.body[-1]
            self.source.refuse(last, "may end without a return: return a value on every path")
        return self.result

    # Statements

    def statements(self, body: list[ast.stmt], env: Env, mask: int) -> int:
        """Carry out statements; return the mask of the pairs that go on after the last."""
        for statement in body:
            if mask == self.false:
                break
            mask = self.statement(statement, env, mask)
            if len(self.b.lines) > LENGTH:
                self.source.refuse(statement, f"the rule has more than {LENGTH} operations once its loops are unrolled")
        return mask

    def statement(self, node: ast.stmt, env: Env, mask: int) -> int:
        match node:
            case ast.Return(value=None):
                self.source.refuse(node, "a mod must return a value")
            case ast.Return(value=ast.expr() as value):
                self.leave(node, mask, self.value(value, env))
                return self.false
            case ast.Assign(targets=targets, value=value):
                x = self.value(value, env)
                for target in targets:
                    self.assign(target, x, env)
            case ast.AnnAssign(target=target, value=value):
                if value is not None:
                    self.assign(target, self.value(value, env), env)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                old = self.value(ast.copy_location(ast.Name(name, ast.Load()), target), env)
                env[name] = self.binary(node, op, old, self.value(value, env))
            case ast.AugAssign() | ast.Delete():
                self.source.refuse(node, "arrays cannot be written to in a mod")
            case ast.If():
                return self.branch(node, env, mask)
            case ast.For():
                return self.loop(node, env, mask)
            case ast.Continue():
                self.loops[-1].continued.append((mask, dict(env)))
                return self.false
            case ast.Break():
                self.loops[-1].broken.append((mask, dict(env)))
                return self.false
            case ast.Pass() | ast.Expr(value=ast.Constant()):
                pass
            case ast.While():
                self.source.refuse(node, "while is not available in a mod: use for with range, whose length is known")
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                self.source.refuse(node, "define helper functions outside of the mod")
            case _:
                what = type(node).__name__.lower()
                self.source.refuse(node, f"{what} is not available in a mod: it is a formula for one score")
        return mask

    def leave(self, node: ast.stmt, mask: int, x: Any) -> None:
        if self.result is None:
            self.result = x
        else:
            self.result = self.select(mask, x, self.result)
        if isinstance(self.result, Undefined):
            self.source.refuse(node, self.result.why)

    def assign(self, target: ast.expr, x: Any, env: Env) -> None:
        match target:
            case ast.Name(id=name):
                env[name] = x
            case ast.Tuple(elts=parts):
                if not isinstance(x, tuple) or isinstance(x, Array) or len(x) != len(parts):
                    self.source.refuse(target, f"needs {len(parts)} values")
                for part, y in zip(parts, x, strict=True):
                    self.assign(part, y, env)
            case _:
                self.source.refuse(target, "arrays cannot be written to in a mod: assign to names")

    def branch(self, node: ast.If, env: Env, mask: int) -> int:
        condition = self.truth(node.test, env)
        known = self.b.known(condition)
        if known is not None:
            return self.statements(node.body if known else node.orelse, env, mask)
        envs, masks, alive = (dict(env), dict(env)), [], []
        masks = [self.b.both(mask, condition), self.b.both(mask, self.b.negation(condition))]
        guarded, self.guarded = self.guarded, True
        for body, own, own_mask in zip((node.body, node.orelse), envs, masks, strict=True):
            alive.append(self.statements(body, own, own_mask))
        self.guarded = guarded
        if self.false in alive:
            env.clear()
            env.update(envs[1 if alive[0] == self.false else 0])
            # What follows is for the others only: an index there is not checked for all pairs before the call.
            self.guarded = True
            return alive[1] if alive[0] == self.false else alive[0]
        self.merge(condition, env, *envs)
        if alive == masks:
            return mask
        self.guarded = True
        return self.b.either(*alive)

    def merge(self, condition: int, env: Env, first: Env, second: Env) -> None:
        """The names after two branches."""
        for name in first.keys() | second.keys():
            x, y = first.get(name), second.get(name)
            if x is None or y is None:
                env[name] = Undefined(f"{name} may have no value here: assign it on every path before")
            else:
                env[name] = self.select(condition, x, y)

    def loop(self, node: ast.For, env: Env, mask: int) -> int:
        if node.orelse:
            self.source.refuse(node.orelse[0], "for with else is not available in a mod")
        items = self.value(node.iter, env)
        if isinstance(items, Range):
            items = map(self.b.constant, items.numbers)
        elif not isinstance(items, tuple) or isinstance(items, Array):
            self.source.refuse(node.iter, "a mod can loop over range and over tuples")
        guarded = self.guarded
        broken: list[tuple[int, Env]] = []
        for item in items:
            if mask == self.false:
                break
            self.b.turns += 1
            self.loops.append(Loop([], broken))
            self.assign(node.target, item, env)
            mask = self.statements(node.body, env, mask)
            mask = self.rejoin(self.loops.pop().continued, env, mask)
            # Turns are counted too, because equal instructions are written once: an empty body adds none.
            if max(len(self.b.lines), self.b.turns) > LENGTH:
                self.source.refuse(node, f"the rule has more than {LENGTH} operations once its loops are unrolled")
        mask = self.rejoin(broken, env, mask)
        self.guarded = guarded or self.guarded
        return mask

    def rejoin(self, leaving: list[tuple[int, Env]], env: Env, mask: int) -> int:
        """Let the pairs that left the body go on with the others."""
        for own_mask, own in leaving:
            if mask == self.false:
                env.clear()
                env.update(own)
                mask = own_mask
            else:
                self.merge(own_mask, env, own, dict(env))
                mask = self.b.either(mask, own_mask)
        return mask
