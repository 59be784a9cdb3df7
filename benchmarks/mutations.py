"""Every small fault that a module may have: what `mutants.py` draws from."""

import ast
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ALIKE = ("min", "max", "isinstance", "np.maximum", "np.minimum", "mx.maximum")  # whose arguments may change places
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add, ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault: what it changes, and the change itself, of a tree of its own; `inside` of a function or not."""

    line: int
    what: str
    change: Callable[[], None]
    inside: bool = False


def faults(tree: ast.Module, within: Sequence[str] = (), strings: bool = False) -> Iterator[Mutant]:
    """Every fault that a module may have, in a fixed order."""

    def visit(node: ast.AST, parent: ast.AST, wanted: bool, inside: bool) -> Iterator[Mutant]:
        wanted = wanted or (isinstance(node, ast.FunctionDef) and node.name in within)
        if wanted:
            yield from (dataclasses.replace(each, inside=inside) for each in of_node(node, parent))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
                continue
            within_body = inside or (isinstance(node, ast.FunctionDef) and name == "body")
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or isinstance(child, ast.Import | ast.ImportFrom | ast.JoinedStr):
                    continue
                if isinstance(child, ast.Raise):
                    if wanted and isinstance(value, list):
                        yield dataclasses.replace(left_out(child, value), inside=within_body)
                    continue
                if is_text(child):
                    continue
                if wanted and isinstance(value, list) and isinstance(child, ast.Expr | ast.AugAssign | ast.Continue):
                    yield dataclasses.replace(left_out(child, value), inside=within_body)
                yield from visit(child, node, wanted, within_body)

    def of_node(node: ast.AST, parent: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.Compare):
            for index, op in enumerate(node.ops):
                yield put(node, node.ops, index, SWAPS[type(op)]())
        elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
            if not (isinstance(node, ast.BinOp) and is_string(node.left, node.right)):
                yield assign(node, "op", SWAPS[type(node.op)]())
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            yield replace(node, parent, node.operand)
        elif isinstance(node, ast.Constant):
            yield from of_constant(node)
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield assign(node, "test", ast.UnaryOp(ast.Not(), node.test))
        elif isinstance(node, ast.Return) and node.value is not None:
            yield assign(node, "value", ast.Constant(None))
        elif isinstance(node, ast.Call) and len(node.args) > 1 and not is_starred(node.args[:2]):
            if isinstance(node.func, ast.Name | ast.Attribute) and show(node.func) in ALIKE:
                return
            swapped = [node.args[1], node.args[0], *node.args[2:]]
            yield assign(node, "args", swapped)

    def of_constant(node: ast.Constant) -> Iterator[Mutant]:
        if isinstance(node.value, bool):
            yield assign(node, "value", not node.value)
        elif isinstance(node.value, int):
            yield assign(node, "value", node.value + 1)
            yield assign(node, "value", node.value - 1)
        elif isinstance(node.value, float):
            yield assign(node, "value", node.value * 1.5 + 0.25)
        elif isinstance(node.value, str) and strings:
            yield assign(node, "value", node.value + "x")

    yield from visit(tree, tree, not within, False)


def is_text(node: ast.AST) -> bool:
    """Whether it is a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_string(*nodes: ast.AST) -> bool:
    return any(isinstance(node, ast.JoinedStr | ast.Constant) and not is_number(node) for node in nodes)


def is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def is_starred(nodes: Sequence[ast.AST]) -> bool:
    return any(isinstance(node, ast.Starred) for node in nodes)


def show(node: ast.AST) -> str:
    return " ".join(ast.unparse(ast.fix_missing_locations(node)).split())[:100]


def assign(node: Any, name: str, value: Any) -> Mutant:
    before = show(node)

    def change() -> None:
        setattr(node, name, value)
        ast.fix_missing_locations(node)

    return Mutant(node.lineno, before + " -> " + _after(node, name, value), change)


def _after(node: Any, name: str, value: Any) -> str:
    kept = getattr(node, name)
    setattr(node, name, value)
    text = show(node)
    setattr(node, name, kept)
    return text


def put(node: Any, row: list[Any], index: int, value: Any) -> Mutant:
    before, kept = show(node), row[index]
    row[index] = value
    after = show(node)
    row[index] = kept

    def change() -> None:
        row[index] = value

    return Mutant(node.lineno, f"{before} -> {after}", change)


def replace(node: Any, parent: ast.AST, value: ast.AST) -> Mutant:
    def change() -> None:
        for name, held in ast.iter_fields(parent):
            if held is node:
                setattr(parent, name, value)
            elif isinstance(held, list) and node in held:
                held[held.index(node)] = value

    return Mutant(node.lineno, f"{show(node)} -> {show(value)}", change)


def left_out(node: Any, row: list[Any]) -> Mutant:
    def change() -> None:
        row[row.index(node)] = ast.copy_location(ast.Pass(), node)

    return Mutant(node.lineno, f"{show(node)} -> pass", change)
