"""The desk at which people judge pairs: votes.jsonl, who gets which pair, and the page in the browser.

It knows no trainer and no reward: desk.py is all that they see of it.
"""
