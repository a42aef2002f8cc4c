"""Copies of a recipe with one thing less in its `main`: a statement, a keyword, or a positional argument."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Deletion:
    """`what` reads as in the recipe; `statement` is the statement it is in."""

    path: Path
    number: int
    what: str
    statement: str

    @property
    def source(self) -> str:
        """The whole file without it."""
        tree = ast.parse(self.path.read_text("utf-8"))
        list(_places(tree))[self.number][2]()
        return ast.unparse(ast.fix_missing_locations(tree))

    def __str__(self) -> str:
        return self.what[:70]


@functools.cache
def deletions(path: Path) -> tuple[Deletion, ...]:
    """Every deletion in the recipe's `main`, in the order of its lines."""
    places = _places(ast.parse(path.read_text("utf-8")))
    return tuple(Deletion(path, number, what, statement) for number, (what, statement, _) in enumerate(places))


def _places(tree: ast.Module) -> Iterator[tuple[str, str, Callable[[], object]]]:
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    for body, place in _statements(main):
        statement = body[place]
        text = ast.unparse(statement)
        yield f"statement: {text}", text, functools.partial(_remove, body, place)
        inner = {id(node) for child, n in _statements(statement) for node in ast.walk(child[n])}
        for call in [node for node in ast.walk(statement) if isinstance(node, ast.Call) and id(node) not in inner]:
            name = ast.unparse(call.func)
            for n, argument in enumerate(call.args):
                yield f"{name}: {ast.unparse(argument)}", text, functools.partial(call.args.pop, n)
            for n, keyword in enumerate(call.keywords):
                what = f"{name}: {keyword.arg or '**'}={ast.unparse(keyword.value)}"
                yield what, text, functools.partial(call.keywords.pop, n)


def _statements(node: ast.AST) -> Iterator[tuple[list[ast.stmt], int]]:
    for field in ("body", "orelse", "finalbody"):
        body = getattr(node, field, None) or []
        for place in range(len(body)):
            yield body, place
            yield from _statements(body[place])


def _remove(body: list[ast.stmt], place: int) -> None:
    del body[place]
    if not body:
        body.append(ast.Pass())
