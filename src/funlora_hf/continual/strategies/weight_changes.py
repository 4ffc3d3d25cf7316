"""Changes of one layer's weight: low-rank pairs, ways to join them, and start values of a new pair. Pure maths.

Matrices throughout: a weight `(out, in)`; of a convolution, `in` is input channels times kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional


class Pair(NamedTuple):
    """A change B A of rank r.

    Args:
        A: `(r, in)`.
        B: `(out, r)`.
    """

    A: torch.Tensor
    B: torch.Tensor


def product(pair: Pair) -> torch.Tensor:
    """Return the dense change `B A`, `(out, in)`."""
    return pair.B @ pair.A


def concatenated(old: Pair, new: Pair) -> Pair:
    """Return the pair of rank `r_old + r_new` whose product is the sum of the products. Source: [ours]."""
    return Pair(torch.cat([old.A, new.A]), torch.cat([old.B, new.B], dim=1))


def summed_factors(old: Pair, new: Pair) -> Pair:
    """Return `A_old + A_new` and `B_old + B_new`: their product also has the cross terms `B_old A_new + B_new A_old`.

    Source: arXiv 2410.04891 [code].
    """
    return Pair(old.A + new.A, old.B + new.B)


def truncated(delta: torch.Tensor, rank: int) -> Pair:
    """Return the pair of this rank that is nearest to a dense change in the Frobenius norm.

    Args:
        delta: `(out, in)`.
        rank: r; beyond min(out, in) the pair is filled up with zeros.

    Source: Eckart and Young; its use here is [ours].
    """
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    root = S[:rank].sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    missing = rank - len(root)
    return Pair(functional.pad(A, (0, 0, 0, missing)), functional.pad(B, (0, missing)))


def larger_magnitude(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the change of larger magnitude for each entry; the new one if both are equal.

    Source: MagMax (arXiv 2407.06322), as arXiv 2410.04891 uses it [code].
    """
    return torch.where(new.abs() >= old.abs(), new, old)


def row_space(delta: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the inputs on which the change acts, `(in, R)` with R its numerical rank."""
    _, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    # The tolerance of torch.linalg.matrix_rank, for the precision in which the change was computed.
    tolerance = S[0] * max(delta.shape) * torch.finfo(delta.dtype).eps
    return Vh[tolerance < S].T.to(delta.dtype)


def nullspace_start(gaussian: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return a start for A that is zero on all inputs on which an earlier change acts: `A Q = 0`.

    Args:
        gaussian: G, `(r, in)`.
        basis: Q, `(in, R)`, orthonormal.

    Returns:
        `G (I - Q Q^T)`, rescaled to the Frobenius norm of G, `(r, in)`.

    Raises:
        ValueError: fewer than r dimensions are left.

    Source: [ours].
    """
    rank, inputs = gaussian.shape
    taken = basis.shape[1]
    if taken + rank > inputs:
        raise ValueError(
            f"`orthogonal` is 'nullspace', but earlier tasks take {taken} of {inputs} inputs and `rank` {rank} more are needed: "
            "lower the rank, or take merge='svd', which keeps the rank of what was learned."
        )
    G, Q = gaussian.double(), basis.double()
    # Twice is enough for orthogonality to working precision.
    for _ in range(2):
        G = G - (G @ Q) @ Q.T
    return (G * (gaussian.double().norm() / G.norm())).to(gaussian.dtype)


def rank_space_start(gaussian: torch.Tensor, accumulated: torch.Tensor) -> torch.Tensor:
    """Return a start for A: each column is orthogonal to the same column of an accumulated A, in the r dimensions of rank.

    All columns share one Gaussian direction, without its part along the accumulated column, so most of the result has that
    direction. It is no more orthogonal to the rows of the accumulated A than a random matrix.

    Args:
        gaussian: `(r, in)`, whose norm the result gets and whose first column is the shared direction.
        accumulated: `(r, in)`.

    Returns:
        `(r, in)`; all of it zero where r is 1.

    Source: the released code of arXiv 2410.04891 does this [code]; the shared direction is [ours].
    """
    unit = functional.normalize(accumulated, dim=0)
    direction = gaussian[:, :1]
    columns = direction - unit * (unit * direction).sum(dim=0, keepdim=True)
    if len(gaussian) == 1:
        return torch.zeros_like(gaussian)
    return columns * (gaussian.norm() / columns.norm())
