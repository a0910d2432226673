"""How pictures become a model's input."""
