"""Small forward and backward calls of the GPU backends, for compute-sanitizer to watch."""

from typing import Any

import torch

from capsule_kernels import backends, fused_routing

from .peers import BACKENDS

CALLS: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((3, 7, 5, 8, 16), {}),
    ((33, 40, 10, 8, 16), {}),
    ((3, 7, 5, 8, 10), {}),
    ((3, 7, 33, 8, 16), {}),
    ((20, 36, 10, 8, 16), {"weight_sharing": 9, "leaky": True}),
)
"""B, I, J, K, D, and options; the last one has log priors and a bias, too. All are cases of the
tests as well, whose kernels Triton has compiled by then."""


def call(backend: str, sizes: tuple[int, ...], options: dict[str, Any]) -> None:  # needs a GPU
    """Forward and backward, waited for."""
    B, I, J, K, D = sizes
    inputs: dict[str, Any] = {
        "u": torch.randn(B, I, K, device="cuda", requires_grad=True),
        "weight": torch.randn(
            I // options.get("weight_sharing", 1), J, D, K, device="cuda", requires_grad=True
        ),
    }
    if options:
        inputs["logits"] = torch.randn(I, J, device="cuda", requires_grad=True)
        inputs["bias"] = torch.randn(J, D, device="cuda", requires_grad=True)
    v, _ = fused_routing(**inputs, **options, return_coupling=True, backend=backend)
    torch.autograd.grad(v, list(inputs.values()), torch.ones_like(v))
    torch.cuda.synchronize()


def main() -> None:  # needs a GPU
    for backend in BACKENDS["cuda"]:
        usable, reason = backends()[backend]
        if not usable:
            print(f"{backend}: left out: {reason}")
            continue
        for sizes, options in CALLS:
            try:
                call(backend, sizes, options)
            except RuntimeError as error:
                if "can't be used" not in str(error):
                    raise
                print(f"{backend} {sizes}: {error}")
                continue
            print(f"{backend} {sizes}: done", flush=True)


if __name__ == "__main__":
    main()
