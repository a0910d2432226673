"""What is true: Shapley values computed one image at a time."""
