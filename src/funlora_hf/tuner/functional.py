"""Compute the functional matrix F and its initial values, and expand it to the shape of a weight.

Marks: [exact] matches the paper's numbers (arXiv 2510.02631), [text] its prose, [ours] is our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from ..utils.checks import check_at_least_one, check_choice


FUNCTIONS = ("cosine", "power", "shift", "identity")
FUNCTIONS_WITH_OMEGA = ("cosine", "power")
OPERATIONS = ("mul", "add", "mul-add")

# Below this magnitude |x|^omega continues linearly, so that its gradient is finite at x = 0 for every omega.
SMALLEST_BASE = 1e-6

# From this many entries of F on, interpolation is faster than the plain formula; from the second number on, the backward pass
# computes the terms of the plain formula again instead of keeping them. Measured on a CPU (benchmarks/functional_matrix.py).
INTERPOLATED_SIZE = 128 * 256
RECOMPUTED_SIZE = 256 * 256
# Interpolation has accurate gradients if the largest omega A B is at least this.
SMALLEST_ARGUMENT = 0.1


def functional_matrix(
    A: torch.Tensor,
    B: torch.Tensor,
    alpha: torch.Tensor | None = None,
    omega: torch.Tensor | None = None,
    *,
    function: str = "cosine",
) -> torch.Tensor:
    """Compute F = (1/p) * sum_i alpha_i * f_i(A, B); `identity` is F = A B without alpha and sum.

    | function   | f_i(A, B)                                                        |
    |------------|------------------------------------------------------------------|
    | `cosine`   | cos(omega_i * A B), elementwise                                    |
    | `power`    | (A B)^i, elementwise; with `omega`: sign(A B) * abs(A B)^omega_i    |
    | `shift`    | roll(A, i, dims=0) roll(B, i, dims=1), i = 0..p-1                  |
    | `identity` | A B                                                              |

    F is computed in float32 or float64, also under autocast: the cosine of a large argument loses all digits in bfloat16.

    Args:
        A: `(C_out, r)`, real.
        B: `(r, C_in)`, real.
        alpha: `(p,)`, weights of the p functions. Required, except for `identity`, which takes no alpha.
        omega: `(p,)`, frequencies of `cosine` or exponents of `power`; None means 1..p (for `power` the plain integer
            powers). `shift` and `identity` take no omega.
        function: "cosine", "power", "shift" or "identity".

    Returns:
        F, `(C_out, C_in)`, float32 or float64.

    Raises:
        ValueError: an unknown function, an argument that is missing or that the function does not take, or shapes that do not match.

    Source: arXiv 2510.02631, the functional matrix [text]; the range of the shift and omega = 1..p are [ours].
    """
    check_choice("function", function, FUNCTIONS)
    _check_arguments(A, B, alpha, omega, function)
    with without_autocast(A.device.type):
        A, B = _at_least_float32(A), _at_least_float32(B)
        if alpha is None:  # only for `identity`
            return _product(A, B)
        alpha = _at_least_float32(alpha)
        omega = None if omega is None else _at_least_float32(omega)
        if function == "shift":
            return _shift(A, B, alpha)
        entries = 0 if torch.compiler.is_compiling() else A.shape[0] * B.shape[1]
        if function == "power":
            return _recomputed(_power, entries, A, B, alpha, omega)
        omega = default_omega(alpha.numel(), like=A) if omega is None else omega
        intervals = _intervals(A, B, omega) if A.shape[1] == 1 and entries >= INTERPOLATED_SIZE else None
        if intervals is not None:
            return torch.matmul(*_cosine_factors(*intervals, A, B, alpha, omega))
        return _recomputed(_cosine, entries, A, B, alpha, omega)


def initial_alpha(
    function: str, num_functions: int, operation: str = "mul", omega: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Return the alpha for which an adapter with A B = 1 everywhere starts as the identity.

    `alpha_0 = p * e * v / ||v||^2` with `v_i = f_i(1, 1)` is the alpha of least norm that gives F = e, where e = 1 for "mul"
    and the factor of "mul-add", and e = 0 for "add". It is 1 for `shift` and `power`, as in the paper. For the term of
    "mul-add", pass "add".

    Args:
        function: "cosine", "power", "shift" or "identity".
        num_functions: p >= 1.
        operation: "mul", "add" or "mul-add".
        omega: `(p,)`, None means 1..p.

    Returns:
        alpha, `(p,)`, float32 (float64 for a float64 omega); None for `identity`, which has no alpha.

    Raises:
        ValueError: an unknown function or operation, p < 1, an omega whose length is not p, or an omega for which every
            f_i(1, 1) is zero, so that no alpha gives the identity.

    Source: [ours]; the paper starts A and B at one and says that this preserves the identity, but for `cosine` with
    alpha = 1 it does not (F = -0.14).
    """
    check_choice("function", function, FUNCTIONS)
    check_choice("operation", operation, OPERATIONS)
    check_at_least_one("num_functions", num_functions)
    if function == "identity":
        return None
    if omega is not None and omega.shape != (num_functions,):
        raise ValueError(
            f"`omega` has shape {tuple(omega.shape)}, expected ({num_functions},): one entry for each function."
        )
    dtype = torch.float32 if omega is None else torch.promote_types(omega.dtype, torch.float32)
    if operation == "add":
        return torch.zeros(num_functions, dtype=dtype)
    # In Python's floats, since under `with torch.device("meta")` a tensor has no values.
    values = [1.0] * num_functions
    if function == "cosine":
        frequencies = range(1, num_functions + 1) if omega is None else omega.tolist()
        values = [math.cos(frequency) for frequency in frequencies]
    squared_norm = sum(value * value for value in values)
    if squared_norm < 1e-12:
        raise ValueError(f"`omega` is {omega}: cos(omega) is zero for every entry, so no alpha gives the identity.")
    return torch.tensor([num_functions * value / squared_norm for value in values], dtype=dtype)


def default_omega(num_functions: int, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return omega = 1..p, `(p,)`, in float32 or with dtype and device of `like`.

    Source: [text] for `power`, [ours] for `cosine`.
    """
    made = {"dtype": torch.float32} if like is None else {"dtype": like.dtype, "device": like.device}
    return torch.arange(1, num_functions + 1, **made)


def reduced_size(channels: int, ratio: int) -> int:
    """Return the number of entries of a factor for `channels` at this `ratio`, rounded up. Source: Table IV [exact]."""
    # With integers only: a ratio may be larger than any float.
    return -(-channels // ratio)


def expand(F: torch.Tensor, ratio: int, shape: torch.Size) -> torch.Tensor:
    """Repeat each entry of a reduced F for `ratio` neighbouring channels and broadcast it over the kernel.

    Args:
        F: `(ceil(C_out / ratio), ceil(C_in / ratio))`.
        ratio: >= 1.
        shape: shape of the weight, `(C_out, C_in, ...)`.

    Returns:
        `(C_out, C_in, 1, ...)`, with a trailing one for each kernel dimension of the weight.

    Source: Table IV [exact] for the counts; which channels share an entry is [ours].
    """
    if ratio > 1:
        # At most one copy of an entry for each channel, even if the ratio is larger.
        rows, columns = (min(ratio, size) for size in shape[:2])
        F = F.repeat_interleave(rows, dim=0)[: shape[0]].repeat_interleave(columns, dim=1)[:, : shape[1]]
    return F.reshape(*F.shape, *(1 for _ in shape[2:]))


def without_autocast(device_type: str) -> AbstractContextManager:
    """Switch autocast off, on devices that have it; the meta device, which infers shapes, does not."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return A * B if A.shape[1] == 1 else A @ B


def _shift(A: torch.Tensor, B: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    p = alpha.numel()
    left = torch.cat([alpha[i] * A.roll(i, dims=0) for i in range(p)], dim=1)
    right = torch.cat([B.roll(i, dims=1) for i in range(p)], dim=0)
    return left @ right / p


def _cosine(A: torch.Tensor, B: torch.Tensor, alpha: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    return _weighted(alpha, torch.cos(omega[:, None, None] * _product(A, B)))


def _power(A: torch.Tensor, B: torch.Tensor, alpha: torch.Tensor, omega: torch.Tensor | None) -> torch.Tensor:
    x = _product(A, B)
    if omega is None:
        return _weighted(alpha, torch.stack([x**i for i in range(1, alpha.numel() + 1)]))
    base = x.abs().clamp(min=SMALLEST_BASE)
    return _weighted(alpha, x * base ** (omega[:, None, None] - 1))


def _weighted(alpha: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """Compute (1/p) sum_i alpha_i terms_i: alpha `(p,)`, terms `(p, m, n)` -> `(m, n)`."""
    return torch.tensordot(alpha, terms, dims=1) / alpha.numel()


def _recomputed(function: Callable, entries: int, *tensors: torch.Tensor | None) -> torch.Tensor:
    """Call `function(*tensors)`; for a large F, autograd keeps only the arguments."""
    # `_Recomputed` calls autograd itself, so torch.func has no rule for it.
    if entries < RECOMPUTED_SIZE or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function(*tensors)
    return _Recomputed.apply(function, *tensors)


class _Recomputed(torch.autograd.Function):
    """Compute `function(*tensors)` again in the backward pass; torch's `checkpoint` takes 0.3 ms more per call."""

    @staticmethod
    def forward(ctx: Any, function: Callable, *tensors: torch.Tensor | None) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = [one for one, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True) if needed]
        twice = torch.is_grad_enabled()
        with torch.enable_grad(), without_autocast(gradient.device.type):
            value = ctx.function(*ctx.saved_tensors)
            found = iter(torch.autograd.grad(value, inputs, gradient, create_graph=twice))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


class _Interval(NamedTuple):
    """Where to interpolate: `size` Chebyshev nodes in [center - half, center + half]."""

    size: int
    center: float
    half: float

    def chebyshev(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the polynomials T_0 .. T_(size - 1) at the entries of x, `(x.numel(), size)`, float64."""
        orders = torch.arange(self.size, dtype=torch.float64, device=x.device)
        return torch.cos(torch.arccos((x.double().reshape(-1, 1) - self.center) / self.half) * orders)

    def nodes_and_transform(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nodes, `(size,)`, and the matrix `(size, size)` from values at the nodes to Chebyshev coefficients."""
        orders = torch.arange(self.size, dtype=torch.float64, device=device)
        angles = (orders + 0.5) * (math.pi / self.size)
        transform = torch.cos(orders[:, None] * angles) * (2 / self.size)
        transform[0] /= 2
        return self.center + self.half * angles.cos(), transform


def _intervals(A: torch.Tensor, B: torch.Tensor, omega: torch.Tensor) -> tuple[_Interval, _Interval] | None:
    """Choose the intervals in which to interpolate cos(omega a b) over the entries of A and of B.

    Return None if interpolation is not faster, if omega a b is so small that the rounding of coefficients would show in
    gradients, if values cannot be read (under vmap), or if the device has no float64 (MPS).
    """
    if A.device.type == "mps":
        return None
    try:
        *ranges, fastest = torch.stack([A.min(), A.max(), B.min(), B.max(), omega.abs().max()]).tolist()
    except RuntimeError:
        return None
    of_a, of_b = ranges[:2], ranges[2:]
    largest = max(abs(a * b) for a in of_a for b in of_b) * fastest
    if largest < SMALLEST_ARGUMENT:
        return None
    found = []
    for (low, high), (other_low, other_high), size in ((of_a, of_b, A.numel()), (of_b, of_a, B.numel())):
        # A margin, and a minimum width for equal entries, keep the derivative of arccos finite.
        center, half = (low + high) / 2, max(1.1 * (high - low) / 2, 1e-2)
        other_half = max(1.1 * (other_high - other_low) / 2, 1e-2)
        c = half * fastest * (abs(other_low + other_high) / 2 + other_half)
        if not math.isfinite(c):
            return None
        # The coefficients of cos(c t) are 2 J_k(c); from this k on they are below 1e-16 (in float32 1e-8).
        spread, more = (7, 8) if A.dtype == torch.float64 else (5, 6)
        count = int(c + spread * c ** (1 / 3) + more)
        if 3 * count > size:
            return None
        found.append(_Interval(count, center, half))
    return found[0], found[1]


def _cosine_factors(
    along_a: _Interval, along_b: _Interval, A: torch.Tensor, B: torch.Tensor, alpha: torch.Tensor, omega: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize `_cosine` at r = 1 into two matrices, `(C_out, K)` and `(K, C_in)`, by Chebyshev interpolation.

    F_ij = g(a_i b_j) with a smooth g, so about 40 nodes replace all rows: F = T(a) C T(b)^T, where C `(K_a, K_b)` has the
    coefficients of g over both intervals. The computation is in float64, which keeps gradients accurate; the result is cast.

    Source: [ours]; equal to the plain formula up to rounding.
    """
    (a, to_a), (b, to_b) = (interval.nodes_and_transform(A.device) for interval in (along_a, along_b))
    # The terms at the nodes, in float64, take more memory than F only if F is small.
    kept, entries = 12 * omega.numel() * a.numel() * b.numel(), A.numel() * B.numel()
    alpha, omega = alpha.double(), omega.double()
    at_nodes = _recomputed(_cosine, entries if kept > entries else 0, a[:, None], b[None], alpha, omega)
    left = along_a.chebyshev(A) @ (to_a @ at_nodes @ to_b.T)
    return left.to(A.dtype), along_b.chebyshev(B).T.to(A.dtype)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_arguments(
    A: torch.Tensor, B: torch.Tensor, alpha: torch.Tensor | None, omega: torch.Tensor | None, function: str
) -> None:
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != B.shape[0]:
        raise ValueError(
            f"`A` has shape {tuple(A.shape)} and `B` {tuple(B.shape)}, expected (C_out, r) and (r, C_in) with the same r."
        )
    if (alpha is None) != (function == "identity"):
        remedy = "leave it out" if function == "identity" else "pass a tensor of shape (p,), see `initial_alpha`"
        raise ValueError(f"`alpha` is {'None' if alpha is None else 'given'} for function={function!r}: {remedy}.")
    if alpha is not None and (alpha.dim() != 1 or alpha.numel() == 0):
        raise ValueError(f"`alpha` has shape {tuple(alpha.shape)}, expected (p,) with p >= 1.")
    if omega is not None and function not in FUNCTIONS_WITH_OMEGA:
        raise ValueError(f"`omega` is given, but function={function!r} takes no omega: leave it out.")
    if omega is not None and alpha is not None and omega.shape != alpha.shape:
        raise ValueError(
            f"`omega` has shape {tuple(omega.shape)}, expected the shape of `alpha`, {tuple(alpha.shape)}."
        )
