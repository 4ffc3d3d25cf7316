"""PEFT's own generic tests, run with FunLoraConfig: they come from the sources of the peft that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from fnmatch import fnmatch
from functools import partial
from itertools import product
from typing import Any

import huggingface_hub.constants
import peft
import pytest
import torch
from diffusers import UNet2DModel
from peft_suite import SuiteUnavailable, adopt, import_suite
from torch import nn
from torch.utils.checkpoint import checkpoint

from funlora_hf import FunLoraConfig
from funlora_hf.tuner.functional import FUNCTIONS, OPERATIONS


try:
    custom_models, common, configs, low_level, tuner_base, utilities = import_suite(
        "test_custom_models",
        "testing_common",
        "test_config",
        "test_low_level_api",
        "test_tuners_utils",
        "testing_utils",
    )
except SuiteUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of much that its tests do on purpose

METHODS = {f"{f}-{o}": {"function": f, "operation": o} for f, o in product(FUNCTIONS, OPERATIONS)}
OPTIONS = {"rank": {"r": 3}, "ratio": {"ratio": 2}, "frozen_omega": {"train_omega": False}}

# What is adapted, on the models that PEFT's tests bring along.
TARGETS = {
    "linear": ("MLP", {"target_modules": ["lin0"]}),
    "linear_twice": ("MLP", {"target_modules": ["lin0", "lin1"]}),
    "linear_and_modules_to_save": ("MLP", {"target_modules": ["lin1"], "modules_to_save": ["lin0"]}),
    "conv": ("Conv2d", {"target_modules": ["conv2d"]}),
    "conv_and_linear": ("Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    "conv_1x1": ("Conv2d1x1", {"target_modules": "all-conv"}),
    "conv_between_linear": ("Conv2d2", {"target_modules": ["lin0", "conv2d", "lin1"]}),
    "conv_8_groups": ("Conv2dGroups", {"target_modules": ["conv2d"]}),
    "conv_2_groups": ("Conv2dGroups2", {"target_modules": ["conv2d"]}),
    "class_vector": ("EmbConv1D", {"target_modules": ["lin0"], "class_embedding": "emb"}),
}


# Tables of ours, in place of PEFT's

CASE = "test_name, model_id, config_cls, config_kwargs"


def cases() -> list[Any]:
    """Every function with every operation on every target; but for one target each, they are marked slow."""
    rows = []
    for (number, method), (place, target) in product(enumerate(METHODS), enumerate(TARGETS)):
        model, kwargs = TARGETS[target]
        marks = () if place == number % len(TARGETS) else pytest.mark.slow
        kwargs = {**kwargs, **METHODS[method]}
        rows.append(pytest.param(method, model, FunLoraConfig, kwargs, id=f"{method}-{target}", marks=marks))
    model, kwargs = TARGETS["conv_and_linear"]
    return rows + [pytest.param(o, model, FunLoraConfig, {**kwargs, **OPTIONS[o]}, id=o) for o in OPTIONS]


def two_active() -> list[Any]:
    """Every method twice, on one layer and on two, and with the method after it on one layer."""
    rows = []
    for method, other in FOLLOWED_BY.items():
        for layer, second in (("lin0", method), ("lin1", method), ("lin0", other)):
            one = {"target_modules": ["lin0"], "init_weights": False, **METHODS[method]}
            two = {"target_modules": [layer], "init_weights": False, **METHODS[second]}
            name = f"{method}-lin0-{second}-{layer}"
            rows.append(pytest.param(name, "funlora", FunLoraConfig, one, two, id=name))
    return rows


def as_funlora(**kwargs: Any) -> FunLoraConfig:
    """FunLoraConfig for what PEFT's tests ask of LoraConfig."""
    targets = kwargs.get("target_modules")
    if isinstance(targets, list) and "emb0" in targets:  # of embeddings, FunLoRA adapts the one that knows the class
        kwargs |= {"target_modules": [name for name in targets if name != "emb0"], "class_embedding": "emb0"}
    kwargs["init_weights"] = kwargs.get("init_lora_weights", True)
    known = {field.name for field in fields(FunLoraConfig)}
    return FunLoraConfig(**{name: value for name, value in kwargs.items() if name in known})


def in_place_of_lora(rows: Sequence[tuple]) -> list[Any]:
    """For a row of LoRA's, a name and one or two configurations: the same targets with every method."""
    ours = []
    for name, *theirs in (row for row in rows if isinstance(row[1], custom_models.LoraConfig)):
        for methods in FOLLOWED_BY.items():
            mine = [
                as_funlora(**{**config.to_dict(), **METHODS[method], "init_lora_weights": False})
                for config, method in zip(theirs, methods)  # noqa: B905 - one configuration or two
            ]
            ours.append(pytest.param(name, *mine, id=methods[0]))
    return ours


FOLLOWED_BY = dict(zip(METHODS, [*list(METHODS)[1:], next(iter(METHODS))], strict=True))
CASES = cases()
TABLES = {
    CASE: CASES,
    "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": two_active(),
    "test_name, config0, config1": in_place_of_lora,
    "test_name, config": in_place_of_lora,
    "config_cls": [pytest.param(partial(FunLoraConfig, **kwargs), id=name) for name, kwargs in METHODS.items()],
    "config0": [
        pytest.param(FunLoraConfig(target_modules=["lin0"], init_weights=False, **kwargs), id=name)
        for name, kwargs in METHODS.items()
    ],
    "config_class, mandatory_kwargs": [
        pytest.param(FunLoraConfig, kwargs, id=name) for name, kwargs in METHODS.items()
    ],
    "config_class": [FunLoraConfig],
}


# What does not hold as PEFT's tests have it, and why
#
# By design:
# - A class vector takes the place of the embedding from the start, so an adapter that has one does not start as the
#   identity: "class_vector" is left out of the two tests that compare a fresh adapter with the base.
# - PeftMixedModel takes methods from a closed list of PEFT's own.
#
# Because of where an adapter starts, `gets_no_gradient`; these variants are left out of "test_only_params_are_updated":
# - "add" starts with alpha = 0 and equal factors (but for "identity"), so that all gradients vanish by symmetry in a
#   layer in front of a log-softmax, which one number added to all outputs does not change. Rounding alone would decide
#   what is "updated". See `test_add_gets_no_gradient_in_front_of_a_log_softmax`.
# - On "EmbConv1D" the mean of the embedding, where the class vector starts, is below zero in front of the only ReLU.
#   See `test_class_vector_starts_where_the_relu_lets_nothing_through`.
# From a random start, and without the ReLU, the same test holds for them:
# `test_all_are_updated_where_gradients_get_through`.
#
# Because of a learning rate that is fixed, with inputs up to 89 (57599 for "conv_2_groups") and a loss that is not
# averaged: A B to the power 10 and the product of two trained layers overflow within the three steps. At these factors
# of the rate the same tests hold, and `test_fixed_learning_rate_is_too_high` shows what happens at PEFT's.
#
# Because of rounding: see `TestMixedAdapterBatches`.
#
# Because of PEFT before 0.21: two tests of `TestRequiresGrad` that it marks itself as failing for every method.
LEARNING_RATE_FACTORS = [
    ("test_parameters_after_loading_model", "power-*-conv_2_groups", 1e-7),
    ("test_parameters_after_loading_model", "power-add-linear_and_modules_to_save", 1.0),  # holds as it is
    ("test_parameters_after_loading_model", "power-*", 1e-4),
    ("test_parameters_after_loading_model", "cosine-mul*-conv_2_groups", 1e-2),
    ("test_parameters_after_loading_model", "shift-mul-add-linear_twice", 1e-2),
    ("test_parameters_after_loading_model", "shift-mul-add-conv_*linear", 1e-2),
    ("test_disable_adapters", "power-mul*-conv_2_groups", 1e-4),
]
NOT_POSSIBLE = {
    "test_add_adapter_rejects_duplicate_name_without_mutation[True]": "PeftMixedModel takes PEFT's own methods only",
}


def learning_rate_factor(test: str, variant: str) -> float:
    """What to multiply the learning rate of a test by."""
    return next((f for name, ids, f in LEARNING_RATE_FACTORS if name == test and fnmatch(variant, ids)), 1.0)


def scale_learning_rate(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Have tests that call `torch.optim.SGD` train at another rate than theirs."""
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda params, lr: sgd(params, lr=factor * lr))


def without_class_vector(rows: Sequence[Any]) -> list[Any]:
    return [row for row in rows if not row.id.endswith("class_vector")]


def gets_no_gradient(row: Any) -> bool:
    _, model, _, kwargs = row.values
    last = "lin1" if model in ("MLP", "Conv2d2") else "lin0"
    symmetric = "add" in kwargs.get("operation", "mul") and kwargs["function"] != "identity"
    return model == "EmbConv1D" or (symmetric and last in kwargs["target_modules"])


# PEFT's classes of tests
#
# Of `TestPeftCustomModel` and the classes like it, every test that is parametrised over methods is run, so that what a
# later PEFT adds is run, too; of tests with a LoraConfig of their own, those named as `stand_in`, with ours in its place.
# Not run: what is about another method or LoRA's own tensors (`TestLayerRepr`, `TestMultiRankAdapter`,
# `TestDynamicDispatch`), models from the Hub, and PEFT's other modules, which are about language models.


class TestPeftCustomModel(
    adopt(
        custom_models,
        "TestPeftCustomModel",
        TABLES,
        tables_of={
            "test_only_params_are_updated": {CASE: [row for row in CASES if not gets_no_gradient(row)]},
            "test_disable_adapters": {CASE: without_class_vector(CASES)},
            "test_disable_adapters_with_merging": {CASE: without_class_vector(CASES)},
        },
        stand_in=[
            "test_add_adapter_rejects_duplicate_name_without_mutation",
            "test_delete_adapter_with_multiple_adapters_works",
            "test_delete_adapter_multiple_adapters_with_modules_to_save",
            "test_existing_model_card",
            "test_non_existing_model_card",
            "test_weight_bias_attributes",
        ],
        leave_out=[
            "test_add_weighted_adapter_cat_with_rank_pattern",  # weighted sums of LoRA's factors
            "test_disable_adapter_with_bias_warns",  # methods that train the base's biases
            "test_adding_multiple_adapters_with_bias_raises",
        ],
    )
):
    pass


@pytest.mark.parametrize(
    ("test", "row"),
    [
        pytest.param(test, row.values, id=f"{test}-{row.id}", marks=row.marks)
        for test in ("test_parameters_after_loading_model", "test_disable_adapters")
        for row in without_class_vector(CASES)
        if learning_rate_factor(test, row.id) != 1
    ],
)
def test_fixed_learning_rate_is_too_high(test, row, monkeypatch):
    finite = []

    class WatchedSGD(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            finite.append(all(p.isfinite().all() for group in self.param_groups for p in group["params"]))

    monkeypatch.setattr(torch.optim, "SGD", WatchedSGD)
    # NaN differs from the NaN that was loaded, or is not loaded at all.
    with pytest.raises((AssertionError, ValueError)):
        getattr(custom_models.TestPeftCustomModel(), test)(*row)
    assert len(finite) == 3
    assert not finite[-1]


@pytest.mark.parametrize("function", ["cosine", "power", "shift"])
def test_add_gets_no_gradient_in_front_of_a_log_softmax(function):
    def gradients(layer: str) -> dict[str, float]:
        torch.manual_seed(0)
        config = FunLoraConfig(function=function, operation="add", target_modules=[layer])
        model = peft.get_peft_model(custom_models.MLP(), config).eval()
        model(torch.arange(90).view(9, 10)).sum().backward()
        return {name: p.grad.abs().max().item() for name, p in model.named_parameters() if p.requires_grad}

    in_front, behind_it = gradients("lin1"), gradients("lin0")
    assert max(in_front.values()) < 1e-6 * max(behind_it.values())


def test_class_vector_starts_where_the_relu_lets_nothing_through():
    model = custom_models.MockTransformerWrapper.from_pretrained("EmbConv1D")
    assert model.conv1d(model.emb.weight.mean(dim=0)) < 0


@pytest.mark.parametrize(CASE, [row for row in CASES if gets_no_gradient(row)])
def test_all_are_updated_where_gradients_get_through(test_name, model_id, config_cls, config_kwargs, monkeypatch):
    make = custom_models.MockTransformerWrapper.from_pretrained

    def make_without_relu(*args, **kwargs):
        model = make(*args, **kwargs)
        model.relu = nn.Identity()
        return model

    monkeypatch.setattr(custom_models.MockTransformerWrapper, "from_pretrained", make_without_relu)
    if model_id == "EmbConv1D":
        scale_learning_rate(monkeypatch, 200)  # to the 100 that PEFT's test has for this model with DoRA
    config_kwargs = {**config_kwargs, "init_weights": False}
    custom_models.TestPeftCustomModel().test_only_params_are_updated(test_name, model_id, config_cls, config_kwargs)


class TestMultipleActiveAdapters(adopt(custom_models, "TestMultipleActiveAdapters", TABLES)):
    pass


class TestMixedAdapterBatches(
    # These compare batches of 9 samples with parts of 3, of which the sums come in another order, by the logarithm of
    # probabilities near 1, which float32 does not know closer than 1e-7; PEFT's tolerance of 1e-8 is below that.
    adopt(
        custom_models,
        "TestMixedAdapterBatches",
        TABLES,
        leave_out=[
            # layers that FunLoRA does not adapt: embeddings, transformers' Conv1D, attention as one module
            "test_mixed_adapter_batches_lora_conv1d_emb",
            "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save",
            "test_mixed_adapter_batches_mha_raises",
        ],
    )
):
    pass


class ConvMLP(custom_models.MLP):
    """PEFT's MLP with convolutions in place of its linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Conv2d(10, 20, 1), nn.Conv2d(20, 2, 1)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.relu(self.lin0(X.to(self.dtype)[:, :, None, None])))
        return self.sm(self.lin1(hidden)[:, :, 0, 0])


@pytest.mark.parametrize("targets", [["lin0"], ["lin0", "lin1"]], ids=["one layer", "two layers"])
@pytest.mark.parametrize(("method", "other"), FOLLOWED_BY.items())
def test_mixed_adapter_batches_mlp_of_convolutions(method, other, targets, monkeypatch):
    """PEFT's `test_mixed_adapter_batches_mlp` on this twin of its MLP."""
    monkeypatch.setattr(custom_models, "MLP", ConvMLP)
    config0, config1 = (
        FunLoraConfig(target_modules=targets, init_weights=False, **METHODS[name]) for name in (method, other)
    )
    custom_models.TestMixedAdapterBatches().test_mixed_adapter_batches_mlp("", config0, config1)


class TestRequiresGrad(
    adopt(
        custom_models,
        "TestRequiresGrad",
        TABLES,
        stand_in=[
            "test_requires_grad_modules_to_save_default",
            "test_requires_grad_modules_to_save_disabling",
            "test_requires_grad_modules_to_save_multiple_adapters",
            "test_requires_grad_follows_inference_mode_modules_to_save",
            "test_requires_grad_lora_different_targets",
            "test_requires_grad_lora_same_targets",
            "test_requires_grad_lora_conv2d",
        ],
    )
):
    def check_requires_grad(self, model: nn.Module, *params_expected: str) -> None:
        """The parameters that the tests expect, by their names in our layers."""
        ours = {"lora_A": ("A", "alpha"), "lora_B": ("B", "omega")}
        expected = []
        for name in params_expected:
            layer, _, rest = name.partition(".lora_")
            adapter = rest.removesuffix(".weight").partition(".")[2]
            expected += [f"{layer}.funlora_{part}.{adapter}" for part in ours[f"lora_{rest[0]}"]] if rest else [name]
        super().check_requires_grad(model, *expected)


class TestPeftFsdpStateDict(
    adopt(
        custom_models,
        "TestPeftFsdpStateDict",
        TABLES,
        leave_out=["test_save_load_roundtrip_fsdp_wrapped_learnable_bias"],  # methods that train the base's biases
    )
):
    pass


class TestDefaultTargetModules(
    adopt(
        custom_models,
        "TestDefaultTargetModules",
        TABLES,
        # defaults by type of transformers model
        leave_out=["test_default_target_modules_list_of_str", "test_default_target_modules_str"],
    )
):
    pass


class TestPeftConfig(
    adopt(
        configs,
        "TestPeftConfig",
        TABLES,
        leave_out=[  # adapters on the Hub
            "test_from_pretrained",
            "test_from_pretrained_cache_dir",
            "test_save_pretrained_with_runtime_config",
        ],
    )
):
    pass


class TestTargetedModuleNames(
    adopt(
        tuner_base,
        "TestTargetedModuleNames",
        TABLES,
        stand_in="all",
        leave_out=[
            "test_ia3_targeted_module_regex",
            "test_ia3_targeted_module_list",
            "test_realistic_example",  # a model from the Hub
        ],
    )
):
    pass


class TestExcludedModuleNames(
    adopt(
        tuner_base,
        "TestExcludedModuleNames",
        TABLES,
        stand_in="all",
        leave_out=[
            "test_ia3_two_excluded_module_regex",
            "test_ia3_multiple_excluded_modules_list",
            "test_realistic_example",  # a model from the Hub
        ],
    )
):
    pass


class TestModelAndLayerStatus(
    adopt(
        tuner_base,
        "TestModelAndLayerStatus",
        TABLES,
        stand_in="all",
        leave_out=[
            # LoRA's own names, counts and tensors
            "test_module_type_small",
            "test_module_type_large",
            "test_adapter_model_type_small",
            "test_adapter_model_type_large",
            "test_peft_types_small",
            "test_peft_types_large",
            "test_nb_params_small",
            "test_nb_params_large",
            "test_model_status_with_modules_to_save",
            "test_model_with_injected_layers",
            "test_requires_grad_irregular",
            "test_model_requires_grad_model_irregular",
            "test_devices_cpu_and_gpu_large",
            "test_model_devices_cpu_and_gpu_large",
            # what only LoRA can do
            "test_target_parameters",
            "test_target_parameters_and_target_modules",
            "test_model_target_parameters",
            "test_model_target_parameters_and_target_modules",
            "test_with_trainable_tokens",
            "test_model_enabled_irregular_with_trainable_tokens",
            "test_model_active_adapters_with_trainable_tokens_irregular",
            "test_model_requires_irregular_with_trainable_tokens",
            "test_model_status_with_trainable_tokens",
            # other methods
            "test_loha_model",
            "test_vera_model",
            "test_prefix_tuning",
            "test_adaption_prompt",
            "test_mixed_model_raises",
            # models from the Hub
            "test_base_model_type_transformers_automodel",
            "test_transformers_model",
            "test_transformer_model_without_adapter_raises",
        ],
    )
):
    pass


class TestPeftStateDict(
    adopt(
        low_level,
        "TestPeftStateDict",
        TABLES,
        stand_in="all",
        leave_out=[
            # models from the Hub
            "test_get_peft_model_state_dict_removes_adapter_name",
            "test_get_peft_model_state_dict_removes_non_defaul_adapter_name",
            "test_get_peft_model_state_dict_removes_adapter_name_when_same_as_module_name",
            # looks the class of the configuration up in a table of its own
            "test_base_model_module_named_like_peft_prefix",
        ],
    )
):
    pass


# The same checks on a U-Net


class SmallUNet(nn.Module):
    """A U-Net as PEFT's tests expect a model: takes a dictionary of inputs and returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            attention_head_dim=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=2,
        )

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.unet(**inputs, return_dict=False)[0]

    @classmethod
    def from_pretrained(cls, model_id: str, dtype: torch.dtype = torch.float32) -> SmallUNet:
        torch.manual_seed(0)
        return cls().to(dtype)

    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(self, kwargs: dict[str, Any]) -> None:
        self.unet.enable_gradient_checkpointing(partial(checkpoint, **kwargs))


# PEFT's checks for any model, with what they take besides the model and the configuration.
NOT_THE_IDENTITY = {"init_weights": False}
CHECKS = [
    ("adapter_name", {}, {}),
    ("delete_adapter", {}, {}),
    ("delete_inactive_adapter", {}, {}),
    ("delete_unknown_adapter_raises", {}, {}),
    ("from_pretrained_config_construction", {}, {}),
    ("get_base_model_state_dict", {}, {}),
    ("inference_safetensors", {}, {}),
    ("load_model_low_cpu_mem_usage", {}, {}),
    ("load_multiple_adapters", {}, {}),
    ("merge_layers", NOT_THE_IDENTITY, {}),
    ("merge_layers_fp16", NOT_THE_IDENTITY, {}),
    ("merge_layers_is_idempotent", NOT_THE_IDENTITY, {}),
    ("merge_layers_multi", NOT_THE_IDENTITY, {}),
    ("merge_layers_nan", NOT_THE_IDENTITY, {}),
    ("model_attr", {}, {}),
    ("peft_model_device_map", {}, {}),
    ("safe_merge", NOT_THE_IDENTITY, {}),
    ("save_pretrained", NOT_THE_IDENTITY, {}),
    ("save_pretrained", NOT_THE_IDENTITY, {"safe_serialization": False}),
    ("save_pretrained_adapter_name_substring", NOT_THE_IDENTITY, {}),
    ("save_pretrained_selected_adapters", NOT_THE_IDENTITY, {}),
    ("training", {}, {}),
    ("training_gradient_checkpointing", {}, {"use_reentrant": True}),
    ("training_gradient_checkpointing", {}, {"use_reentrant": False}),
    ("training_layer_indexing", {}, {}),
    ("unload_adapter", NOT_THE_IDENTITY, {}),
    ("add_adapter_no_autocast_adapter_dtype", {}, {"dtype": torch.float16}),
    ("add_adapter_no_autocast_adapter_dtype", {}, {"dtype": torch.bfloat16}),
]


class TestUNet2DModel(common.PeftCommonTester):
    transformers_class = SmallUNet
    stand_in = ()

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {
            "sample": torch.randn(2, 1, 8, 8, generator=generator),
            "timestep": torch.tensor([100.0, 700.0]),
            "class_labels": torch.tensor([0, 1]),
        }

    @pytest.mark.parametrize(
        "method",
        [m if m in ("cosine-mul", "shift-mul-add") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
    )
    @pytest.mark.parametrize(
        ("check", "start", "arguments"),
        [pytest.param(*row, id="-".join([row[0], *map(str, row[2].values())])) for row in CHECKS],
    )
    def test_check(self, check, start, arguments, method):
        run = getattr(self, f"_test_{check}", None)
        if run is None:
            pytest.skip(f"peft {peft.__version__} has no such check")
        targets = {"target_modules": ["conv1", "conv2", "to_q", "to_out.0"], "class_embedding": "class_embedding"}
        run("unet", FunLoraConfig, {**targets, **METHODS[method], **start}, **arguments)


# What PEFT's tests are run with


@pytest.fixture(autouse=True)
def _seed():
    """Not all of PEFT's tests seed the random start that they compare with the base."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """PEFT looks models up on the Hub by their names, which these only seem to be."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for model in ("unet", *(model for model, _ in TARGETS.values())):
        monkeypatch.setitem(utilities._HUB_MODEL_ACCESSES, model, 1)


@pytest.fixture(autouse=True)
def _ours_in_place_of_lora(request, monkeypatch):
    if request.node.originalname in getattr(request.cls, "stand_in", ()):
        monkeypatch.setitem(request.function.__globals__, "LoraConfig", as_funlora)


@pytest.fixture(autouse=True)
def _what_is_listed(request, monkeypatch):
    if request.node.name in NOT_POSSIBLE:
        request.applymarker(pytest.mark.xfail(reason=NOT_POSSIBLE[request.node.name], strict=True))
    if request.cls is TestMixedAdapterBatches:
        monkeypatch.setattr(torch, "allclose", partial(torch.allclose, atol=1e-6))
    if request.cls is TestPeftCustomModel and hasattr(request.node, "callspec"):
        factor = learning_rate_factor(request.node.originalname, request.node.callspec.id)
        if factor != 1:
            scale_learning_rate(monkeypatch, factor)
