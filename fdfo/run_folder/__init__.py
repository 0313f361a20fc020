"""All that a run leaves on disk: its folder, log, checkpoints, exported LoRA and model card.

It saves and loads plain values and tensors, finds checkpoints and checks that they are intact. It knows neither the training loop
nor what the numbers mean.
"""
