"""Commands around a run: plan, doctor, report, experiments, demo, data preparation. No part of training."""
