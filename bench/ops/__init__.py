"""Every op beside plain PyTorch."""
