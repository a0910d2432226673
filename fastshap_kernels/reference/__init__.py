"""The plain-PyTorch definition of every op: readable in a minute, exact in float64, differentiable by autograd."""
