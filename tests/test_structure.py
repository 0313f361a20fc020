"""A folder imports only folders below it, and no folder is crowded."""

import ast
import re

from conftest import ROOT

from fdfo import FOLDERS


def place(path) -> str:
    """The folder that a file belongs to."""
    parts = path.relative_to(ROOT).parts
    return parts[1] if parts[0] == "fdfo" else "rewards" if parts[0] == "rewards" else "scripts"


def imported(path) -> set[str]:
    """The folders that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            found |= {parts[1]} if parts[0] == "fdfo" and len(parts) > 1 else {"rewards"} & {parts[0]}
    return found


def test_folders_import_only_folders_below_them():
    floor = {name: i for i, names in enumerate(FOLDERS) for name in names}
    files = [path for where in ("*.py", "fdfo/**/*.py", "rewards/**/*.py", "benchmarks/**/*.py") for path in ROOT.glob(where)]
    for path in files:
        own = place(path)
        wrong = {name for name in imported(path) - {own} if floor[name] <= floor[own]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}, which do not stand below {own}"


def test_families_are_known_by_name_in_their_folder_alone():
    """Hub ids and presets are data of fdfo/config; foreign_lora.py translates what others call the layers of SD3."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("fdfo/**/*.py"), *ROOT.glob("rewards/*.py")):
        if path.parent.name not in ("families", "config", "tiny", "storage"):
            found = re.search(r"(?i)klein|z_?image|StableDiffusion3|flux", path.read_text())
            assert not found, f"{path.relative_to(ROOT)} names a family: {found}"


def test_no_folder_is_crowded():
    folders = [path for top in ("fdfo", "rewards") for path in (ROOT / top).rglob("*") if path.is_dir()]
    for folder in [*folders, ROOT / "rewards"]:
        files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 8, f"{folder.name} has {len(files)} files: {files}"


def test_the_math_files_import_torch_alone():
    for name in ("sampling", "estimator"):
        tree = ast.parse((ROOT / "fdfo" / "method" / f"{name}.py").read_text())
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert modules <= {"torch", "math", "collections.abc", "dataclasses"}, modules
