"""Every op on a GPU beside its rivals."""
