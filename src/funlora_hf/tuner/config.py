"""FunLoraConfig: the configuration of a FunLoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftConfig
from peft.utils import PeftType

from ..utils.checks import (
    check_at_least_one,
    check_choice,
    check_class_label,
    check_class_name,
    check_fingerprint,
    check_layer_indexes,
    check_names,
    check_started_from,
    check_type,
)
from .functional import FUNCTIONS, FUNCTIONS_WITH_OMEGA, OPERATIONS


@dataclass
class FunLoraConfig(PeftConfig):
    """The configuration of a [`FunLoraModel`].

    Args:
        r (`int`): Rank of the product A B before the functions are applied. The paper always uses 1.
        function (`str`): "cosine", "power", "shift" or "identity" (plain A B, the vanilla baseline).
        num_functions (`int`): p, the number of functions in the sum; "identity" ignores it.
        train_omega (`bool`): Whether the frequencies of "cosine" or the exponents of "power" are learned; otherwise they stay at 1..p
            and are not stored.
        operation (`str`): How the functional matrix F acts on the weight: "mul" (`W * F`), "add" (`W + F`) or "mul-add"
            (`W * F + G`, where G is a second functional matrix with separate factors).
        ratio (`int`): rho: A and B have one entry for every `ratio` neighbouring channels.
        init_weights (`bool`): True: the adapter starts as the identity. False: it starts at random values that are not the identity,
            for tests.
        target_modules (`Union[list[str], str]`, *optional*): Names of modules to adapt, or a regex. Conv2d and Linear are supported.
            "all-conv" means every Conv2d. None means the paper's selection, the middle of the decoder, on a `UNet2DModel` or
            `UNet2DConditionModel`; `select_layers` returns other selections.
        exclude_modules (`Union[list[str], str]`, *optional*): Names of modules not to adapt, or a regex.
        modules_to_save (`list[str]`, *optional*): Modules besides the adapter that are trained and saved completely.
        layers_to_transform (`Union[list[int], int]`, *optional*): Layer indexes to adapt, if `target_modules` is a list.
        layers_pattern (`Union[list[str], str]`, *optional*): Name of the `nn.ModuleList` that the indexes refer to, if
            `layers_to_transform` is given.
        class_embedding (`str`, *optional*): Name of an `nn.Embedding`. The adapter replaces its output by one learned vector, for
            every label, so that a base with two classes can serve a thousand. On a `UNet2DModel`: "class_embedding".
        class_label (`int`, *optional*): Id of the class that the adapter generates.
        class_name (`str`, *optional*): Name of this class.
        base_fingerprint (`dict[str, str]`, *optional*): Precision in which the base is loaded -> SHA-256 of the base that the adapter
            was trained for, as `base_fingerprints` returns it. An adapter with a fingerprint loads onto no other base. Source: [ours].
        started_from (`dict[str, str]`, *optional*): Names of the adapters at whose mean the adapter started -> SHA-256 of their files,
            as `start_from` sets it; None: it started cold. Source: [ours].

    Raises:
        ValueError: an unknown function or operation, a number out of range or a value of the wrong type; it names the field.

    Source: arXiv 2510.02631 for r, function, num_functions, operation and ratio [text].
    """

    r: int = 1
    function: str = "cosine"
    num_functions: int = 10
    train_omega: bool = True
    operation: str = "mul"
    ratio: int = 1
    init_weights: bool = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    class_embedding: str | None = None
    class_label: int | None = None
    class_name: str | None = None
    base_fingerprint: dict[str, str] | None = None
    started_from: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("FUNLORA")
        for name in ("r", "num_functions", "ratio"):
            check_at_least_one(name, getattr(self, name))
        check_choice("function", self.function, FUNCTIONS)
        check_choice("operation", self.operation, OPERATIONS)
        for name in ("train_omega", "init_weights"):
            check_type(name, getattr(self, name), bool, "True or False")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_names(name, getattr(self, name), single=True)
        check_names("modules_to_save", self.modules_to_save, single=False)
        for name in ("class_embedding", "class_name", "base_model_name_or_path", "revision"):
            check_type(name, getattr(self, name), str | None, "text or None")
        check_class_name(self.class_name)
        check_layer_indexes(self.layers_to_transform)
        check_class_label(self.class_label)
        check_fingerprint(self.base_fingerprint)
        check_started_from(self.started_from)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    @property
    def learns_omega(self) -> bool:
        """Whether the adapter learns and stores omega."""
        return self.train_omega and self.function in FUNCTIONS_WITH_OMEGA

    def to_dict(self) -> dict:
        """Return the configuration as a dictionary, with sets as sorted lists: equal adapters give equal files."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
