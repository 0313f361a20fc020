"""The order of modules that the README states: a module imports only modules before it."""

import ast
import re

from conftest import ROOT


def imported(path) -> set[str]:
    """Names of fdfo's modules, and `rewards`, that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "fdfo" and len(parts) > 1:
                names.add(parts[1])
            elif parts[0] == "rewards":
                names.add("rewards")
    return names - {"tiny"}


def test_modules_import_only_modules_before_them():
    block = re.search(r"modules before it in this order:\n\n```\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    order = [name for line in block.splitlines() for name in re.split(r" {2,}", line, maxsplit=1)[1].split(", ")]
    files = {path.stem: [path] for path in (ROOT / "fdfo").glob("*.py") if path.stem != "__init__"}
    files["rewards"] = list((ROOT / "rewards").glob("*.py"))
    assert set(order) == set(files)
    for name, paths in files.items():
        for path in paths:
            after = imported(path) - set(order[: order.index(name)]) - {name}
            assert not after, f"{path.name} imports {after}, which stand after it"
