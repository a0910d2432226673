"""Every op and backend once, small, forward and backward: under compute-sanitizer, by bench/gpu/steps.py."""

import sys

import torch

from fastshap_kernels import testing


def main() -> None:
    failures = 0
    for op in sys.argv[1:] or testing.OPS:
        for backend in testing.backends(op, "triton", "cuda"):
            try:
                testing.outputs(testing.make(op, 0, torch.bfloat16, "cuda"), backend)
                torch.cuda.synchronize()
                print(op, backend, flush=True)
            except Exception as error:
                failures += 1
                print(op, backend, "failed:", error, flush=True)
    sys.exit(min(failures, 1))


if __name__ == "__main__":
    main()
