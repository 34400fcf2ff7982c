"""Mutants of a module: copies of its source with one small change each, found by the positions of its syntax tree.

Nothing that only people read is changed: messages, docstrings, log calls, annotations, decorators.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Lt: ("<", "<=", ">="),
    ast.LtE: ("<=", "<", ">"),
    ast.Gt: (">", ">=", "<="),
    ast.GtE: (">=", ">", "<"),
    ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "//"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
}
SWAPPED = {"any": "all", "all": "any", "min": "max", "max": "min"}
LOGGING = {"debug", "info", "warning", "error", "exception"}
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Mutant:
    """A changed copy of a module.

    Attributes:
        module: Path of the module below the package.
        function: Qualified name of the function that is changed; "" at the level of the module or of a class.
        line: Line of the change.
        lines: Lines of the statement, or of its head; the tests that run one of them may notice the change. What runs when the
            module is imported has the lines of the functions that use it instead.
        operator: Kind of the change.
        before: The lines that are changed, as one.
        after: What they become.
        source: The whole module.
    """

    module: str
    function: str
    line: int
    lines: tuple[int, ...]
    operator: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the mutant is known by, whatever line it moves to."""
        return self.module, self.function, self.before, self.after


@dataclass(frozen=True)
class _Change:
    start: int
    end: int
    text: str
    operator: str
    function: str
    lines: tuple[int, ...]


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Return the mutants of a module, in the order of their lines; no two are the same."""
    tree = ast.parse(source)
    finder = _Finder(source, _uses(tree))
    finder.visit(tree)
    data = source.encode()
    found: dict[str, Mutant] = {}
    for change in sorted(finder.changes, key=lambda change: (change.start, change.end)):
        mutated = (data[: change.start] + change.text.encode() + data[change.end :]).decode()
        before, after, line = _changed_lines(source, mutated)
        if mutated not in found:
            found[mutated] = Mutant(
                module, change.function, line, change.lines, change.operator, before, after, mutated
            )
    return list(found.values())


def _changed_lines(source: str, mutated: str) -> tuple[str, str, int]:
    """Return the lines that differ, each side as one line, and the number of the first."""
    old, new = source.splitlines(), mutated.splitlines()
    first = next(i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1])
    same = 0
    while same < min(len(old), len(new)) - first and old[-1 - same] == new[-1 - same]:
        same += 1
    before, after = (" ".join(" ".join(lines[first : len(lines) - same]).split()) for lines in (old, new))
    return before, after, first + 1


class _Finder(ast.NodeVisitor):
    """Collects the changes of a module."""

    def __init__(self, source: str, uses: dict[str, tuple[int, ...]]) -> None:
        self._uses = uses
        self._data = source.encode()
        self._starts = [0]
        for line in self._data.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self.changes: list[_Change] = []
        self._names: list[str] = []
        self._functions: list[ast.FunctionDef | ast.AsyncFunctionDef] = []
        # How often each name of the innermost function is bound.
        self._bound: Counter[str] = Counter()
        self._lines: tuple[int, ...] = ()

    # --- positions ---

    def _start(self, node: ast.expr | ast.stmt) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, start: int, end: int) -> str:
        return self._data[start:end].decode()

    def _source(self, node: ast.expr | ast.stmt) -> str:
        return self._text(self._start(node), self._end(node))

    def _change(self, operator: str, start: int, end: int, text: str) -> None:
        function = ".".join(self._names) if self._functions else ""
        self.changes.append(_Change(start, end, text, operator, function, self._lines))

    def _replace(self, operator: str, node: ast.expr | ast.stmt, text: str) -> None:
        self._change(operator, self._start(node), self._end(node), text)

    def _token(self, pattern: str, left: ast.expr, right: ast.expr) -> tuple[int, int]:
        """Return where the operator between two operands is."""
        gap = self._text(self._end(left), self._start(right))
        match = re.search(rf"(?<!\w){pattern}(?!\w)", gap)
        assert match is not None, gap
        offset = self._end(left)
        return offset + len(gap[: match.start()].encode()), offset + len(gap[: match.end()].encode())

    # --- statements ---

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None) or getattr(node, "cases", None)
            first = min(node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ())), node.lineno)
            last = node.end_lineno or node.lineno
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                last = max(first, body[0].lineno - 1)
            elif isinstance(node, ast.Match):
                last = max(first, node.cases[0].pattern.lineno - 1)
            outside, self._lines = self._lines, tuple(range(first, last + 1))
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and not self._functions:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self._lines = sum((self._uses.get(getattr(target, "id", ""), ()) for target in targets), ())
            super().visit(node)
            self._lines = outside
        elif isinstance(node, ast.match_case):
            outside, self._lines = self._lines, tuple(range(node.pattern.lineno, node.body[0].lineno + 1))
            super().visit(node)
            self._lines = outside
        else:
            super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside = self._lines
        self._lines = tuple(range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1))
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self._lines = outside
        bound = self._bound
        self._names.append(node.name)
        self._functions.append(node)
        self._bound = Counter(_bindings(node))
        for statement in node.body:
            self.visit(statement)
        self._bound = bound
        self._functions.pop()
        self._names.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._names.append(node.name)
        functions, self._functions = self._functions, []
        for statement in node.body:
            self.visit(statement)
        self._functions = functions
        self._names.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is None or "TypeAlias" in self._source(node.annotation):
            return
        self._assignment(node, [node.target])
        self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._assignment(node, node.targets)
        self.generic_visit(node)

    def _assignment(self, node: ast.stmt, targets: list[ast.expr]) -> None:
        """Delete an assignment, unless a name would not be there at all without it."""
        if not self._functions or self._functions[-1].name == "__init__":
            return
        parts = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        if any(not isinstance(part, ast.Name) or self._bound[part.id] > 1 for part in parts):
            self._replace("delete", node, "pass")

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._replace("delete", node, "pass")
        if type(node.op) in ARITHMETIC and not _is_sequence(node.value):
            old, new = ARITHMETIC[type(node.op)]
            start, end = self._token(re.escape(old) + "=", node.target, node.value)
            self._change("arithmetic", start, end, new + "=")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Call):
            self.generic_visit(node)
        elif not (isinstance(node.value.func, ast.Attribute) and node.value.func.attr in LOGGING):
            if self._functions:
                self._replace("delete", node, "pass")
            self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        self._replace("delete", node, "pass")

    def visit_Raise(self, node: ast.Raise) -> None:
        self._replace("delete", node, "pass")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self._replace("loop", node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace("loop", node, "break")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None:
            return
        returns = self._functions[-1].returns
        if isinstance(returns, ast.Name) and returns.id == "bool":
            self._negate(node.value)
        elif not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self._replace("return", node, "return None")
        self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in self._source(node.test):
            return
        self._negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_match_case(self, node: ast.match_case) -> None:
        # Not the pattern: its constants are names of what is meant.
        if node.guard is not None:
            self._negate(node.guard)
            self.visit(node.guard)
        for statement in node.body:
            self.visit(statement)

    # --- expressions ---

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave out a message."""

    def _negate(self, test: ast.expr) -> None:
        """Negate a condition that has no operator of its own."""
        negated = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        if not negated and not isinstance(test, (ast.Compare, ast.BoolOp, ast.Constant)):
            self._replace("condition", test, f"not ({self._source(test)})")

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._replace("filter", test, "True")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            old, *others = COMPARISONS[type(op)]
            start, end = self._token(old, left, right)
            for new in others:
                self._change("comparison", start, end, new)
            left = right
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        tokens = [self._token(old, *pair) for pair in zip(node.values, node.values[1:], strict=False)]
        edges = [self._start(node), *(edge for token in tokens for edge in token), self._end(node)]
        operands = [self._text(*edges[i : i + 2]) for i in range(0, len(edges), 2)]
        self._replace("boolean", node, new.join(operands))
        for index in range(len(operands)):
            rest = operands[:index] + operands[index + 1 :]
            self._replace("operand", node, old.join(rest).strip())
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.USub)):
            operand = self._text(self._start(node), self._end(node))[3 if isinstance(node.op, ast.Not) else 1 :]
            self._replace("not" if isinstance(node.op, ast.Not) else "arithmetic", node, operand.strip())
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in ARITHMETIC and not any(_is_text(side) for side in (node.left, node.right)):
            old, new = ARITHMETIC[type(node.op)]
            start, end = self._token(re.escape(old), node.left, node.right)
            if _is_sequence(node.left) or _is_sequence(node.right):
                self._replace("operand", node, self._text(self._start(node), start).strip())
                self._replace("operand", node, self._text(end, self._end(node)).strip())
            else:
                self._change("arithmetic", start, end, new)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in SWAPPED:
            end = self._end(node.func)
            self._change("call", end - len(name), end, SWAPPED[name])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace("constant", node, str(not node.value))
        elif isinstance(node.value, (int, float)):
            for value in (node.value + 1, node.value - 1):
                self._replace("constant", node, repr(value) if value >= 0 else f"({value!r})")


def _uses(tree: ast.Module) -> dict[str, tuple[int, ...]]:
    """Return the lines of functions in which each name or attribute is read."""
    found: dict[str, set[int]] = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in (node for statement in function.body for node in ast.walk(statement)):
                if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                    found.setdefault(node.id if isinstance(node, ast.Name) else node.attr, set()).add(node.lineno)
    return {name: tuple(sorted(lines)) for name, lines in found.items()}


def _bindings(function: ast.FunctionDef) -> Iterator[str]:
    """Yield the names that a function binds, its arguments included, once for each time."""
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            yield from node.names * 2


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_sequence(node: ast.expr) -> bool:
    return _is_text(node) or isinstance(node, (ast.List, ast.ListComp, ast.Tuple, ast.GeneratorExp, ast.Dict))
