"""A model's weights as a Hugging Face folder or as a torch_dist checkpoint, one tensor at a time."""
