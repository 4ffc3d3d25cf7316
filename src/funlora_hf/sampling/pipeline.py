"""FunLoraPipeline: sample the classes of a base and of its adapters in one call."""

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional, TypeAlias, overload

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from tqdm.auto import tqdm

from ..adapters.base_fingerprint import base_tensors
from ..adapters.class_folder import (
    ADAPTERS_FOLDER,
    adapter_class,
    adapter_folders,
    adapter_name,
    check_replaceable,
    known_class,
)
from ..adapters.loaded_adapters import ClassAdapters
from ..adapters.untrusted_adapter import read_adapter
from ..adapters.untrusted_bank import read_bank
from ..adapters.untrusted_base import (
    check_base_folder,
    check_names_differ,
    check_velocity_scheduler,
    check_velocity_unet,
    class_names,
)
from ..flow_matching import sigma_to_timestep
from ..tuner_base.wrappers import adapted_modules, evaluation_mode, uncompiled
from ..utils.checks import check_at_least_one, check_choice, is_repository_name, listed, one_form, shortened
from ..utils.tensors import not_finite
from .guidance import Guidance, Velocity
from .solvers import SOLVERS, SolverOutput, solve


ClassLabels: TypeAlias = int | str | Sequence[int | str] | torch.Tensor
Generators: TypeAlias = torch.Generator | list[torch.Generator] | None
Images: TypeAlias = list[PIL.Image.Image] | np.ndarray | torch.Tensor
Weights: TypeAlias = int | Sequence[float] | torch.Tensor


@dataclass
class FunLoraPipelineOutput(BaseOutput):
    """Output class of [`FunLoraPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): Images in the requested order: PIL, an array
            `(batch, height, width, channels)` in [0, 1], or a tensor `(batch, channels, height, width)` in [0, 1].
        nfe (`int`): number of function evaluations: how often the U-Net ran.
    """

    images: Images
    nfe: int


class FunLoraPipeline(DiffusionPipeline):
    r"""Pipeline for class-conditional image generation with a flow-matching U-Net and one adapter for each added class.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        unet ([`UNet2DModel`]): The base. Loading adapters wraps layers of it in place; its own weights never change.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]): Provides the sigmas of the fixed-step solvers.
        class_ids (`list[int]`, *optional*): Classes that the base knows: row i of its class embedding is the class
            `class_ids[i]`. None: the rows' own numbers.
        id2label (`dict[int, str]`, *optional*):
            Names of the base's classes. None: their ids as text.
    """

    model_cpu_offload_seq = "unet"  # type: ignore[assignment]  # diffusers types it as None
    unet: UNet2DModel
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        class_ids: Optional[list] = None,  # noqa: UP045 - older diffusers read annotations of this form only
        id2label: Optional[dict] = None,  # noqa: UP045
    ) -> None:
        super().__init__()
        if isinstance(unet, (PeftModel, PeftMixedModel, BaseTuner)):
            raise ValueError(
                f"`unet` is a {type(unet).__name__}, expected the UNet2DModel in it, without adapters: save the adapter with "
                "`save_adapter`, pass `unet.unload()`, and add the adapter with `load_adapter`."
            )
        if not isinstance(uncompiled(unet), UNet2DModel):
            raise ValueError(f"`unet` is a {type(unet).__name__}, expected a UNet2DModel.")
        check_velocity_unet(unet.config, field="unet.config")
        _check_scheduler(scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)
        rows = unet.config["num_class_embeds"] or 0
        classes = class_names(range(rows) if class_ids is None else class_ids, id2label or {})
        if len(classes) != rows or (class_ids is not None and len(class_ids) != rows):
            raise ValueError(
                f"`class_ids` is {class_ids}, expected {rows} different ids: one for each row of the U-Net's class "
                "embedding (`num_class_embeds`)."
            )
        self.register_to_config(class_ids=list(classes), id2label=classes)
        self._adapters = ClassAdapters(unet)

    @property
    def classes(self) -> dict[int, str]:
        """All known classes, id -> name: those of the base, then those of the adapters in order of loading."""
        return {**self.config["id2label"], **self._adapters.classes}

    @property
    def components(self) -> dict[str, Any]:
        """Arguments for another pipeline, `FunLoraPipeline(**pipe.components)`, with ids and names of the base's classes."""
        return {**super().components, "class_ids": self.base_classes, "id2label": dict(self.config["id2label"])}

    @property
    def base_classes(self) -> list[int]:
        """Ids of the base's own classes, in the order of the rows of its class embedding."""
        return list(self.config["class_ids"])

    @overload
    def __call__(
        self,
        class_labels: ClassLabels,
        num_inference_steps: int = ...,
        solver: str = ...,
        rtol: float = ...,
        atol: float = ...,
        generator: Generators = ...,
        output_type: str = ...,
        return_dict: Literal[True] = ...,
        guidance: Guidance | None = ...,
        guidance_scale: float = ...,
    ) -> FunLoraPipelineOutput: ...

    @overload
    def __call__(
        self,
        class_labels: ClassLabels,
        num_inference_steps: int = ...,
        solver: str = ...,
        rtol: float = ...,
        atol: float = ...,
        generator: Generators = ...,
        output_type: str = ...,
        *,
        return_dict: Literal[False],
        guidance: Guidance | None = ...,
        guidance_scale: float = ...,
    ) -> tuple[Images, int]: ...

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels,
        num_inference_steps: int = 10,
        solver: str = "heun",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance: Guidance | None = None,
        guidance_scale: float = 1.0,
    ) -> FunLoraPipelineOutput | tuple[Images, int]:
        r"""Sample one image of each requested class.

        Args:
            class_labels (`int`, `str`, or a sequence of them): One class for every image, by id or by name; base and adapter
                classes may mix.
            num_inference_steps (`int`, *optional*, defaults to 10): Steps of the fixed-step solvers; "dopri5" chooses its
                own.
            solver (`str`, *optional*, defaults to "heun"): "euler" (1 evaluation of the U-Net a step), "heun" (2), "rk4" (4)
                or "dopri5" (adaptive).
            rtol (`float`, *optional*, defaults to 1e-5): Relative tolerance of "dopri5".
            atol (`float`, *optional*, defaults to 1e-5): Absolute tolerance of "dopri5".
            generator (`torch.Generator` or a list of them, *optional*): Makes the noise, and with it the images, repeatable.
            output_type (`str`, *optional*, defaults to "pil"): "pil", "np" or "pt".
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`FunLoraPipelineOutput`] instead of a tuple.
            guidance ([`Guidance`], *optional*):
                Steers the samples towards a higher score of the image, such as a classifier's.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                w of `v_base + w (v - v_base)`, where v is the velocity of the class, and v_base that of the base without adapters, at the
                mean of its class vectors. Above 1, samples look more like their class and less unlike each other, for twice the evaluations.

        Returns:
            [`FunLoraPipelineOutput`] or `tuple`: the images, in the requested order, and the number of evaluations.

        Raises:
            ValueError: unknown class, solver or output type, no class at all, less than one step, a `guidance_scale` that is not
                a number of at least 0, or samples that are not finite.

        Source: arXiv 2510.02631, sampling by an ODE solver [text]; the default solver and steps are [ours]. Guidance by a scale is
            classifier-free guidance (arXiv 2207.12598 [text]), with the base in place of a model without classes [ours].
        """
        _check_sampling(solver, num_inference_steps, output_type)
        if not 0 <= guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` is {guidance_scale!r}, expected a number of at least 0; 1 is none.")
        class_ids = self._class_ids(class_labels)
        noise = self._noise(len(class_ids), generator)
        # Sorted here by class, the batch is not sorted again in every adapted layer.
        order = sorted(range(len(class_ids)), key=class_ids.__getitem__)
        class_ids = [class_ids[index] for index in order]
        with self._guided_velocities(class_ids, guidance_scale) as velocity:
            velocity = velocity if guidance is None else partial(guidance, velocity)
            parts = [[class_id] for class_id in class_ids]
            output = self._solve(velocity, noise[order], parts, num_inference_steps, solver, rtol, atol)
        sample = torch.empty_like(output.sample)
        sample[order] = output.sample
        nfe = output.nfe * (1 if guidance_scale == 1 else 2)
        return self._output(sample, nfe, output_type, return_dict)

    @overload
    def interpolate(
        self,
        class_label_1: int | str,
        class_label_2: int | str,
        weights: Weights = ...,
        num_inference_steps: int = ...,
        solver: str = ...,
        rtol: float = ...,
        atol: float = ...,
        generator: torch.Generator | None = ...,
        output_type: str = ...,
        return_dict: Literal[True] = ...,
    ) -> FunLoraPipelineOutput: ...

    @overload
    def interpolate(
        self,
        class_label_1: int | str,
        class_label_2: int | str,
        weights: Weights = ...,
        num_inference_steps: int = ...,
        solver: str = ...,
        rtol: float = ...,
        atol: float = ...,
        generator: torch.Generator | None = ...,
        output_type: str = ...,
        *,
        return_dict: Literal[False],
    ) -> tuple[Images, int]: ...

    @torch.no_grad()
    def interpolate(
        self,
        class_label_1: int | str,
        class_label_2: int | str,
        weights: Weights = 8,
        num_inference_steps: int = 10,
        solver: str = "heun",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> FunLoraPipelineOutput | tuple[Images, int]:
        r"""Sample images between two classes, all from the same noise.

        At every evaluation, the velocities of both classes are computed for every image, and the image of weight w moves by
        `(1 - w) * velocity_1 + w * velocity_2`. So weight 0 gives the first class as [`~FunLoraPipeline.__call__`] samples
        it from this noise, and weight 1 the second. Base and adapter classes may mix.

        Args:
            class_label_1 (`int` or `str`): the class of weight 0, by id or by name.
            class_label_2 (`int` or `str`): the class of weight 1.
            weights (`int` or a sequence of `float`, *optional*, defaults to 8): One weight in [0, 1] for every image; or
                their number, at least 2, for weights evenly spaced from 0 to 1.
            generator (`torch.Generator`, *optional*): Makes the noise, and with it the images, repeatable.
            num_inference_steps, solver, rtol, atol, output_type, return_dict: as in [`~FunLoraPipeline.__call__`].

        Returns:
            [`FunLoraPipelineOutput`] or `tuple`: the images, in the order of the weights, and the number of evaluations.
            Each evaluation runs both classes for all weights in one batch, which has twice as many samples as weights.

        Raises:
            ValueError: unknown class, solver or output type, weights out of range or none, or less than one step.

        Source: [ours].
        """
        _check_sampling(solver, num_inference_steps, output_type)
        weights = _interpolation_weights(weights)
        (class_1,) = self._class_ids([class_label_1])
        (class_2,) = self._class_ids([class_label_2])
        noise = self._noise(1, generator)
        noise = noise.expand(len(weights), *noise.shape[1:])
        weights = weights.to(noise).view(-1, 1, 1, 1)
        with self._velocities([class_1] * len(noise) + [class_2] * len(noise)) as both:

            def velocity(sigma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
                first, second = both(sigma, torch.cat([state, state])).chunk(2)
                return (1 - weights) * first + weights * second

            parts = [[class_1, class_2]] * len(noise)
            output = self._solve(velocity, noise, parts, num_inference_steps, solver, rtol, atol)
        return self._output(output.sample, output.nfe, output_type, return_dict)

    def predict_velocity(self, sample: torch.Tensor, sigma: torch.Tensor, class_labels: ClassLabels) -> torch.Tensor:
        """Velocity dx/dsigma of each sample for its class.

        Args:
            sample (`torch.Tensor`): states, `(batch, channels, height, width)`.
            sigma (`torch.Tensor`): `(batch,)` or a scalar, in [0, 1]; 1 is the noise, 0 the data.
            class_labels (`int`, `str`, or a sequence of them): one class for every sample, by id or by name.

        Returns:
            `torch.Tensor`: same shape and dtype as `sample`.

        Raises:
            ValueError: unknown class, labels for another number of samples, a sample of integers, or a sigma outside of [0, 1].
        """
        if not sample.is_floating_point():
            raise ValueError(f"`sample` is of {sample.dtype}, expected a floating-point dtype.")
        if not ((sigma >= 0) & (sigma <= 1)).all():
            raise ValueError(f"`sigma` is {sigma.tolist()}, expected numbers in [0, 1].")
        class_ids = self._class_ids(class_labels)
        if len(class_ids) != len(sample):
            raise ValueError(
                f"`class_labels` has {len(class_ids)} classes, expected one for each of {len(sample)} samples."
            )
        with self._velocities(class_ids) as velocity:
            return velocity(sigma, sample)

    def load_adapter(
        self,
        source: str | os.PathLike,
        *,
        subfolder: str | None = None,
        class_label: int | None = None,
        class_name: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        ignore_base_fingerprint: bool = False,
    ) -> int:
        """Add the class of an adapter. Only its JSON and its safetensors file are read, and nothing in them is run.

        Args:
            source (`str` or `os.PathLike`): A folder written by `save_adapter` or by PEFT's `save_pretrained`, or a
                repository on the Hub. The method is FunLoRA, or any other method of PEFT whose layers accept `adapter_names`;
                such an adapter may have its class vector as row 0 of the class embedding
                (`trainable_token_indices={"class_embedding": [0]}`). All loaded adapters must be of the same method.
            subfolder (`str`, *optional*): the adapter's folder in it.
            class_label (`int`, *optional*): id of the class in this pipeline; None: the one in the adapter's config.
            class_name (`str`, *optional*): its name; None: the one in the config, or else the id as text.
            revision (`str`, *optional*): branch, tag or commit of a repository.
            local_files_only (`bool`, *optional*, defaults to `False`): Take a repository from the cache, without asking the
                Hub.
            ignore_base_fingerprint (`bool`, *optional*, defaults to `False`): Load the adapter also if it was trained for
                another base. What is saved then names this base.

        Returns:
            `int`: the id of the class.

        Raises:
            BaseMismatchError: the adapter was trained for another base (a ValueError).
            ValueError: no id, an id or a name that is taken, an adapter of another method than those loaded, or one
                that does not fit the base. Nothing has changed then.
            FileNotFoundError: no such folder, repository, revision or adapter in it.
        """
        adapter = read_adapter(source, subfolder=subfolder, revision=revision, local_files_only=local_files_only)
        class_label, class_name = known_class(adapter.config, adapter.source, class_label, class_name)
        if class_label in self.classes:
            where = "the base knows" if class_label in self.base_classes else "an adapter is loaded for"
            raise ValueError(f"`class_label` is {class_label}, a class that {where} already: pass another one.")
        check_names_differ({**self.classes, class_label: class_name})
        self._follow_unet()
        self._adapters.add(adapter, class_label, class_name, ignore_base_fingerprint=ignore_base_fingerprint)
        return class_label

    def load_adapter_bank(self, file: str | os.PathLike, *, ignore_base_fingerprint: bool = False) -> list[int]:
        """Add all classes of a file written by [`AdapterBank.save`]; a thousand load like one.

        Args:
            file (`str` or `os.PathLike`): to read; it is mapped into memory and must not change meanwhile.
            ignore_base_fingerprint: as in `load_adapter`.

        Returns:
            `list[int]`: the ids of the classes.

        Raises:
            ValueError: not a bank's file, one that does not fit the base, or with ids or names that are taken. Nothing has
                changed then.
            FileNotFoundError: no such file.
        """
        saved = read_bank(file)
        taken = sorted(saved.classes.keys() & self.classes.keys())
        if taken:
            raise ValueError(f"{saved.file!r} has the classes {taken}, which are known already: unload them.")
        check_names_differ({**self.classes, **saved.classes})
        self._follow_unet()
        self._adapters.add_bank(saved, ignore_base_fingerprint=ignore_base_fingerprint)
        return list(saved.classes)

    def unload_adapter(self, class_label: int) -> None:
        """Remove the class of an adapter. Raises a ValueError if no adapter was loaded for it."""
        if class_label not in self._adapters.classes:
            raise ValueError(f"`class_label` is {class_label}, expected a class loaded by `load_adapter`.")
        self._adapters.remove(class_label)

    def merged_unet(self, class_label: int | str) -> tuple[UNet2DModel, torch.Tensor | None]:
        """For [`merge_class`]: a copy of the U-Net with the adapter of a class merged into its weights, and the row of its class
        embedding for this class, `(1,)`, or None without an embedding. Raises a ValueError for what cannot be merged."""
        (class_id,) = self._class_ids([class_label])
        self._follow_unet()
        unet = self._adapters.merged(None if class_id in self.base_classes else class_id)
        return unet, self._embedding_rows([class_id])  # type: ignore[return-value]  # it has the class of `self.unet`

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the base as [`DiffusionPipeline.save_pretrained`] does, untouched by adapters, and every adapter in
        `adapters/class_<id>/` beside it. Raises a ValueError if adapters are merged into the base's weights, if these are not finite, or
        if such a folder is there with other contents than an adapter, which would be lost."""
        if (args[0] if args else kwargs.get("safe_serialization")) is False:
            raise ValueError("`safe_serialization` is False, expected True: this package reads only safetensors.")
        if kwargs.get("push_to_hub") and self._adapters.classes:
            raise ValueError(
                "`push_to_hub` would push the base without its adapters: save first, then `funlora_hf.push_all` the folder."
            )
        self._follow_unet()
        adapters = Path(save_directory) / ADAPTERS_FOLDER
        for class_id in self._adapters.classes:
            check_replaceable(adapters / adapter_name(class_id))
        unet = uncompiled(self.unet)
        if adapted_modules(unet):
            with torch.device("meta"):
                plain = UNet2DModel.from_config(unet.config)
            plain.load_state_dict(base_tensors(unet), assign=True)  # they are the base's own
            unet = plain
        if problems := not_finite(unet.state_dict()):
            raise ValueError(f"The base cannot be saved:\n{listed(problems)}")
        base = FunLoraPipeline(unet, self.scheduler, self.base_classes, self.config["id2label"])
        super(FunLoraPipeline, base).save_pretrained(save_directory, *args, **kwargs)
        for class_id in self._adapters.classes:
            self._adapters.save(class_id, adapters / adapter_name(class_id))
        others = {folder.name for folder in adapter_folders(adapters)} - set(map(adapter_name, self._adapters.classes))
        if others:
            warnings.warn(
                f"{os.fspath(adapters)!r} also has {', '.join(sorted(others))}, which this pipeline does not have. `from_pretrained` will "
                "load them too: `funlora delete` removes a class.",
                stacklevel=2,
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "FunLoraPipeline":
        """As [`DiffusionPipeline.from_pretrained`], reading safetensors only; adapters in `adapters/` of a local folder are
        also loaded. Raises a FileNotFoundError for what is neither a folder nor a repository that can be loaded, and a ValueError
        for any other error of a component that is built from the arguments in its JSON."""
        kwargs.setdefault("use_safetensors", True)
        name = os.fspath(pretrained_model_name_or_path)
        try:
            if not os.path.isdir(name) and not is_repository_name(name):
                raise FileNotFoundError(name)
            pipe = super().from_pretrained(name, **kwargs)
        except ImportError:
            raise
        except OSError as error:
            if os.path.isdir(name):
                raise
            raise FileNotFoundError(
                f"{name!r} is neither a folder that is there nor a repository, 'user/repo', that can be loaded: correct the path or "
                "the name, or see the error above."
            ) from error
        except Exception as error:
            raise ValueError(
                f"The pipeline {name!r} cannot be loaded: {type(error).__name__}: {shortened(str(error), 1000)}"
            ) from error
        for folder in adapter_folders(Path(pretrained_model_name_or_path) / ADAPTERS_FOLDER):
            pipe.load_adapter(folder, **adapter_class(folder))
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "FunLoraPipeline":
        """As [`DiffusionPipeline.from_pipe`]. Pipelines that share a U-Net also share its adapters, including later ones."""
        made = super().from_pipe(pipeline, **kwargs)
        if isinstance(pipeline, FunLoraPipeline) and made.unet is pipeline.unet:
            made._adapters = pipeline._adapters
        return made

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As [`ConfigMixin.load_config`]. A folder is checked first, before diffusers imports the libraries that it names."""
        if Path(pretrained_model_name_or_path).is_dir():
            check_base_folder(Path(pretrained_model_name_or_path))
        return super().load_config(pretrained_model_name_or_path, *args, **kwargs)

    def _class_ids(self, class_labels: ClassLabels) -> list[int]:
        if isinstance(class_labels, torch.Tensor):
            _check_flat("class_labels", class_labels)
            class_labels = class_labels.reshape(-1).tolist()
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        if isinstance(class_labels, (Set, Mapping)):
            raise ValueError(
                f"`class_labels` is {class_labels!r}, expected a list: images come in the order asked, which it has not."
            )
        classes = self.classes
        ids_by_name = {one_form(name): class_id for class_id, name in classes.items()}
        class_ids: list[int] = []
        for label in class_labels:
            class_id = ids_by_name.get(one_form(label)) if isinstance(label, str) else _whole(label)
            if class_id is None or class_id not in classes:
                known = ", ".join(f"{class_id} ({name})" for class_id, name in classes.items())
                raise ValueError(
                    f"`class_labels` has {label!r}, expected ids or names of known classes: {known}. Load the class "
                    "with `load_adapter`."
                )
            class_ids.append(class_id)
        if not class_ids:
            raise ValueError("`class_labels` is empty, expected one class for every image.")
        return class_ids

    def _embedding_rows(self, class_ids: Sequence[int | None]) -> torch.Tensor | None:
        rows: dict[int | None, int] = {class_id: row for row, class_id in enumerate(self.base_classes)}
        # An adapter class has its own vector; its row does not matter.
        return torch.tensor([rows.get(class_id, 0) for class_id in class_ids]) if rows else None

    @contextmanager
    def _velocities(self, class_ids: Sequence[int | None]) -> Iterator[Velocity]:
        """dx/dsigma of a batch of these classes, whose adapters act in the context; None: no adapter acts."""
        self._follow_unet()
        rows = self._embedding_rows(class_ids)

        def velocity(sigma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            labels = None if rows is None else rows.to(state.device)
            output = self.unet(state.to(self.unet.dtype), sigma_to_timestep(sigma.float(), check_range=False), labels)
            return output.sample.to(state.dtype)

        base = set(self.base_classes)
        with self._adapters.acting([None if class_id in base else class_id for class_id in class_ids]):
            yield velocity

    @contextmanager
    def _guided_velocities(self, class_ids: Sequence[int], guidance_scale: float) -> Iterator[Velocity]:
        """As `_velocities`, with guidance away from the base."""
        if guidance_scale == 1:
            with self._velocities(class_ids) as velocity:
                yield velocity
            return
        count = len(class_ids)
        with self._velocities([*class_ids, *[None] * count]) as both, self._at_mean_vector(count):

            def velocity(sigma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
                own, base = both(sigma, torch.cat([state, state])).chunk(2)
                return base + guidance_scale * (own - base)

            yield velocity

    @contextmanager
    def _at_mean_vector(self, count: int) -> Iterator[None]:
        """Give the last `count` samples of a batch the mean of the base's class vectors."""
        embedding = uncompiled(self.unet).class_embedding
        if embedding is None:
            yield
            return
        mean = base_tensors(uncompiled(self.unet))["class_embedding.weight"].mean(dim=0)

        def replaced(module: nn.Module, args: Any, vectors: torch.Tensor) -> torch.Tensor:
            return torch.cat([vectors[:-count], mean.to(vectors).expand(count, -1)])

        handle = embedding.register_forward_hook(replaced)
        try:
            yield
        finally:
            handle.remove()

    def _noise(self, batch: int, generator: Generators) -> torch.Tensor:
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, expected one for each of {batch} images, or a single one."
            )
        config = self.unet.config
        size = config["sample_size"]
        if size is None:
            raise ValueError("`unet.config.sample_size` is None, expected the size of its images in pixels.")
        height, width = (size, size) if isinstance(size, int) else size
        # The state stays in float32, even if the U-Net computes in another dtype, whose rounding would add up over the steps.
        return randn_tensor(
            (batch, config["in_channels"], height, width),
            generator=generator,
            device=self._execution_device,
            dtype=torch.float32,
        )

    def _solve(
        self,
        velocity: Velocity,
        noise: torch.Tensor,
        class_ids: Sequence[Sequence[int]],
        num_inference_steps: int,
        solver: str,
        rtol: float,
        atol: float,
    ) -> SolverOutput:
        """From noise to data on the scheduler's grid, with a progress bar; without dropout, also of a U-Net in training mode.

        Raises a ValueError that names the classes, `class_ids`, of samples that are not finite, which images cannot show.
        """
        _check_scheduler(self.scheduler)  # it may have been replaced
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist())
        steps = None if solver == "dopri5" else num_inference_steps
        with evaluation_mode(self.unet), tqdm(total=steps, **getattr(self, "_progress_bar_config", {})) as bar:
            output = solve(
                velocity, noise, self.scheduler.sigmas, solver=solver, rtol=rtol, atol=atol, on_step=bar.update
            )
        finite = torch.isfinite(output.sample).flatten(1).all(dim=1).tolist()
        spoiled = {one for ids, is_finite in zip(class_ids, finite, strict=True) if not is_finite for one in ids}
        if spoiled:
            names = ", ".join(f"{class_id} ({self.classes[class_id]})" for class_id in sorted(spoiled))
            raise ValueError(
                f"{finite.count(False)} of {len(finite)} samples are not finite after {num_inference_steps} steps of {solver!r}; their "
                f"classes: {names}. Check the weights of the base and of these adapters."
            )
        return output

    def _output(
        self, sample: torch.Tensor, nfe: int, output_type: str, return_dict: bool
    ) -> FunLoraPipelineOutput | tuple[Images, int]:
        """Convert samples in [-1, 1] to the requested type of images."""
        images = VaeImageProcessor().postprocess(sample, output_type)
        self.maybe_free_model_hooks()
        return FunLoraPipelineOutput(images=images, nfe=nfe) if return_dict else (images, nfe)

    def _follow_unet(self) -> None:
        """Use a U-Net that has replaced `unet`. Raises a ValueError if adapters are loaded, since they are in the old one."""
        if uncompiled(self.unet) is uncompiled(self._adapters.model):
            return
        if self._adapters.classes:
            raise ValueError(
                "`unet` was replaced after adapters were loaded, which are in the old U-Net: unload them first, or make a new "
                "pipeline."
            )
        self._adapters = ClassAdapters(self.unet)


def _whole(label: Any) -> int | None:
    """Return a label as an integer, or None if it is not a whole number."""
    try:
        return int(label) if not isinstance(label, bool) and label == int(label) else None
    except (TypeError, ValueError, OverflowError):  # None, NaN, infinity
        return None


def _check_scheduler(scheduler: Any) -> None:
    """Raise a ValueError that names a setting of the scheduler that the solvers do not support."""
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}, expected a FlowMatchEulerDiscreteScheduler: the base must "
            "be trained by flow matching."
        )
    check_velocity_scheduler(scheduler.config, field="scheduler.config")


def _check_flat(name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() > 1:
        raise ValueError(
            f"`{name}` has the shape {tuple(tensor.shape)}, expected one dimension: one entry for every image."
        )


def _check_sampling(solver: str, num_inference_steps: int, output_type: str) -> None:
    check_choice("solver", solver, SOLVERS)
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"`output_type` is {output_type!r}, expected 'pil', 'np' or 'pt'.")
    check_at_least_one("num_inference_steps", num_inference_steps)


def _interpolation_weights(weights: Weights) -> torch.Tensor:
    """One weight for every image, in float32."""
    if isinstance(weights, int):
        if weights < 2:
            raise ValueError(
                f"`weights` is {weights}, expected at least 2 images, or a sequence of weights in [0, 1]."
            )
        return torch.linspace(0, 1, weights)
    tensor = torch.as_tensor(weights, dtype=torch.float32)
    _check_flat("weights", tensor)
    tensor = tensor.reshape(-1)
    # In this form it also refuses NaN.
    if not len(tensor) or not ((tensor >= 0) & (tensor <= 1)).all():
        raise ValueError(f"`weights` is {weights}, expected numbers in [0, 1], one for every image.")
    return tensor
