import os

# cuBLAS is deterministic, as `_poisoned_memory` asks for, with a workspace of its own only.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
