"""Cyclomatic complexity of Python functions, after McCabe. Pure; any process."""

from __future__ import annotations

import ast
from collections.abc import Iterator

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler)


def complexities(tree: ast.AST) -> Iterator[tuple[int, str, int]]:
    """Yield (complexity, name, line) of every function, methods and inner functions included."""
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS):
            yield _paths(node), node.name, node.lineno


def _paths(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return a function's number of independent paths: 1 + its branches, without those of functions inside it."""
    paths = 1
    nodes: list[ast.AST] = [*function.body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, _FUNCTIONS):
            continue
        paths += _branches(node)
        nodes.extend(ast.iter_child_nodes(node))
    return paths


def _branches(node: ast.AST) -> int:
    """Return the number of branches at a node."""
    if isinstance(node, _BRANCHES):
        return 1
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    if isinstance(node, ast.comprehension):
        return 1 + len(node.ifs)
    if isinstance(node, ast.match_case):
        # "case _:" is an else.
        return 0 if isinstance(node.pattern, ast.MatchAs) and node.pattern.name is None and node.guard is None else 1
    return 0
