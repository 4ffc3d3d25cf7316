"""The strategies that `--strategy` names."""

from __future__ import annotations

from ..strategy import Strategy
from .ddgr import Ddgr
from .diffclass import DiffClass
from .finetune import Finetune
from .funlora import Frozen, FunLora
from .guide import Guide
from .jdcl import Jdcl
from .joint import Joint
from .low_rank import MagMax, MergeInit, MergeOrthogonal, NaiveLora
from .plug_ins import find_strategy
from .replay import Replay


_CLASSES: tuple[type[Strategy], ...] = (
    FunLora,
    Frozen,
    Joint,
    Finetune,
    NaiveLora,
    MergeInit,
    MergeOrthogonal,
    MagMax,
    Replay,
    Ddgr,
    Guide,
    Jdcl,
    DiffClass,
)
STRATEGIES: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in _CLASSES}


def strategy_class(name: str) -> type[Strategy]:
    """Return the strategy of a name, maybe of another package. Raises a ValueError that lists the known names."""
    return find_strategy(name, STRATEGIES, Strategy)
