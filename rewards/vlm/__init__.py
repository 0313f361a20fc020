"""Qwen2.5-VL: one model that scores images by yes and no (judge.py), and compares the two of a pair (pair.py)."""
