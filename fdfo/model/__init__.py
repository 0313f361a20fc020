"""The base model with its LoRA: text embeddings, velocities, images, and what makes them fast or small in memory.

flow_model.py is the one place that calls the pipeline's parts. It knows no rewards and no training loop.
"""
