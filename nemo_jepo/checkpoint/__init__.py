"""What a run saves, and Hugging Face folders in both directions."""
