"""One op a file: contract, checks, autograd.Function, fake implementation, choice of backend."""
