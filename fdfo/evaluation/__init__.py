"""Says whether a run is learning, and computes the scores of metrics.py.

It takes numbers and images: what is held out, how an epoch looks, which checkpoint is the best. It does not know how the method
samples or updates.
"""
