"""Names of the scorers and of the judges of pairs, and presets: weighted sets of them."""

from fdfo.config.presets import HUMAN

CLIP_SCORERS = ("pickscore", "hpsv2", "clip_h14", "clip_l14", "scene_clip")
VLM_QUESTIONS = "vlm_questions"
VLM_SCORERS = ("vlm_alignment", "vlm_quality", "vlm_photo", VLM_QUESTIONS)
VLM_TRAINING_SCORERS = tuple(f"{name}_train" for name in VLM_SCORERS)  # with the question and the images of training
SET_SCORERS = ("dreamsim_diversity", "pixel_diversity")
OCR_SCORERS = ("ocr", "ocr_tesseract")
SCORERS = (*CLIP_SCORERS, *VLM_SCORERS, *VLM_TRAINING_SCORERS, "scene", *OCR_SCORERS, *SET_SCORERS)
VLM_PAIR = "vlm_pair"
PAIR_JUDGES = (HUMAN, VLM_PAIR)  # compare the two images of a pair, so they can be a reward but no metric
REWARD_PRESETS = {
    "pickscore": {"pickscore": 1.0},
    "vlm_alignment": {"vlm_alignment": 1.0},
    "combined": {"pickscore": 1.0, "vlm_alignment": 0.1},
    "scene": {"scene": 1.0},
    "human": {HUMAN: 1.0},
    "vlm_pair": {VLM_PAIR: 1.0},
}


def is_remote(name: str) -> bool:
    """Return whether a name is the address of a server (remote/address.py)."""
    return "://" in name


def is_own_code(name: str) -> bool:
    """Return whether a name is MODULE:CLASS."""
    return ":" in name and not is_remote(name)
