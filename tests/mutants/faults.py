"""Which faults a mutant can have: each a change of a few characters, in code and nowhere else.

Left out by rule, because no test should look there: docstrings, annotations, decorators, texts of
errors and of the log, assertions, `__repr__`, backends of ops that only a GPU runs, the numbers of
streams of noise, and what a method tells `dstudent verify`, whose bars have controls of their own.
"""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

SWAPPED = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"), ast.In: ("in", "not in"), ast.NotIn: (r"not\s+in", "in"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
PAIRS = [
    ("all", "any"), ("min", "max"), ("amin", "amax"), ("floor", "ceil"), ("sin", "cos"),
    ("alpha", "sigma"), ("alpha_s", "sigma_s"), ("alphas", "sigmas"), ("x0", "eps"),
]  # fmt: skip
OTHER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
LEFT_OUT = {"__repr__", "__str__", "trial", "measure", "identity"}
STREAMS = 2**32  # the least number that stands for a stream
ASKS_OF_TYPES = {"isinstance", "issubclass", "getattr", "hasattr", "cast"}


class Mutant(NamedTuple):
    """A source in which the bytes from `start` to `end` give way to `new`."""

    file: str
    line: int
    fault: str
    old: str
    new: str
    start: int
    end: int
    lines: tuple[int, int]  # what a test must run to meet it, both included

    def apply(self, source: str) -> str:
        """Return the source with the fault."""
        text = source.encode()
        return (text[: self.start] + self.new.encode() + text[self.end :]).decode()


def mutants(file: str, source: str) -> list[Mutant]:
    """Return all mutants of a source, in its order."""
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    return sorted(finder.found, key=lambda mutant: (mutant.start, mutant.end, mutant.new))


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, source: str):
        self.file, self.text, self.found = file, source.encode(), []
        lengths = [len(line) for line in self.text.splitlines(keepends=True)]
        self.starts = [sum(lengths[:i]) for i in range(len(lengths))]
        self.lines, self.runs = (1, len(lengths)), False

    def span(self, node: ast.AST) -> tuple[int, int]:
        lines = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        begin, end = (self.starts[line - 1] + column for line, column in lines)
        return begin, end

    def add(self, fault: str, start: int, end: int, new: str) -> None:
        line = self.text[:start].count(b"\n") + 1
        old = self.text[start:end].decode()
        self.found.append(Mutant(self.file, line, fault, old, new, start, end, self.lines))

    def operator(self, kind: ast.AST, left: ast.AST, right: ast.AST) -> None:
        """Swap the operator that stands between two operands."""
        if type(kind) not in SWAPPED:
            return
        pattern, new = SWAPPED[type(kind)]
        pattern = pattern if pattern[0].isalpha() else re.escape(pattern)
        begin, end = self.span(left)[1], self.span(right)[0]
        if where := re.search(pattern, self.text[begin:end].decode()):
            self.add("operator", begin + where.start(), begin + where.end(), new)

    def visit(self, node: ast.AST) -> None:
        """Keep which lines run when a node does: its statement's, or all that are made with it."""
        before = self.lines, self.runs
        if isinstance(node, ast.FunctionDef):
            self.lines, self.runs = (node.body[0].lineno, node.end_lineno), True
        elif isinstance(node, ast.ClassDef):
            self.lines = node.lineno, node.end_lineno
        elif isinstance(node, ast.stmt) and self.runs:
            body = getattr(node, "body", None)
            self.lines = node.lineno, body[0].lineno - 1 if body else node.end_lineno
        super().visit(node)
        self.lines, self.runs = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        on_a_gpu = any("'cuda'" in ast.unparse(d) for d in node.decorator_list)
        if node.name in LEFT_OUT or on_a_gpu:
            return
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            start, end = self.span(node.test)
            self.add("condition", start, end, f"not ({self.text[start:end].decode()})")
        self.generic_visit(node)

    visit_IfExp = visit_If

    def visit_Assert(self, node: ast.Assert) -> None:
        """Leave assertions alone: only a fault of ours would fail them."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave texts alone."""

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add("no error", *self.span(node), "pass")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.add("no result", *self.span(node), "return None")
            self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not _is_told(node.value):
            self.add("no statement", *self.span(node), "pass")
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.operator(node.op, node.target, node.value)
        self.visit(node.value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not any(_is_text(side) for side in (node.left, node.right)):
            self.operator(node.op, node.left, node.right)
            self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.operator(node.op, left, right)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        sides = [node.left, *node.comparators]
        for kind, left, right in zip(node.ops, sides, sides[1:], strict=False):
            self.operator(kind, left, right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        start, length = self.span(node)[0], {ast.Not: 3, ast.USub: 1}.get(type(node.op))
        if length and not isinstance(node.operand, ast.Constant):
            self.add("sign", start, start + length, "")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        two = node.args[:2]
        plain = len(two) == 2 and all(isinstance(a, ast.Name | ast.Attribute) for a in two)
        if plain and name not in ASKS_OF_TYPES and ast.dump(two[0]) != ast.dump(two[1]):
            (start, middle), (other, end) = map(self.span, two)
            a, b = self.text[start:middle].decode(), self.text[other:end].decode()
            self.add("arguments", start, end, f"{b}, {a}")
        node.keywords = [k for k in node.keywords if k.arg != "strict"]
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in filter(None, (node.lower, node.upper)):
            if not isinstance(bound, ast.Constant):
                start, end = self.span(bound)
                self.add("slice", start, end, f"({self.text[start:end].decode()}) - 1")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id in OTHER:
            self.add("name", *self.span(node), OTHER[node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and node.attr in OTHER:
            end = self.span(node)[1]
            self.add("name", end - len(node.attr), end, OTHER[node.attr])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        for new in _others(node.value):
            self.add("constant", *self.span(node), repr(new))


def _others(value: object) -> Iterator[object]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int) and value < STREAMS:
        yield value + 1
        if value:
            yield value - 1
    elif isinstance(value, float):
        yield value + 1 if abs(value) < 100 else 2 * value
        if value:
            yield -value


def _is_text(node: ast.AST) -> bool:
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return constant or isinstance(node, ast.JoinedStr)


def _is_told(call: ast.Call) -> bool:
    """Return whether a call only tells something: to the log, or as a warning."""
    return ast.unparse(call.func).startswith(("log.", "warnings.", "logging."))
