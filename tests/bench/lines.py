"""How much code there is, room by room, and which functions are the longest: `python tests/bench/lines.py`.

Blank lines, comments and docstrings are not counted.
"""

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "minisd"
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
BEYOND = {"__main__.py", "evaluate.py", "plots.py", "widgets.py"}  # of the rooms at the top, what no model needs


def code(source: str, within: ast.AST | None = None) -> int:
    """The lines of a file that hold code; of a function in it alone, where one is given."""
    tree = ast.parse(source)
    described = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    said = {
        line
        for node in described
        if isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines |= set(range(token.start[0], token.end[0] + 1))
    if within is not None:
        lines &= set(range(within.lineno, within.end_lineno + 1))
    return len(lines - said)


def functions(source: str) -> dict[str, int]:
    """How many lines of code every function has."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = code(source, node)
    return found


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "the rest at the top" if path.name in BEYOND else "the top"


if __name__ == "__main__":
    rooms: dict[str, int] = {}
    longest: list[tuple[int, str]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        rooms[room(path)] = rooms.get(room(path), 0) + code(source)
        longest += [(n, f"{path.relative_to(PACKAGE)}: {name}") for name, n in functions(source).items()]
    for name, n in sorted(rooms.items()):
        print(f"{n:6,}  {name}")
    print(f"{sum(rooms.values()):6,}  in all")
    for n, name in sorted(longest, reverse=True)[:8]:
        print(f"{n:6}  {name}")
