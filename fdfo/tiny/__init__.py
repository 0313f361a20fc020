"""The tiny preset: a small text-to-image model of SD3.5's classes, its world of scenes, and the script that trained it.

scenes.py holds the captions and renders them; pretrain.py makes the weights that lie here. It knows no scorer and no run.
"""

from pathlib import Path

TINY_MODEL = Path(__file__).parent / "model"  # a StableDiffusion3Pipeline folder
SCENE_CLIP = Path(__file__).parent / "scene_clip"  # a CLIPModel folder, with its processor
TEXT_TOKENS = 16  # length to which all three of the tiny model's tokenizers pad
