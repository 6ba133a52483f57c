"""McCabe's measure: 1 for a straight line, 1 more for each branch."""

import ast

import pytest

from sqspipes_mp.cli.demo_complexity import complexities


def measured(source: str) -> list[tuple[int, str, int]]:
    return sorted(complexities(ast.parse(source)))


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        ("pass", 1),
        ("if a: pass", 2),
        ("if a: pass\n  elif b: pass\n  else: pass", 3),
        ("for x in y: pass\n  else: pass", 2),
        ("while a: pass", 2),
        ("try: pass\n  except A: pass\n  except B: pass\n  finally: pass", 3),
        ("with a: pass", 1),
        ("return a if b else c", 2),
        ("return a and b and c or d", 4),
        ("return [x for x in y if x if y]", 4),
        ("return lambda: a or b", 2),
        ("match a:\n    case 1: pass\n    case _: pass", 2),
        ("match a:\n    case 1: pass\n    case _ if b: pass", 3),
        ("match a:\n    case 1: pass\n    case other: pass", 3),
    ],
)
def test_each_branch_adds_one(body: str, paths: int) -> None:
    assert measured(f"def f():\n  {body}\n") == [(paths, "f", 1)]


def test_async_counts_as_the_plain_kind() -> None:
    assert measured("async def f():\n  async for x in y: pass\n") == [(2, "f", 1)]


def test_inner_functions_and_methods_count_for_themselves() -> None:
    source = "def f():\n  def g():\n    if a: pass\n  class C:\n    def h(self):\n      if a or b: pass\n"
    assert measured(source) == [(1, "f", 1), (2, "g", 2), (3, "h", 5)]


def test_defaults_and_decorators_belong_to_nobody() -> None:
    assert measured("@(a or b)\ndef f(x=a or b): pass\n") == [(1, "f", 2)]
