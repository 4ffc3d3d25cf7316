"""FunLoraConfig: what a FunLoRA adapter is made of. Knows nothing of models or layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import UnionType

from peft import PeftConfig
from peft.utils import PeftType

from .functional import FUNCTIONS, FUNCTIONS_WITH_OMEGA, OPERATIONS, check_at_least_one, check_choice
from .tensor_checks import shortened


# Precisions that bases are loaded in.
FINGERPRINT_DTYPES = ("float32", "bfloat16", "float16")
_SHA256 = re.compile("[0-9a-f]{64}")
MOST_NAME_CHARACTERS = 1000


@dataclass
class FunLoraConfig(PeftConfig):
    """
    The configuration of a [`FunLoraModel`].

    Args:
        r (`int`):
            Rank of the product A B before the functions are applied. The paper uses 1 throughout.
        function (`str`):
            "cosine", "power", "shift" or "identity" (plain A B, the vanilla baseline).
        num_functions (`int`):
            p, the number of functions summed up; "identity" ignores it.
        train_omega (`bool`):
            Whether the frequencies of "cosine" or the exponents of "power" are learned; else they stay at 1..p and
            are not stored.
        operation (`str`):
            How the functional matrix F acts on the weight: "mul" (`W * F`), "add" (`W + F`) or "mul-add"
            (`W * F + G` with a second functional matrix G of its own factors).
        ratio (`int`):
            rho: A and B keep one entry for `ratio` neighbouring channels.
        init_weights (`bool`):
            True: the adapter starts as the identity. False: a random start that is not the identity, for tests.
        target_modules (`Union[list[str], str]`, *optional*):
            Names of modules to adapt, or a regex. Conv2d and Linear are supported. "all-conv" means every Conv2d.
            None means the paper's selection, the middle of the decoder, on a `UNet2DModel` or `UNet2DConditionModel`;
            `select_layers` gives others.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Names of modules not to adapt, or a regex.
        modules_to_save (`list[str]`, *optional*):
            Modules besides the adapter that are trained and saved whole.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            Layer indexes to adapt, if `target_modules` is a list.
        layers_pattern (`Union[list[str], str]`, *optional*):
            Name of the `nn.ModuleList` that the indexes count, if `layers_to_transform` is given.
        class_embedding (`str`, *optional*):
            Name of an `nn.Embedding` whose output the adapter replaces by a learned vector of its own, whatever the
            label: so a base that knows two classes can serve a thousand. On a `UNet2DModel`: "class_embedding".
        class_label (`int`, *optional*):
            Id of the class that the adapter generates.
        class_name (`str`, *optional*):
            Its name.
        base_fingerprint (`dict[str, str]`, *optional*):
            SHA-256 of the base that the adapter was trained for, by the precision that it is loaded in: what
            `base_fingerprints` returns. An adapter that has it loads onto no other base. Source: [ours].

    Raises:
        ValueError: for an unknown function or operation, for numbers out of range and for fields of another type, naming
            the field.

    Source: arXiv 2510.02631 for r, function, num_functions, operation and ratio [text].
    """

    r: int = field(default=1, metadata={"help": "Rank of the product A B before the functions are applied."})
    function: str = field(default="cosine", metadata={"help": "'cosine', 'power', 'shift' or 'identity'."})
    num_functions: int = field(default=10, metadata={"help": "The number p of functions summed up."})
    train_omega: bool = field(default=True, metadata={"help": "Learn the frequencies or exponents."})
    operation: str = field(default="mul", metadata={"help": "'mul', 'add' or 'mul-add'."})
    ratio: int = field(default=1, metadata={"help": "One entry of A and B for this many neighbouring channels."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the identity (True) or at random (False)."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to adapt: list, regex, 'all-conv', or None for the middle of a U-Net's decoder."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules, or a regex, not to adapt."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules besides the adapter that are trained and saved whole."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer indexes to adapt, if target_modules is a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the nn.ModuleList that layers_to_transform counts."}
    )
    class_embedding: str | None = field(
        default=None, metadata={"help": "nn.Embedding whose output the adapter's own class vector replaces."}
    )
    class_label: int | None = field(default=None, metadata={"help": "Id of the class that the adapter generates."})
    class_name: str | None = field(default=None, metadata={"help": "Name of the class that the adapter generates."})
    base_fingerprint: dict[str, str] | None = field(
        default=None, metadata={"help": "SHA-256 of the base that the adapter was trained for, by precision."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FUNLORA
        check_at_least_one("r", self.r)
        check_at_least_one("num_functions", self.num_functions)
        check_at_least_one("ratio", self.ratio)
        check_choice("function", self.function, FUNCTIONS)
        check_choice("operation", self.operation, OPERATIONS)
        for name in ("train_omega", "init_weights"):
            _check_type(name, getattr(self, name), bool, "True or False")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            _check_names(name, getattr(self, name), single=True)
        _check_names("modules_to_save", self.modules_to_save, single=False)
        for name in ("class_embedding", "class_name", "base_model_name_or_path", "revision"):
            _check_type(name, getattr(self, name), str | None, "text or None")
        check_class_name(self.class_name)
        _check_layer_indexes(self.layers_to_transform)
        check_class_label(self.class_label)
        _check_fingerprint(self.base_fingerprint)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    @property
    def learns_omega(self) -> bool:
        """Whether the adapter holds an omega of its own."""
        return self.train_omega and self.function in FUNCTIONS_WITH_OMEGA

    def to_dict(self) -> dict:
        """The configuration as a dictionary; sets come sorted, so that equal adapters give equal files."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


def _check_type(name: str, value: object, expected: type | UnionType, text: str) -> None:
    if not isinstance(value, expected):
        raise ValueError(f"`{name}` is {value!r}, expected {text}.")


def _check_names(name: str, value: object, *, single: bool) -> None:
    if value is None or (single and isinstance(value, str)):
        return
    listed = isinstance(value, (Sequence, Set)) and not isinstance(value, str)
    if not listed or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"`{name}` is {value!r}, expected {'a regex, ' if single else ''}a list of names, or None.")


def check_class_label(value: object) -> None:
    """Raise a ValueError unless the id of a class is an integer that torch can hold, from 0 on, or None."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63):
        shown = shortened(repr(value), 100)
        raise ValueError(f"`class_label` is {shown}, expected an id from 0 to 2**63 - 1, or None.")


def check_class_name(value: str | None) -> None:
    """Raise a ValueError unless the name of a class is text of moderate length that can be written, or None."""
    if value is None:
        return
    if len(value) > MOST_NAME_CHARACTERS:
        problem = f"of {len(value)} characters"
    elif any("\ud800" <= character <= "\udfff" for character in value):
        problem = "with half a surrogate pair in it"
    else:
        return
    raise ValueError(
        f"`class_name` is {shortened(repr(value), 100)}, {problem}, expected text of {MOST_NAME_CHARACTERS} characters at most."
    )


def _check_layer_indexes(value: object) -> None:
    entries = value if isinstance(value, (Sequence, Set)) and not isinstance(value, str) else [value]
    if value is not None and not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
        raise ValueError(f"`layers_to_transform` is {value!r}, expected an index, a list of them, or None.")


def _check_fingerprint(value: object) -> None:
    if value is None:
        return
    if (
        not isinstance(value, Mapping)
        or not value
        or not all(
            key in FINGERPRINT_DTYPES and isinstance(entry, str) and _SHA256.fullmatch(entry)
            for key, entry in value.items()
        )
    ):
        raise ValueError(
            f"`base_fingerprint` is {value!r}, expected 64 hexadecimal digits for each of "
            f"{', '.join(map(repr, FINGERPRINT_DTYPES))}, or None: see `base_fingerprints`."
        )
