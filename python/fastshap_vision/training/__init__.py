"""The loop, evaluation, what stops a lost run, checkpoints, run folders, the recipe."""
