"""Small forward and backward calls of the GPU backends, for compute-sanitizer to watch."""

from typing import Any

import torch

from capsule_kernels import backends, fused_routing

Call = tuple[tuple[int, ...], torch.dtype, dict[str, Any]]
CALLS: tuple[Call, ...] = (
    ((3, 7, 5, 8, 16), torch.float32, {}),
    ((33, 40, 10, 8, 16), torch.float32, {}),
    ((3, 7, 5, 8, 10), torch.float32, {}),
    ((3, 7, 33, 8, 16), torch.float32, {}),
    ((20, 36, 10, 8, 16), torch.float32, {"weight_sharing": 9, "leaky": True}),
)
"""B, I, J, K, D, dtype and options; the last one has log priors and a bias, too."""
FOR_CUDA: tuple[Call, ...] = (((520, 530, 10, 8, 16), torch.bfloat16, {}),)
"""So large that gradients go by output capsules, on 132 multiprocessors."""
BY_WARPGROUPS: tuple[Call, ...] = (
    ((260, 38, 5, 8, 16), torch.float32, {}),
    ((520, 530, 10, 8, 16), torch.bfloat16, {}),
)
"""For CUDA, too, in TF32 and without couplings: by warpgroups, which share samples or do not."""


def call(
    backend: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    options: dict[str, Any],
    by_warpgroups: bool,
) -> None:  # needs a GPU
    """Forward and backward, waited for; by warpgroups, in TF32 and without couplings."""
    torch.set_float32_matmul_precision("high" if by_warpgroups else "highest")
    B, I, J, K, D = sizes

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)

    inputs: dict[str, Any] = {
        "u": leaf(B, I, K),
        "weight": leaf(I // options.get("weight_sharing", 1), J, D, K),
    }
    if options:
        inputs |= {"logits": leaf(I, J), "bias": leaf(J, D)}
    if not by_warpgroups:
        options = options | {"return_coupling": True}
    outputs = fused_routing(**inputs, **options, backend=backend)
    v = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    torch.autograd.grad(v, list(inputs.values()), torch.ones_like(v))
    torch.cuda.synchronize()


def main() -> None:  # needs a GPU
    for backend in ("cuda", "triton"):  # what compiles comes last, as the time may be over
        usable, reason = backends()[backend]
        if not usable:
            print(f"{backend}: left out: {reason}")
            continue
        calls = [(small, False) for small in CALLS]
        if backend == "cuda":
            calls += [(small, False) for small in FOR_CUDA]
            calls += [(small, True) for small in BY_WARPGROUPS]
        for (sizes, dtype, options), by_warpgroups in calls:
            try:
                call(backend, sizes, dtype, options, by_warpgroups)
            except RuntimeError as error:
                if "can't be used" not in str(error):
                    raise
                print(f"{backend} {sizes}: {error}")
                continue
            print(f"{backend} {sizes}: done", flush=True)


if __name__ == "__main__":
    main()
