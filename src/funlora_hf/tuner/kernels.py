"""F and its gradients, fast and with no more than one matrix kept for the backward pass; as in `functional.py`.

`cosine` at r = 1: F[m, n] = g(a_m b_n) with a smooth g, so over the range of a it is a polynomial of low degree to
within rounding (which is also why its numerical rank is low). F is computed at K Chebyshev nodes in place of the entries
of A, and one matrix product interpolates: F = L(a) F(nodes, b), with K of 15 to 40 instead of hundreds of rows.

Everything else that has terms: they are made one after another in buffers that are used again; the plain powers by Horner's
rule. Pure functions of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from . import functional
from .functional import FUNCTIONS_WITH_OMEGA, SMALLEST_BASE, check_coefficients, check_factors, default_omega


# Below this many entries the calls cost more than the arithmetic, and plain autograd is faster (measured on a CPU).
SMALLEST_SIZE = 128 * 128
# Interpolation nodes spread at least this far: a narrower spread saves few of them.
_SMALLEST_HALF_WIDTH = 0.125


def functional_matrix(
    A: torch.Tensor,
    B: torch.Tensor,
    alpha: torch.Tensor | None = None,
    omega: torch.Tensor | None = None,
    *,
    function: str = "cosine",
    compiled: bool = False,
) -> torch.Tensor:
    """
    F as `functional.functional_matrix` gives it, within rounding, with the same arguments, results and errors.

    It is that function itself for `shift` and `identity`, which are matrix products; for matrices of less than
    128 x 128 entries; and while torch compiles what is around it. On other devices than the CPU it is computed anew in the
    backward pass instead of kept: there, many small kernels would cost more than a few large ones save.

    Args:
        A: as in `functional.functional_matrix`, and so are B, alpha, omega and function.
        compiled: have `torch.compile` make kernels of it, once for all sizes. The first call of a process takes seconds
            (tens of them if torch has never compiled it here), and a C++ compiler, on a GPU Triton.

    Source: arXiv 2510.02631, the functional matrix [text]; how it is computed is [ours].
    """
    check_factors(A, B)
    too_small = A.shape[0] * B.shape[1] < SMALLEST_SIZE
    if too_small or function not in FUNCTIONS_WITH_OMEGA or torch.compiler.is_compiling():
        return functional.functional_matrix(A, B, alpha, omega, function=function)
    check_coefficients(alpha, omega, function)
    if A.device.type != "cpu":
        if compiled:
            return _compiled(functional.functional_matrix)(A, B, alpha, omega, function=function)
        return _recomputed(A, B, alpha, omega, function)
    with functional.without_autocast(A.device.type):
        A, B, alpha, omega = (functional.at_least_float32(tensor) for tensor in (A, B, alpha, omega))
        if function == "power":
            return _TermByTerm.apply(functional.product(A, B), alpha, omega, _PowerLadder if omega is None else _Power)
        a_first, b_first = _nodes(A, B, alpha, omega), _nodes(B, A, alpha, omega)
        if a_first is not None and (b_first is None or a_first.count * B.numel() <= b_first.count * A.numel()):
            return _InterpolatedCosine.apply(A, B, alpha, omega, a_first, compiled)
        if b_first is not None:
            return _InterpolatedCosine.apply(B.reshape(-1, 1), A.reshape(1, -1), alpha, omega, b_first, compiled).T
        if omega is None:
            omega = default_omega(alpha.numel(), like=A)
        return _TermByTerm.apply(functional.product(A, B), alpha, omega, _Cosine)


def _recomputed(*tensors_and_function: Any) -> torch.Tensor:
    """The reference, of which autograd keeps the arguments only."""

    def reference(A: torch.Tensor, B: torch.Tensor, alpha: Any, omega: Any, function: str) -> torch.Tensor:
        return functional.functional_matrix(A, B, alpha, omega, function=function)

    return checkpoint(reference, *tensors_and_function, use_reentrant=False, preserve_rng_state=False)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled for tensors of any size."""
    return torch.compile(function, dynamic=True)


class _Nodes(NamedTuple):
    """Where to interpolate: `count` Chebyshev nodes on [center - half_width, center + half_width]."""

    count: int
    center: float
    half_width: float


def _nodes(
    along: torch.Tensor, across: torch.Tensor, alpha: torch.Tensor, omega: torch.Tensor | None
) -> _Nodes | None:
    """How to interpolate cos(omega a b) over the entries a of `along`, to within the rounding of its dtype.

    None where that does not pay, or cannot be decided: at r > 1, under vmap, with values that are not finite, or with more
    than half as many nodes as entries.
    """
    if along.numel() != max(along.shape) or across.numel() != max(across.shape):
        return None
    try:
        low, high = along.min().item(), along.max().item()
        highest = alpha.numel() if omega is None else omega.abs().max().item()
        steepest = highest * across.abs().max().item()
    except RuntimeError:
        return None
    half_width = max((high - low) / 2, _SMALLEST_HALF_WIDTH)
    count = _degree(steepest * half_width, torch.finfo(along.dtype).eps, limit=along.numel() // 2)
    return None if count is None else _Nodes(count, (low + high) / 2, half_width)


def _degree(z: float, tolerance: float, limit: int) -> int | None:
    """The smallest K for which the Chebyshev series of cos(z t), -1 <= t <= 1, is negligible from T_K on; None above `limit`.

    Its coefficients are 2 J_k(z), and |J_k(z)| <= (z / 2)^k / k!.
    """
    if not math.isfinite(z):
        return None
    bound = 1.0
    for k in range(1, limit + 1):
        bound *= z / (2 * k)
        if k > z and bound < tolerance / 8:
            return k
    return None


class _InterpolatedCosine(torch.autograd.Function):
    """(1/p) sum_i alpha_i cos(omega_i A B): A `(C_out, 1)`, B `(1, C_in)`, alpha and omega `(p,)`, or None for 1..p."""

    @staticmethod
    def forward(
        ctx: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        alpha: torch.Tensor,
        omega: torch.Tensor | None,
        nodes: _Nodes,
        compiled: bool,
    ) -> torch.Tensor:
        if omega is None and not compiled:
            omega = default_omega(alpha.numel(), like=alpha)
        F, at_nodes, matrix = _of(_interpolated, compiled)(A, B, alpha, omega, *_places(nodes))
        ctx.save_for_backward(A, B, alpha, omega, at_nodes, matrix)
        ctx.compiled = compiled
        return F

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        A, B, alpha, omega, at_nodes, matrix = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_gradients_of_reference((A, B, alpha, omega), gradient), None, None
        with functional.without_autocast(A.device.type):
            *found, by_omega = _of(_gradients_by_interpolation, ctx.compiled)(
                B, alpha, omega, at_nodes, matrix, gradient
            )
        return *found, by_omega if ctx.needs_input_grad[3] else None, None, None


def _of(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _compiled(function) if compiled else function


def _places(nodes: _Nodes) -> tuple[torch.Tensor, torch.Tensor]:
    """The nodes as angles, of which the cosines lie on [-1, 1], `(K,)`, and center and half width, `(2,)`; float64.

    Tensors, since a compiler would make one kernel for every number.
    """
    angles = (torch.arange(nodes.count, dtype=torch.float64) + 0.5) * (math.pi / nodes.count)
    return angles, torch.tensor([nodes.center, nodes.half_width], dtype=torch.float64)


def _interpolated(
    A: torch.Tensor,
    B: torch.Tensor,
    alpha: torch.Tensor,
    omega: torch.Tensor | None,
    node_angles: torch.Tensor,
    interval: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """F, `(C_out, C_in)`, and what `_interpolation` returns."""
    at_nodes, matrix = _interpolation(A, node_angles, interval)
    cosines, _ = _terms(at_nodes * B, alpha, omega, with_sines=False)
    return matrix @ (_weighted(alpha, cosines) / alpha.shape[0]), at_nodes, matrix


def _gradients_by_interpolation(
    B: torch.Tensor,
    alpha: torch.Tensor,
    omega: torch.Tensor | None,
    at_nodes: torch.Tensor,
    matrix: torch.Tensor,
    gradient: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of A, B, alpha and omega for a `gradient` of F, `(C_out, C_in)`."""
    products = at_nodes * B
    cosines, sines = _terms(products, alpha, omega, with_sines=True)
    # What reaches F at the nodes; its sums with anything smooth in a are those over the entries of A.
    at_nodes_gradient = matrix.T @ gradient / alpha.shape[0]
    by_alpha = torch.mv(cosines.flatten(1), at_nodes_gradient.flatten())
    by_omega = None
    if omega is not None:
        by_omega = -alpha * torch.mv(sines.flatten(1), (at_nodes_gradient * products).flatten())
    frequencies = default_omega(alpha.shape[0], like=alpha) if omega is None else omega
    slope = _weighted(-alpha * frequencies, sines)
    by_B = (at_nodes_gradient * slope * at_nodes).sum(0, keepdim=True)
    by_A = (gradient @ (slope * B).T * matrix).sum(1, keepdim=True) / alpha.shape[0]
    return by_A, by_B, by_alpha, by_omega


def _terms(
    x: torch.Tensor, alpha: torch.Tensor, omega: torch.Tensor | None, *, with_sines: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """cos(omega_i x) and, if wanted, sin(omega_i x), `(p, K, C_in)` each, for x `(K, C_in)`. None stands for omega = 1..p."""
    if omega is not None:
        angles = omega[:, None, None] * x
        return angles.cos(), angles.sin() if with_sines else None
    # One cosine and one sine, and Chebyshev's recurrence, which in float64 loses nothing that float32 shows.
    x64 = x.double()
    cosine = x64.cos()
    cosines = _recurrence(torch.ones_like(cosine), cosine, cosine, alpha.shape[0]).to(x)
    if not with_sines:
        return cosines, None
    return cosines, _recurrence(torch.zeros_like(cosine), x64.sin(), cosine, alpha.shape[0]).to(x)


def _recurrence(zeroth: torch.Tensor, first: torch.Tensor, cosine: torch.Tensor, count: int) -> torch.Tensor:
    """y_1 .. y_count of y_(n + 1) = 2 cos(x) y_n - y_(n - 1), which cos(n x) and sin(n x) obey; `(count, ...)`."""
    found = [zeroth, first]
    while len(found) <= count:
        found.append(2 * cosine * found[-1] - found[-2])
    return torch.stack(found[1:])


def _weighted(weights: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """sum_i weights_i terms_i: weights `(p,)`, terms `(p, K, C_in)`. A compiler makes it part of what makes the terms."""
    if torch.compiler.is_compiling():
        return (weights[:, None, None] * terms).sum(0)
    return torch.tensordot(weights, terms, dims=1)


def _interpolation(
    A: torch.Tensor, node_angles: torch.Tensor, interval: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nodes, `(K, 1)`, and the matrix `(C_out, K)` that takes values at the nodes to values at the entries of A.

    It is Lagrange's, made as T(t) times the discrete cosine transform, in float64: neither divides by small numbers.
    """
    K = node_angles.shape[0]
    center, half_width = interval.unbind()
    orders = torch.arange(K, dtype=torch.float64, device=A.device)
    transform = torch.cos(orders[:, None] * node_angles) * ((2 - (orders == 0).double()[:, None]) / K)
    t = ((A.double() - center) / half_width).clamp(-1, 1)
    matrix = torch.cos(t.acos() * orders) @ transform
    return (center + half_width * node_angles.cos()[:, None]).to(A), matrix.to(A)


class _TermByTerm(torch.autograd.Function):
    """(1/p) sum_i alpha_i f_i(x), entry by entry: x `(C_out, C_in)`, alpha and omega `(p,)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, alpha: torch.Tensor, omega: torch.Tensor | None, family: type) -> torch.Tensor:
        return family(x, omega).sum(alpha.unbind()).div_(alpha.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        x, alpha, omega, ctx.family = inputs
        ctx.save_for_backward(x, alpha, omega)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, alpha, omega = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_gradients_of_reference((x, alpha, omega), gradient, ctx.family.name), None
        with functional.without_autocast(x.device.type):
            return *ctx.family(x, omega).gradients(alpha.unbind(), gradient / alpha.shape[0]), None


class _Cosine:
    """f_i(x) = cos(omega_i x)."""

    name = "cosine"

    def __init__(self, x: torch.Tensor, omega: torch.Tensor) -> None:
        self.x, self.omega = x, omega.unbind()

    def sum(self, alpha: Sequence[torch.Tensor]) -> torch.Tensor:
        total, term = torch.zeros_like(self.x), torch.empty_like(self.x)
        for a, w in zip(alpha, self.omega, strict=True):
            total.add_(term.copy_(self.x).mul_(w).cos_().mul_(a))
        return total

    def gradients(self, alpha: Sequence[torch.Tensor], gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        slope, term, angle = (torch.zeros_like(self.x) for _ in range(3))
        times_x = gradient * self.x
        by_alpha, by_omega = [], []
        for a, w in zip(alpha, self.omega, strict=True):
            angle.copy_(self.x).mul_(w)
            by_alpha.append(_inner(gradient, term.copy_(angle).cos_()))
            angle.sin_()
            by_omega.append(-a * _inner(times_x, angle))
            slope.sub_(angle.mul_(a * w))
        return slope.mul_(gradient), torch.stack(by_alpha), torch.stack(by_omega)


class _PowerLadder:
    """f_i(x) = x^i, i = 1..p."""

    name = "power"

    def __init__(self, x: torch.Tensor, omega: None) -> None:
        self.x = x

    def sum(self, alpha: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._horner(alpha).mul_(self.x)

    def gradients(self, alpha: Sequence[torch.Tensor], gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slope = self._horner([i * a for i, a in enumerate(alpha, 1)]).mul_(gradient)
        by_alpha, term = [], gradient.clone()
        for _ in alpha:
            by_alpha.append(term.mul_(self.x).sum())
        return slope, torch.stack(by_alpha), None

    def _horner(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """sum_i weights_i x^(i-1)."""
        total = torch.zeros_like(self.x)
        for weight in reversed(weights):
            total.mul_(self.x).add_(weight)
        return total


class _Power:
    """f_i(x) = x max(|x|, smallest)^(omega_i - 1), which is sign(x) |x|^omega_i but next to 0."""

    name = "power"

    def __init__(self, x: torch.Tensor, omega: torch.Tensor) -> None:
        self.x, self.omega = x, omega.unbind()
        self.log = x.abs().clamp(min=SMALLEST_BASE).log_()

    def sum(self, alpha: Sequence[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros_like(self.x)
        for a, factor in zip(alpha, self._factors(), strict=True):
            total.add_(factor.mul_(a))
        return total.mul_(self.x)

    def gradients(self, alpha: Sequence[torch.Tensor], gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        times_x = gradient * self.x
        times_log = times_x * self.log
        # Below the smallest base the function is linear, with the factor itself as its slope.
        steep, flat = torch.zeros_like(self.x), torch.zeros_like(self.x)
        by_alpha, by_omega = [], []
        for a, w, factor in zip(alpha, self.omega, self._factors(), strict=True):
            by_alpha.append(_inner(times_x, factor))
            by_omega.append(a * _inner(times_log, factor))
            flat.add_(factor.mul_(a))
            steep.add_(factor.mul_(w))
        slope = torch.where(self.x.abs() < SMALLEST_BASE, flat, steep)
        return slope.mul_(gradient), torch.stack(by_alpha), torch.stack(by_omega)

    def _factors(self) -> Iterator[torch.Tensor]:
        """base^(omega_i - 1), in a buffer that the next one takes; what it holds may be changed."""
        factor = torch.empty_like(self.x)
        for w in self.omega:
            yield factor.copy_(self.log).mul_(w - 1).exp_()


def _inner(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.dot(first.reshape(-1), second.reshape(-1))


def _gradients_of_reference(
    tensors: Sequence[torch.Tensor | None], gradient: torch.Tensor, function: str = "cosine"
) -> tuple[torch.Tensor | None, ...]:
    """Gradients that have gradients, which training does not need: by autograd through the reference.

    Args:
        tensors: A, B, alpha, omega, or the product x in place of the first two.
    """
    *factors, alpha, omega = tensors
    with torch.enable_grad():
        x = functional.product(*factors) if len(factors) == 2 else factors[0]
        value = functional.weighted_sum(x, alpha, omega, function)
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(value, wanted, gradient, create_graph=True))
    return tuple(next(found) if tensor is not None and tensor.requires_grad else None for tensor in tensors)
