"""Rewards and metrics: one file per scorer, and the same class for training and evaluation.

presets.py names the scorers and weighs them, registry.py builds them by name, scorer.py says what a scorer is. The scorers lie in
scorers/ and vlm/, those that ask a server in remote/; serve.py makes a server of any of them. This folder knows no training loop;
scorers are black boxes that need no gradient.
"""
