"""`python -m fdfo.export`: writes a checkpoint as a LoRA for other tools, or merged into a whole pipeline.

It reads checkpoints and writes new folders. It never changes a run.
"""
