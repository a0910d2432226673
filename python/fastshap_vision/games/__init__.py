"""What removing a patch means: one file a removal and family."""
