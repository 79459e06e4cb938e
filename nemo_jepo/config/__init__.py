"""Settings: every one declared once, composed by Hydra, checked before a model is built."""
