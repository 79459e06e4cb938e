"""Dataset rows -> Prompt, the order in which a run reads them, and the sequences and rows that are made of rollouts."""
