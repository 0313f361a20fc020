"""The command line of the report.

python -m fdfo.report runs/00000-scene-cfg_1p0                      # writes report.html into the run folder
python -m fdfo.report runs/00000-scene-cfg_1p0 --watch              # writes watch.html whenever the run's log grows
python -m fdfo.report runs/00000-scene-cfg_1p0 runs/00001-scene-cfg_1p0 --out compare.html
"""

import sys
import time
from pathlib import Path

from fdfo.config.command_line import parse_report_config
from fdfo.distributed.launch import run_command_line
from fdfo.report.html import write_comparison, write_report
from fdfo.run_folder.log import LOG


def main() -> None:
    config = parse_report_config(sys.argv[1:])
    if config.watch:
        watch(config.runs[0], config.out or config.runs[0] / "watch.html")
    elif len(config.runs) == 1:
        print(f"report: {write_report(config.runs[0], config.out)}")
    else:
        print(f"report: {write_comparison(config.runs, config.out or Path('report.html'))}")


def watch(run: Path, out: Path) -> None:
    """Write the page whenever the log grows, until Ctrl-C; then once more, as a page that does not reload itself.

    The training writes report.html itself, so this page needs another name.
    """
    log, seen = run / LOG, None
    try:
        while True:
            size = log.stat().st_size if log.exists() else 0
            if size != seen:
                write_report(run, out, watched=True)
            if seen is None:
                print(f"report: {out}, written again whenever the log grows, until Ctrl-C", flush=True)
            seen = size
            time.sleep(10)
    except KeyboardInterrupt:
        write_report(run, out)


if __name__ == "__main__":
    run_command_line(main)
