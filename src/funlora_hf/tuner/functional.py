"""The maths of FunLoRA: function families, the functional matrix F, its start, its use on a weight.

Pure functions of tensors. Knows nothing of PEFT, of modules or of training.

Marks: [exact] reproduces a printed figure of the paper (arXiv 2510.02631), [text] stands in its prose, [ours] is our
reading where the paper is silent.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch

from .tensor_checks import shortened


FUNCTIONS = ("cosine", "power", "shift", "identity")
FUNCTIONS_WITH_OMEGA = ("cosine", "power")
OPERATIONS = ("mul", "add", "mul-add")

# Below this magnitude |x|^omega is continued linearly, so that its gradient stays finite at x = 0 for every omega.
SMALLEST_BASE = 1e-6
LARGEST_OMEGA = {"cosine": 1000.0, "power": 32.0}
SMALLEST_EXPONENT = -4.0


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that names the field, the value and what was expected, unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{field}` is {value!r}, expected one of: {', '.join(map(repr, choices))}.")


def functional_matrix(
    A: torch.Tensor,
    B: torch.Tensor,
    alpha: torch.Tensor | None = None,
    omega: torch.Tensor | None = None,
    *,
    function: str = "cosine",
) -> torch.Tensor:
    """F = (1/p) * sum_i alpha_i * f_i(A, B); `identity` is F = A B without alpha and sum.

    | function   | f_i(A, B)                                                        |
    |------------|------------------------------------------------------------------|
    | `cosine`   | cos(omega_i * A B), elementwise                                    |
    | `power`    | (A B)^i, elementwise; with `omega`: sign(A B) * abs(A B)^omega_i    |
    | `shift`    | roll(A, i, dims=0) roll(B, i, dims=1), i = 0..p-1                  |
    | `identity` | A B                                                              |

    Computed in float32 at least, also under autocast: cos of a large argument loses everything in bfloat16. float64
    stays float64. `omega_range` tells how far omega may go. A weight in float16 ends at 65504, whatever F is.

    Args:
        A: `(C_out, r)`, real.
        B: `(r, C_in)`, real.
        alpha: `(p,)`, the weights of the p functions. Required, except for `identity`, which has none.
        omega: `(p,)`, frequencies of `cosine` or exponents of `power`; None means 1..p (for `power` the plain integer
            powers). `shift` and `identity` have none.
        function: one of "cosine", "power", "shift", "identity".

    Returns:
        F, `(C_out, C_in)`, float32 or float64.

    Raises:
        ValueError: unknown function, an argument that the function lacks or does not take, or shapes that do not fit.

    Source: arXiv 2510.02631, the functional matrix [text]; the range of the shift and omega = 1..p are [ours].
    """
    check_choice("function", function, FUNCTIONS)
    check_factors(A, B)
    check_coefficients(alpha, omega, function)

    with without_autocast(A.device.type):
        A, B, alpha, omega = (at_least_float32(tensor) for tensor in (A, B, alpha, omega))
        if function == "identity":
            return product(A, B)
        if function == "shift":
            return _shift(A, B, alpha)
        return weighted_sum(product(A, B), alpha, omega, function)


def initial_alpha(
    function: str, num_functions: int, operation: str = "mul", omega: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The alpha with which an adapter whose A B is 1 everywhere starts as the identity.

    `alpha_0 = p * e * v / ||v||^2` with `v_i = f_i(1, 1)` and e = 1 for "mul" and for the multiplying part of
    "mul-add", e = 0 for "add": the alpha of least norm that gives F = e. It is 1 for `shift` and `power`, as in the
    paper. For the added part of "mul-add", call it with "add".

    Args:
        function: one of "cosine", "power", "shift", "identity".
        num_functions: p >= 1.
        operation: "mul", "add" or "mul-add".
        omega: `(p,)`, None means 1..p.

    Returns:
        alpha, `(p,)`, float32 (float64 for a float64 omega); None for `identity`, which has no alpha.

    Raises:
        ValueError: unknown function or operation, p < 1, an omega of another length, or an omega for which every
            f_i(1, 1) vanishes, so that no alpha gives the identity.

    Source: [ours]; the paper starts A and B at one and says that this preserves the identity, which for `cosine` with
    alpha = 1 it does not (F = -0.14).
    """
    check_choice("function", function, FUNCTIONS)
    check_choice("operation", operation, OPERATIONS)
    check_at_least_one("num_functions", num_functions)
    if function == "identity":
        return None
    if omega is not None and omega.shape != (num_functions,):
        raise ValueError(f"`omega` has shape {tuple(omega.shape)}, expected ({num_functions},): one entry a function.")
    dtype = torch.float32 if omega is None else torch.promote_types(omega.dtype, torch.float32)
    if operation == "add":
        return torch.zeros(num_functions, dtype=dtype)
    # In Python's floats, since under `with torch.device("meta")` a tensor holds no values.
    values = [1.0] * num_functions
    if function == "cosine":
        frequencies = range(1, num_functions + 1) if omega is None else omega.tolist()
        values = [math.cos(frequency) for frequency in frequencies]
    squared_norm = sum(value * value for value in values)
    if squared_norm < 1e-12:
        raise ValueError(f"`omega` is {omega}: cos(omega) vanishes for every entry, so no alpha gives the identity.")
    return torch.tensor([num_functions * value / squared_norm for value in values], dtype=dtype)


def default_omega(num_functions: int, like: torch.Tensor | None = None) -> torch.Tensor:
    """omega = 1..p, `(p,)`, float32 or as the tensor `like`. Source: [text] for `power`, [ours] for `cosine`."""
    made = {"dtype": torch.float32} if like is None else {"dtype": like.dtype, "device": like.device}
    return torch.arange(1, num_functions + 1, **made)


def omega_range(function: str, num_functions: int) -> tuple[float, float]:
    """The least and the largest omega at which float32 still gives the function.

    `cosine`: up to 1000 of either sign, where rounding its argument costs an error of some 1e-4. `power`: from -4, below which
    the slope at zero overflows, up to 32, at which 10 to its power has still a gradient; or up to 2p, since it starts at 1..p.

    Args:
        function: "cosine" or "power".
        num_functions: p.

    Source: [ours].
    """
    largest = max(LARGEST_OMEGA[function], 2.0 * num_functions)
    return (-largest if function == "cosine" else SMALLEST_EXPONENT), largest


def reduced_size(channels: int, ratio: int) -> int:
    """Entries that a factor keeps for `channels` at the reduction `ratio`: rounded up. Source: Table IV [exact]."""
    # In integers: a ratio may be larger than any float.
    return -(-channels // ratio)


def expand(F: torch.Tensor, ratio: int, shape: torch.Size) -> torch.Tensor:
    """Repeat every entry of a reduced F for `ratio` neighbouring channels and broadcast it over the kernel.

    Args:
        F: `(ceil(C_out / ratio), ceil(C_in / ratio))`.
        ratio: >= 1.
        shape: of the weight, `(C_out, C_in, ...)`.

    Returns:
        `(C_out, C_in, 1, ...)`, with as many trailing ones as the weight has kernel dimensions.

    Source: Table IV [exact] for the counts; which channels share an entry is [ours].
    """
    if ratio > 1:
        # No more copies of an entry than there are channels, however large the ratio is.
        rows, columns = (min(ratio, size) for size in shape[:2])
        F = F.repeat_interleave(rows, dim=0)[: shape[0]].repeat_interleave(columns, dim=1)[:, : shape[1]]
    return F.reshape(*F.shape, *(1 for _ in shape[2:]))


def numerical_rank(F: torch.Tensor, tol: float | None = None) -> int:
    """How many singular values of a matrix are above a tolerance; they are computed in float64, on the CPU.

    Args:
        F: `(m, n)`, of a floating dtype, finite.
        tol: absolute, >= 0. None means `max(m, n) * eps * sigma_max`, with the machine epsilon of F's own dtype and its
            largest singular value: what numpy and torch take. F of a float32 adapter is float32; cast to float64 before, its
            rounding errors would count as rank.

    Returns:
        The rank, between 0 and min(m, n).

    Raises:
        ValueError: not a finite floating matrix, or a negative tolerance.

    Source: arXiv 2510.02631, Figure 4 [text]; the paper does not say which tolerance it takes, so this one is [ours].
    """
    if F.dim() != 2 or not F.is_floating_point():
        raise ValueError(
            f"`F` is {F.dtype} of shape {tuple(F.shape)}, expected a floating matrix: pass what `functional_matrix` returns."
        )
    if tol is not None and not tol >= 0:
        raise ValueError(f"`tol` is {tol!r}, expected a number >= 0, or None for that of F's dtype.")
    if not torch.isfinite(F).all():
        raise ValueError(
            "`F` has entries that are not finite, so it has no rank: check the adapter that it comes from."
        )
    relative = max(F.shape) * torch.finfo(F.dtype).eps if tol is None else 0.0
    # Not every device has float64.
    matrix = F.detach().to("cpu", torch.float64)
    return int(torch.linalg.matrix_rank(matrix, atol=tol or 0.0, rtol=relative))


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast switched off; on the meta device, on which shapes are inferred, there is none."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def check_at_least_one(field: str, value: object) -> None:
    """Raise a ValueError that names the field and the value, unless `value` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        shown = shortened(repr(value), 100)
        raise ValueError(f"`{field}` should be a positive integer value but the value passed is {shown}.")


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return A * B if A.shape[1] == 1 else A @ B


def weighted_sum(x: torch.Tensor, alpha: torch.Tensor, omega: torch.Tensor | None, function: str) -> torch.Tensor:
    """(1/p) sum_i alpha_i f_i(x) of `cosine` or `power`: x `(C_out, C_in)`, alpha and omega `(p,)` -> `(C_out, C_in)`."""
    terms = _cosine_terms(x, alpha, omega) if function == "cosine" else _power_terms(x, alpha, omega)
    return torch.tensordot(alpha, terms, dims=1) / alpha.numel()


def _shift(A: torch.Tensor, B: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    p = alpha.numel()
    left = torch.cat([alpha[i] * A.roll(i, dims=0) for i in range(p)], dim=1)
    right = torch.cat([B.roll(i, dims=1) for i in range(p)], dim=0)
    return left @ right / p


def _cosine_terms(product: torch.Tensor, alpha: torch.Tensor, omega: torch.Tensor | None) -> torch.Tensor:
    if omega is None:
        omega = default_omega(alpha.numel(), like=product)
    return torch.cos(omega[:, None, None] * product)


def _power_terms(product: torch.Tensor, alpha: torch.Tensor, omega: torch.Tensor | None) -> torch.Tensor:
    if omega is None:
        return torch.stack([product**i for i in range(1, alpha.numel() + 1)])
    base = product.abs().clamp(min=SMALLEST_BASE)
    return product * base ** (omega[:, None, None] - 1)


def at_least_float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_factors(A: torch.Tensor, B: torch.Tensor) -> None:
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != B.shape[0]:
        raise ValueError(
            f"`A` has shape {tuple(A.shape)} and `B` {tuple(B.shape)}, expected (C_out, r) and (r, C_in) with one r."
        )


def check_coefficients(alpha: torch.Tensor | None, omega: torch.Tensor | None, function: str) -> None:
    if (alpha is None) != (function == "identity"):
        remedy = "leave it out" if function == "identity" else "pass a tensor of shape (p,), see `initial_alpha`"
        raise ValueError(f"`alpha` is {'None' if alpha is None else 'given'} for function={function!r}: {remedy}.")
    if alpha is not None and (alpha.dim() != 1 or alpha.numel() == 0):
        raise ValueError(f"`alpha` has shape {tuple(alpha.shape)}, expected (p,) with p >= 1.")
    if omega is None:
        return
    if function not in FUNCTIONS_WITH_OMEGA:
        raise ValueError(f"`omega` is given, but function={function!r} has none: leave it out.")
    if omega.shape != alpha.shape:
        raise ValueError(f"`omega` has shape {tuple(omega.shape)}, expected that of `alpha`, {tuple(alpha.shape)}.")
