"""What makes training quick on a processor, beside plain PyTorch."""
