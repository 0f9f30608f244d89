"""Small forward and backward calls of the GPU backends, for compute-sanitizer to watch."""

import torch

from capsule_kernels import backends, fused_routing

from .peers import BACKENDS

SIZES = ((3, 7, 5, 8, 16), (17, 40, 10, 8, 16), (1, 9, 33, 6, 10))
"""B, I, J, K, D."""


def main() -> None:  # needs a GPU
    for backend in BACKENDS["cuda"]:
        usable, reason = backends()[backend]
        if not usable:
            print(f"{backend}: left out: {reason}")
            continue
        for B, I, J, K, D in SIZES:
            u = torch.randn(B, I, K, device="cuda", requires_grad=True)
            weight = torch.randn(I, J, D, K, device="cuda", requires_grad=True)
            try:
                v = fused_routing(u, weight, backend=backend)
            except RuntimeError as error:
                print(f"{backend} {(B, I, J, K, D)}: {error}")
                continue
            torch.autograd.grad(v, (u, weight), torch.ones_like(v))
            torch.cuda.synchronize()
            print(f"{backend} {(B, I, J, K, D)}: done")


if __name__ == "__main__":
    main()
