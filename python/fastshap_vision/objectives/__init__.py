"""What is minimised, and the coalitions that a step draws."""
