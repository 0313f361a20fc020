"""The method and its training loop: read trainer.py, then estimator.py and sampling.py.

One epoch is collected (rollout.py), then learned from (update.py); prepare.py loads what a run needs. sampling.py and estimator.py
hold the formulas, import torch alone, and take noise as an argument. Nothing below imports this folder.
"""
