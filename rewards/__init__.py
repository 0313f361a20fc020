"""Rewards and metrics: one class a scorer, used by training and evaluation alike."""
