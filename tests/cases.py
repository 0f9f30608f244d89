"""Inputs for routing tests, and one function that checks a backend on them against the oracle."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capsule_kernels import fused_routing, reference_routing

from .tolerance import assert_as_good_as_reference, reference_dtype


@dataclass(frozen=True)
class Case:
    """One call of the op: sizes in the paper's letters, and options."""

    B: int = 3
    I: int = 7
    J: int = 5
    K: int = 8
    D: int = 16
    R: int = 3
    weight_sharing: int = 1
    logits: bool = False
    bias: bool = False
    leaky: bool = False
    routing_gradient: str = "full"
    scale: float = 1.0

    def __str__(self) -> str:
        sizes = f"B{self.B}-I{self.I}-J{self.J}-K{self.K}-D{self.D}-R{self.R}"
        flags = [name for name in ("logits", "bias", "leaky") if getattr(self, name)]
        if self.weight_sharing > 1:
            flags.append(f"shared{self.weight_sharing}")
        if self.routing_gradient != "full":
            flags.append(self.routing_gradient)
        return "-".join([sizes, *flags])


SHAPES = [
    Case(B=1), Case(B=3), Case(B=127, I=9), Case(I=1), Case(I=153), Case(J=1), Case(J=2),
    Case(J=33), Case(K=3), Case(K=6, D=8), Case(D=1), Case(D=7), Case(D=10), Case(D=24),
    Case(D=32), Case(D=64),
    Case(R=1), Case(R=2), Case(R=10), Case(B=16, I=72, J=10), Case(B=33, I=40, J=10),
]  # fmt: skip
"""Awkward sizes, and the paper's networks scaled down."""

OPTIONS = [
    Case(logits=True), Case(bias=True), Case(leaky=True), Case(I=12, weight_sharing=4),
    Case(routing_gradient="last"), Case(R=1, logits=True), Case(R=1, routing_gradient="last"),
    Case(B=20, I=36, J=10, logits=True, bias=True, leaky=True, weight_sharing=9),
    Case(
        B=20, I=36, J=10, logits=True, bias=True, leaky=True, weight_sharing=36,
        routing_gradient="last",
    ),
]  # fmt: skip


def make_inputs(
    case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Random u, weight, logits, bias of a case: leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(device=device, dtype=dtype).requires_grad_()

    # Weights keep |u_hat| near 1 and the sum over i moderate: couplings that differ visibly.
    rows = case.I // case.weight_sharing
    return {
        "u": leaf(case.B, case.I, case.K, scale=case.scale),
        "weight": leaf(rows, case.J, case.D, case.K, scale=(case.K * case.D) ** -0.5 * 2),
        "logits": leaf(case.I, case.J) if case.logits else None,
        "bias": leaf(case.J, case.D, scale=0.1) if case.bias else None,
    }


def expanded(x: Tensor) -> Tensor:
    """The first entry of x's first dimension everywhere, without a copy: stride 0."""
    return x[:1].expand_as(x)


def permuted(x: Tensor) -> Tensor:
    """x with its first dimension innermost in memory."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": permuted,
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "shifted": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": expanded,
}
"""Other strides than a contiguous tensor's, or in "shifted" another alignment."""


def copies(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Fresh leaves with the values of ``inputs`` in another dtype."""
    return {
        name: None if x is None else x.detach().to(dtype).requires_grad_()
        for name, x in inputs.items()
    }


def route(function: Any, case: Case, inputs: dict[str, Any], **options: Any) -> Any:
    """What a function like ``fused_routing`` returns for a case."""
    return function(
        inputs["u"], inputs["weight"], case.R, logits=inputs["logits"], bias=inputs["bias"],
        leaky=case.leaky, weight_sharing=case.weight_sharing,
        routing_gradient=case.routing_gradient, **options,
    )  # fmt: skip


def run(
    function: Any, case: Case, inputs: dict[str, Any], return_coupling: bool = True, **options: Any
) -> dict[str, Tensor]:
    """v, c unless it is not wanted, and the gradients of a random loss of v."""
    outputs = route(function, case, inputs, return_coupling=return_coupling, **options)
    v, coupling = outputs if return_coupling else (outputs, None)
    generator = torch.Generator().manual_seed(1)
    grad_v = torch.randn(v.shape, generator=generator, dtype=torch.float64)
    # Rounded to the dtype under test before all else, so that every run sees the same gradient.
    grad_v = grad_v.to(torch.bfloat16).to(device=v.device, dtype=v.dtype)
    results = {"v": v.detach()}
    if return_coupling:
        results["coupling"] = coupling
    names = [name for name, x in inputs.items() if x is not None and x.requires_grad]
    gradients = torch.autograd.grad(v, [inputs[name] for name in names], grad_v)
    return results | {f"grad_{name}": g for name, g in zip(names, gradients, strict=True)}


def reordered(seed: int) -> Any:
    """The oracle over capsules and dimensions in another order, a factor of u moved to the weights.

    The result is put back in order: it differs from the oracle's by rounding alone (seed 0: not at
    all). The smallest calls have no other order, hence the factor.
    """
    factor = 1 + seed / 100

    def routing(u: Tensor, weight: Tensor, R: int, **options: Any) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def order(size: int) -> Tensor:
            keep = torch.arange(size)
            return (keep if seed == 0 else torch.randperm(size, generator=generator)).to(u.device)

        _, J, D, K = weight.shape
        shared = options["weight_sharing"] > 1
        i = torch.arange(u.shape[1], device=u.device) if shared else order(u.shape[1])
        rows = slice(None) if shared else i
        j, d, k = order(J), order(D), order(K)
        logits, bias = options.pop("logits"), options.pop("bias")
        wide = torch.promote_types(u.dtype, torch.float32)  # as the oracle computes
        v, c = reference_routing(
            factor * u.to(wide)[:, i][:, :, k],
            weight.to(wide)[rows][:, j][:, :, d][..., k] / factor,
            R,
            logits=None if logits is None else logits.to(wide)[i][:, j],
            bias=None if bias is None else bias.to(wide)[j][:, d],
            **options,
        )
        v, c = v.to(u.dtype), c.to(u.dtype)
        return v[:, j.argsort()][:, :, d.argsort()], c[:, i.argsort()][:, :, j.argsort()]

    return routing


def check_case(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    seed: int = 0,
    return_coupling: bool = True,
) -> None:
    """Outputs, couplings and every gradient of a backend, by the tolerance rule."""
    check_inputs(case, make_inputs(case, dtype, device, seed), backend, return_coupling)


def check_inputs(
    case: Case, inputs: dict[str, Any], backend: str, return_coupling: bool = True
) -> None:
    """The same for given values, whose sizes and options are those of the case."""
    found = run(fused_routing, case, inputs, return_coupling, backend=backend)
    dtype = reference_dtype(inputs["u"].dtype)
    exact = run(reference_routing, case, copies(inputs, torch.float64), return_coupling)
    assert found.keys() == exact.keys(), f"{case}: {[*found]}, the oracle: {[*exact]}"
    references: list[dict[str, Tensor]] = []

    def check(runs: int) -> None:
        seeds = range(len(references), runs)
        references.extend(run(reordered(seed), case, copies(inputs, dtype)) for seed in seeds)
        for name in exact:
            assert_as_good_as_reference(
                f"{case}: {name}", found[name], [r[name] for r in references], exact[name]
            )

    try:
        check(8)
    except AssertionError:  # where there is little to add up, eight runs may all be lucky
        check(64)
