"""FDFO: online RL post-training of Stable Diffusion 3.5 Medium with finite differences of a reward along the flow."""
