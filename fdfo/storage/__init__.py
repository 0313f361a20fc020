"""Files and the Hub: atomic writes, checksums, downloads, prompt sets.

Everything that is read here may be damaged or foreign, and becomes one sentence if it is. It knows nothing of runs.
"""
