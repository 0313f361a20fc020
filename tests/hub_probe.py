"""Uploads a run's LoRA to the hub that HF_ENDPOINT names, without a token, with it and in public, and draws by the card that it finds there.

python tests/hub_probe.py RUN OWNER/NAME TOKEN PICTURE
"""

import os
import sys
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from fdfo import export
from fdfo.distributed import run_command_line

run, name, token, picture = sys.argv[1:]


def push(*flags: str) -> int:
    """The exit code."""
    sys.argv[1:] = [run, "--push-to-hub", name, *flags]
    try:
        run_command_line(export.main)
    except SystemExit as stop:
        return stop.code
    return 0


print("without a token:", push())
os.environ["HF_TOKEN"] = token
print("with it:", push(), "and in public:", push("--public"))
card = Path(hf_hub_download(name, "README.md")).read_text(encoding="utf-8")
torch.manual_seed(3)
exec(card.split("```python\n")[1].split("```")[0])
image.save(picture)  # noqa: F821
