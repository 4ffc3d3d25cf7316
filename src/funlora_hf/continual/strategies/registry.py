"""The strategies that `--strategy` names."""

from __future__ import annotations

from collections.abc import Iterable

from ..strategy import Strategy
from .ddgr import Ddgr
from .diffclass import DiffClass
from .diffclass_pretrained import DiffClassPretrained
from .ewc import Ewc
from .finetune import Finetune
from .funlora import Frozen, FunLora
from .guide import Guide
from .hft import Hft
from .jdcl import Jdcl
from .joint import Joint
from .l2 import L2
from .low_rank import CLora, IncLora, MagMax, MergeInit, MergeOrthogonal, NaiveLora, OLora
from .mofo import Mofo
from .plug_ins import find_strategy
from .replay import Replay


_CLASSES: tuple[type[Strategy], ...] = (
    FunLora,
    Frozen,
    Joint,
    Finetune,
    L2,
    Ewc,
    Hft,
    Mofo,
    NaiveLora,
    MergeInit,
    MergeOrthogonal,
    MagMax,
    *(IncLora, OLora, CLora),
    Replay,
    Ddgr,
    Guide,
    Jdcl,
    DiffClass,
)
# By strategy and option: another form, which a run takes if the option is given.
_FORMS: dict[str, dict[str, type[Strategy]]] = {DiffClassPretrained.name: {"pretrained": DiffClassPretrained}}
STRATEGIES: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in _CLASSES}


def strategy_class(name: str, options: Iterable[str] | None = None) -> type[Strategy]:
    """Return the strategy of a name, maybe of another package, in the form that the names of its options choose.

    Raises:
        ValueError: an unknown name, with the known ones; or see `find_strategy`.
    """
    forms = _FORMS.get(name, {})
    return next(
        (forms[option] for option in options or () if option in forms), find_strategy(name, STRATEGIES, Strategy)
    )
