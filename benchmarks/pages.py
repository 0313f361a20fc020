"""Markdown pages of the benchmarks: tables, and pages whose head is written by hand."""

import math
from pathlib import Path
from statistics import fmean

MARK = "<!-- The rest is generated: what is written below this line is replaced. -->"


def write_page(path: Path, title: str, generated: list[str]) -> None:
    """Write the generated lines below the mark; what stands above it in the file, the title and the findings, stays."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    head = old.partition(MARK)[0] if MARK in old else f"# {title}\n\n"
    path.write_text(head + "\n".join([MARK, "", *generated]).rstrip() + "\n", encoding="utf-8")
    print(path)


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def shown(values: list[float], form: str) -> str:
    """Return the mean of some values, and those themselves in brackets where they are several; a dash for none."""
    if any(map(math.isnan, values)):
        return "-" if len(values) == 1 else f"- ({', '.join('-' if math.isnan(v) else format(v, form) for v in values)})"
    return format(fmean(values), form) + (f" ({', '.join(format(v, form) for v in values)})" if len(values) > 1 else "")
