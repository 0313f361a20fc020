"""FDFO: online RL post-training of a text-to-image flow model with finite differences of a reward along the flow."""

FOLDERS = (
    ("scripts",),  # train.py, generate.py, metrics.py and benchmarks/
    ("method",),
    ("votes",),
    ("evaluation", "export"),
    ("report",),
    ("run_folder",),
    ("rewards",),  # beside fdfo/, not inside it
    ("model",),
    ("vote_page",),
    ("distributed", "storage"),
    ("tiny",),
    ("config",),
)
"""From top to bottom: a folder imports only folders below its own line. tests/test_structure.py checks it."""
