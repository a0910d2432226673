"""The self-explaining model, its heads and its backbone."""
