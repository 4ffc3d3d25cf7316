"""Custom Diffusion: the projections of the text are trained in full, concept after concept, or apart and merged in closed form.

Source: arXiv 2212.04488; what is trained, captions for the merge and its form as in the authors' code [code].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from ...continual.strategies.merging_rules import Kept, RuleOptions, only
from ...utils.field_types import one_of
from ..usual_captions import usual_captions
from .base import ConceptSetting
from .one_model import FullWeights


# Of the diagonal's mean, in float64: 200 short captions span less than all of the text's states.
RIDGE = 1e-6


@dataclass
class CustomDiffusionOptions(RuleOptions):
    """
    Args:
        merge: "sequential": each task continues the weights of the task before [ours]; "constrained": each starts from the base, and
            the changes are merged in closed form [code], for which all of them are kept. Where states of concepts are nearly dependent, as
            in the 64 dimensions of the tiny base, the merged change is far larger than each: see `change_norms` in results.json.
    """

    merge: Annotated[str, one_of("sequential", "constrained")] = "sequential"


class CustomDiffusion(FullWeights):
    """Trains `to_k` and `to_v` of cross-attention, and the row of the token."""

    name, options_class = "custom_diffusion", CustomDiffusionOptions

    def __init__(self, setting: ConceptSetting) -> None:
        super().__init__(setting)
        self.constrained = self.options.merge == "constrained"
        self.grows_with_tasks = self.constrained

    def check(self) -> None:
        super().check()
        if self.constrained:
            self.check_reads_text()

    def training_deltas(self, kept: Kept) -> Mapping[str, torch.Tensor]:
        return {} if self.constrained else self.deltas(kept)

    def learned(self, kept: Kept) -> dict[str, torch.Tensor]:
        changes = self.changes()
        if not self.constrained:
            return {f"{name}/delta": change for name, change in changes.items()}
        number = sum(name.startswith(f"{next(iter(changes))}/own_") for name in kept)
        own = {name: one for name, one in kept.items() if "/own_" in name}
        own |= {f"{name}/own_{number}": change for name, change in changes.items()}
        return {**own, **{f"{name}/delta": one for name, one in self._merged(own, number + 1).items()}}

    def details(self) -> dict[str, Any]:
        """Return the Frobenius norms of each task's own change and of the merged one, all layers together; for "constrained" only."""
        if not self.constrained:
            return {}
        kept, names = self.load(self.setting.tasks), [f"own_{task.index}" for task in self.setting.tasks]
        changes = {name: only(kept, name).values() for name in (*names, "delta")}
        norms = [torch.cat([one.flatten() for one in of_layers]).norm().item() for of_layers in changes.values()]
        return {"change_norms": {"own": norms[:-1], "merged": norms[-1]}}

    @torch.no_grad()
    def _merged(self, own: Kept, tasks: int) -> dict[str, torch.Tensor]:
        """Return the merged change of each layer, from the changes of so many tasks."""
        regular = torch.cat([self.states(text) for text in usual_captions(tiny=self.setting.is_tiny)])
        learned = [self.setting.concepts[task.class_ids[0]] for task in self.setting.tasks[:tasks]]
        targets = [
            torch.cat(
                [self.states(text) for text in (f"{one.token} {one.noun}", f"a photo of {one.token} {one.noun}")]
            )
            for one in learned
        ]
        changes = {}
        for name, original in self._originals.items():
            base = original.to(self.setting.device).double()
            values = [(base + only(own, f"own_{i}")[name].double()) @ states.T for i, states in enumerate(targets)]
            merged = constrained_merge(base, regular, torch.cat(targets), torch.cat(values, dim=1))
            changes[name] = (merged - base).float()
        return changes


def constrained_merge(
    base: torch.Tensor, regular: torch.Tensor, targets: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Return the weight that changes least on usual states, and gives the wanted values for those of the concepts.

    Args:
        base: W0, `(out, in)`, float64.
        regular: states of usual captions, `(n, in)`.
        targets: C, states of the concepts' prompts, `(m, in)`; equal ones are taken once.
        values: V, what their own weights give for them, `(out, m)`.

    Returns:
        `W0 + (V - W0 C^T) (D C^T)^-1 D` with `D = C (R^T R)^-1`, `(out, in)`: `W C^T = V`.

    Source: arXiv 2212.04488, appendix [code]; float64 and a ridge of 1e-6 of the mean diagonal are [ours].
    """
    _, inverse = torch.unique(targets, dim=0, return_inverse=True)
    first = torch.stack([(inverse == one).nonzero()[0, 0] for one in range(int(inverse.max()) + 1)]).sort().values
    targets, values = targets[first], values[:, first]
    gram = regular.T @ regular
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    D = torch.linalg.solve(gram, targets.T).T
    # C is of full rank only if no state follows from others: the pseudo-inverse takes the rest.
    return base + (values - base @ targets.T) @ torch.linalg.pinv(D @ targets.T, hermitian=True) @ D
