"""Uploads a run's LoRA to the hub that HF_ENDPOINT names, without a token and with it, and draws by the card that it finds there.

python tests/hub_probe.py RUN OWNER/NAME TOKEN PICTURE
"""

import os
import sys
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from fdfo import export
from fdfo.distributed import exit_on_user_error

run, name, token, picture = sys.argv[1:]
sys.argv[1:] = [run, "--push-to-hub", name]
try:
    exit_on_user_error(export.main)
except SystemExit as stop:
    print("without a token:", stop.code)
os.environ["HF_TOKEN"] = token
exit_on_user_error(export.main)
card = Path(hf_hub_download(name, "README.md")).read_text(encoding="utf-8")
torch.manual_seed(3)
exec(card.split("```python\n")[1].split("```")[0])
image.save(picture)  # noqa: F821
