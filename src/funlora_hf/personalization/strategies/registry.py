"""The strategies of concepts that `--strategy` names."""

from __future__ import annotations

from ...continual.strategies.plug_ins import find_strategy
from .all_weights import L2, Ewc, Finetune, Hft, Mofo
from .base import ConceptStrategy
from .c_lora import CLora
from .cidm import Cidm
from .cns import Cns
from .custom_diffusion import CustomDiffusion
from .mix_of_show import MixOfShow
from .one_model import IncLora, Joint, MagMax, MergeInit, MergeOrthogonal, NaiveLora, OLora
from .orthogonal_adaptation import OrthogonalAdaptation
from .per_concept import FunLora, Lora, TextualInversion
from .replay import Replay


_CLASSES: tuple[type[ConceptStrategy], ...] = (
    *(FunLora, Lora, TextualInversion),
    *(NaiveLora, MergeInit, MergeOrthogonal, MagMax, Joint),
    *(Finetune, L2, Ewc, Hft, Mofo),
    *(IncLora, OLora),
    *(CustomDiffusion, CLora, OrthogonalAdaptation, Cns),
    Replay,
    MixOfShow,
    Cidm,
)
CONCEPT_STRATEGIES: dict[str, type[ConceptStrategy]] = {strategy.name: strategy for strategy in _CLASSES}


def concept_strategy(name: str) -> type[ConceptStrategy]:
    """Return the strategy of a name, maybe of another package. Raises a ValueError that lists the known names."""
    return find_strategy(name, CONCEPT_STRATEGIES, ConceptStrategy)
