"""Copies of a recipe with one thing less in its `main`: a statement, a keyword, or a positional argument."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Deletion:
    """`what` reads as in the recipe; `source` is the whole file without it; `statement` is the statement it is in."""

    what: str
    statement: str
    source: str

    def __str__(self) -> str:
        return self.what[:70]


def deletions(path: Path) -> Iterator[Deletion]:
    """Every deletion in the recipe's `main`, in the order of its lines."""
    tree = ast.parse(path.read_text("utf-8"))
    count = len(list(_places(tree)))
    for number in range(count):
        changed = copy.deepcopy(tree)
        what, statement, remove = list(_places(changed))[number]
        remove()
        yield Deletion(what, statement, ast.unparse(ast.fix_missing_locations(changed)))


def _places(tree: ast.Module) -> Iterator[tuple[str, str, object]]:
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    for body, place in _statements(main):
        statement = body[place]
        text = ast.unparse(statement)
        yield f"statement: {text}", text, lambda body=body, place=place: _remove(body, place)
        inner = [block for block in ("body", "orelse") if getattr(statement, block, None)]
        shallow = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
        nested = {id(node) for block in inner for child in getattr(statement, block) for node in ast.walk(child)}
        for call in shallow:
            if id(call) in nested:
                continue
            name = ast.unparse(call.func)
            for n, argument in enumerate(call.args):
                yield f"{name}: {ast.unparse(argument)}", text, lambda call=call, n=n: call.args.pop(n)
            for n, keyword in enumerate(call.keywords):
                what = f"{name}: {keyword.arg or '**'}={ast.unparse(keyword.value)}"
                yield what, text, lambda call=call, n=n: call.keywords.pop(n)


def _statements(node: ast.AST) -> Iterator[tuple[list[ast.stmt], int]]:
    for field in ("body", "orelse", "finalbody"):
        body = getattr(node, field, None)
        for place in range(len(body or ())):
            yield body, place
            yield from _statements(body[place])


def _remove(body: list[ast.stmt], place: int) -> None:
    del body[place]
    if not body:
        body.append(ast.Pass())
