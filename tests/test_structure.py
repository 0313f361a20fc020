"""The order of modules that the README states: a module imports only modules to its left."""

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


def test_modules_import_only_modules_to_their_left():
    sentence = re.search(r"modules to its left: ([\w,\s]+)\.", (ROOT / "README.md").read_text())[1]
    order = [name.strip() for name in sentence.replace("\n", " ").split(",")]
    files = {path.stem: [path] for path in (ROOT / "fdfo").glob("*.py") if path.stem != "__init__"}
    files["rewards"] = list((ROOT / "rewards").glob("*.py"))
    assert set(order) == set(files)
    for name, paths in files.items():
        for path in paths:
            right = imported(path) - set(order[: order.index(name)]) - {name}
            assert not right, f"{path.name} imports {right}, which stand to its right"
