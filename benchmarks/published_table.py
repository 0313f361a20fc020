"""Print the metrics that benchmarks/published.sh has drawn beside the published figures, as Markdown.

python benchmarks/published_table.py runs/published
"""

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from fdfo.config.errors import UserError  # noqa: E402
from fdfo.distributed.launch import run_command_line  # noqa: E402
from fdfo.storage.atomic_files import read_json  # noqa: E402

PUBLISHED = {  # of epoch 100 with the combined reward and no guidance (docs/results.md)
    "pickscore": 22.4704,
    "vlm_alignment": 61.7239,
    "hpsv2": 28.2949,
    "clip_h14": 35.7743,
    "clip_l14": 28.1932,
    "dreamsim_diversity": 0.4550,
}


def table(folder: Path) -> str:
    """Return the table of all metrics files in a folder. Raises UserError if there are none."""
    found: dict[str, dict[int, str]] = {}
    for path in folder.glob("metrics-*.json"):
        result = read_json(path)["results"][0]
        for name, value in result["metrics"].items():
            found.setdefault(name, {})[result["epoch"]] = f"{value['mean']:.4f} +- {value['standard_error']:.4f}"
    if not found:
        raise UserError(f"{folder} has no metrics-*.json: run benchmarks/published.sh first.")
    epochs = sorted({epoch for values in found.values() for epoch in values})
    lines = [["metric", *(f"epoch {epoch}" for epoch in epochs), "published, epoch 100"], ["---"] * (len(epochs) + 2)]
    for name in sorted(found):
        lines.append([name, *(found[name].get(epoch, "-") for epoch in epochs), str(PUBLISHED.get(name, "-"))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_command_line(lambda: print(table(tyro.cli(tyro.conf.Positional[Path]))))
