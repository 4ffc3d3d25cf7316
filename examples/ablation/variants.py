"""Which runs the paper's tables take, as changes to one reference run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


REFERENCE = "funlora"


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Args:
        key: names its folder; equal keys are one run, in all tables.
        label: in the table.
        changes: argument of `continual_train.py` -> value, where it differs from the reference.
        rate_of: key of the variant whose learning rate it takes; None: one is chosen for it.
        reuses_adapters: sample the reference's adapters in another way instead of training new ones.
        needs: key of a variant that has to be finished first, whose adapters tell the layers' importance; its layers
            are then chosen by importance, for as many numbers per class as the reference has.
    """

    key: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    rate_of: str | None = None
    reuses_adapters: bool = False
    needs: str | None = None


def _layers(key: str, label: str, targets: str) -> Variant:
    return Variant(key, label, {"target_modules": [targets]}, rate_of=REFERENCE)


def _ratio(ratio: int) -> Variant:
    return Variant(f"ratio_{ratio}", f"ratio {ratio}", {"ratio": ratio}, rate_of=REFERENCE)


def _method(name: str, label: str, **changes: Any) -> Variant:
    suffix = f"_r{changes['rank']}" if "rank" in changes else ""
    return Variant(name + suffix, label, {"peft_method": name, **changes})


def _solver(name: str, steps: int) -> Variant:
    label = name if name == "dopri5" else f"{name}, {steps} steps"
    changes = {"solver": name, "num_inference_steps": steps}
    return Variant(f"{name}_{steps}", label, changes, rate_of=REFERENCE, reuses_adapters=True)


_COSINE = Variant(REFERENCE, "cosine, learned omega")
_IDENTITY = _method("vanilla_mul", "identity (vanilla mul)")
_IDENTITY_EVERYWHERE = Variant(
    "vanilla_mul_all",
    "all, identity",
    {"peft_method": "vanilla_mul", "target_modules": ["all"]},
    rate_of="vanilla_mul",
)

TABLES: dict[str, tuple[Variant, ...]] = {
    # Table II
    "functions": (
        _COSINE,
        Variant("cosine_frozen", "cosine, frozen omega", {"train_omega": False}),
        Variant("power_learned", "power, learned omega", {"function": "power"}),
        Variant("power_frozen", "power, frozen omega", {"function": "power", "train_omega": False}),
        Variant("shift", "shift", {"function": "shift"}),
        _IDENTITY,
    ),
    "operations": (
        Variant(REFERENCE, "mul"),
        Variant("add", "add", {"operation": "add"}),
        Variant("mul_add", "mul-add", {"operation": "mul-add"}),
    ),
    # Table IV
    "ratio": (Variant(REFERENCE, "ratio 1"), *(_ratio(ratio) for ratio in (2, 4, 8, 16))),
    # Table I, by parts that every U-Net has
    "layers": (
        Variant(REFERENCE, "decoder-middle"),
        _layers("layers_all", "all", "all"),
        _layers("layers_decoder", "decoder", "decoder"),
        Variant("layers_important", "most important", rate_of=REFERENCE, needs="vanilla_mul_all"),
        _IDENTITY_EVERYWHERE,
    ),
    # Table V
    "rivals": (
        Variant(REFERENCE, "FunLoRA cosine"),
        _method("class_vector", "class vector only"),
        _method("vanilla_add", "vanilla add, r = 1"),
        _method("vanilla_add", "vanilla add, r = 2", rank=2),
        Variant("vanilla_mul", "vanilla mul, r = 1", _IDENTITY.changes),
        _method("vanilla_mul", "vanilla mul, r = 2", rank=2),
        _method("scale_shift", "scale and shift"),
        _method("lora_attention", "LoRA on attention, r = 2"),
        _method("lora_attention_fused", "LoRA on fused attention, r = 2"),
        _method("lora_conv_v1", "LoRA Conv2d v1"),
        _method("lora_conv_v2", "LoRA Conv2d v2"),
    ),
    "solvers": (
        Variant(REFERENCE, "as trained"),
        *(_solver("euler", steps) for steps in (2, 4, 12)),
        *(_solver("heun", steps) for steps in (1, 2)),
        *(_solver("rk4", steps) for steps in (1, 3)),
        _solver("dopri5", 1),
    ),
}


def variants_of(tables: Iterable[str], keys: Iterable[str] | None = None) -> list[Variant]:
    """Every run that these tables take, once, the reference and what others need first.

    Args:
        tables: names of tables.
        keys: of the only variants wanted; None: all that the tables have.

    Raises:
        ValueError: an unknown table, or a key that none of the tables has.
    """
    unknown = sorted(set(tables) - set(TABLES))
    if unknown:
        raise ValueError(
            f"`tables` has {', '.join(map(repr, unknown))}, expected some of: {', '.join(map(repr, TABLES))}."
        )
    by_key = {variant.key: variant for name in tables for variant in TABLES[name]}
    if keys is not None:
        missing = sorted(set(keys) - set(by_key))
        if missing:
            raise ValueError(
                f"`variants` has {', '.join(map(repr, missing))}, expected some of: {', '.join(map(repr, by_key))}."
            )
        by_key = {key: by_key[key] for key in keys}
    every = {variant.key: variant for table in TABLES.values() for variant in table}
    by_key.setdefault(REFERENCE, every[REFERENCE])
    waiting = list(by_key.values())
    while waiting:
        variant = waiting.pop()
        for key in (variant.needs, variant.rate_of):
            if key is not None and key not in by_key:
                by_key[key] = every[key]
                waiting.append(every[key])
    return sorted(by_key.values(), key=lambda variant: (variant.needs is not None, variant.key != REFERENCE))
