"""The scorers of one image, or of the images of one prompt, that run in this process: one file each. The VLM's are in rewards/vlm."""
