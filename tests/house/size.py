"""Lines of code per folder beside the budget in size.txt: `make size`.

A line of code holds more than blanks, comments and docstrings. The exit status is 1 if a folder
has more lines than its budget. `python tests/house/size.py --write` makes what is there now the
budget: a commit that does says what the lines are for.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Path(__file__).with_name("size.txt")
FOLDERS = "lottery_sparse", "csrc", "experiments", "benchmarks", "tests"
CPP = {".h", ".cpp", ".cu", ".cuh"}
EMPTY = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of_python(text: str) -> int:
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in EMPTY:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            held -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(held)


def lines_of_cpp(text: str) -> int:
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    lines = (line.strip() for line in text.splitlines())
    return sum(bool(line) and not line.startswith("//") for line in lines)


def sources() -> list[Path]:
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in paths if path.suffix in CPP | {".py"})


def folder_of(path: Path) -> str:
    return str(path.parent.relative_to(ROOT))


def measured() -> Counter[str]:
    """Folder -> lines of code of the files in it."""
    found: Counter[str] = Counter()
    for path in sources():
        count = lines_of_cpp if path.suffix in CPP else lines_of_python
        found[folder_of(path)] += count(path.read_text("utf-8"))
    return found


def budget() -> Counter[str]:
    lines = BUDGET.read_text("utf-8").splitlines()
    return Counter({folder: int(number) for folder, number in map(str.split, lines)})


def table(now: Counter[str], planned: Counter[str]) -> list[str]:
    """A line for each folder and one for each of FOLDERS: lines, and the change if there is one."""
    names = now.keys() | planned.keys()
    groups = {f"all of {top}": [n for n in names if n.split("/")[0] == top] for top in FOLDERS}
    rows = [(name, [name]) for name in sorted(names)]
    rows += [*groups.items(), ("all", sorted(names))]
    changes = [
        (name, sum(now[n] for n in part), sum(planned[n] for n in part)) for name, part in rows
    ]
    return [
        f"{name:32}{lines:7,}{f'  {lines - limit:+,}' if lines != limit else ''}"
        for name, lines, limit in changes
    ]


def over(now: Counter[str], planned: Counter[str]) -> list[str]:
    """A sentence for each folder with more lines than its budget; a new one has none."""
    return [
        f"{name} has {now[name]:,} lines of code, {now[name] - planned[name]:,} over its budget."
        for name in sorted(now)
        if now[name] > planned[name]
    ]


def main(arguments: list[str]) -> int:
    now = measured()
    if arguments == ["--write"]:
        BUDGET.write_text("".join(f"{name} {now[name]}\n" for name in sorted(now)), "utf-8")
    elif arguments:
        print(f"size.py takes --write or nothing, got {' '.join(arguments)}.", file=sys.stderr)
        return 2
    print(*table(now, budget()), sep="\n", flush=True)
    faults = over(now, budget())
    if faults:
        print(
            *faults,
            "Take lines out, or say what they are for in a commit with the new budget: "
            "python tests/house/size.py --write",
            sep="\n",
            file=sys.stderr,
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
