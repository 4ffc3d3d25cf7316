"""JDCL: one network generates and classifies; what a task brings is learned by a copy, then distilled together with the past.

Source: Joint Diffusion models in Continual Learning (arXiv 2411.08224): phases, losses, weights and head [code, text];
    class-conditional velocities in place of unconditional noise [ours].
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

from ...data.pixels import to_model_range
from ...data.tasks import Task
from ...flow_matching import flow_matching_loss, interpolate, sigma_to_timestep, velocity_target
from ...sampling.solvers import expected_evaluations
from ...utils.field_types import Count, Range, Share, one_of
from ..base import BASE_PHASE, arrange, base_shape, label_rows, make_pipeline, trainable_unet
from ..devices import on_device
from ..strategy import Batch, Phase, PhaseSettings, Setting, Trainable, tensor_bytes
from ..trainer import phase_steps
from .finetune import Finetune
from .generated_images import DrawingOptions, GeneratedImages, mix
from .joint_net import JointClassifier, JointNet, build_head, check_readable, encode
from .sequential import KeptFile


_LOCAL = "local_"
# Of the images drawn of a class, the least share that `agree` keeps.
_LEAST_KEPT = 0.1
Weight = Annotated[float, Range(0)]


@dataclass
class JdclOptions(DrawingOptions):
    """The defaults of weights, head and `wait` are those of the code for CIFAR [code].

    Args:
        classification_weight: of the cross-entropy in task 1 and in local phases.
        simple_weight: of the flow-matching loss in global phases.
        distillation_weight: of the teachers' velocities there; they count twice.
        global_classification_weight: of the cross-entropy there.
        classification_distillation_weight: of the teachers' probabilities there; they count twice.
        wait: share of a global phase in which it trains the generator only [code: 10,000 of 30,000 steps].
        head_hidden: width of the head.
        head_dropout: dropout in the head.
        joint: False: the U-Net does not learn from the classifier, as in the paper's ablation [text].
        local_start: a local phase starts from the "global" network [text], or from "scratch" [code for CIFAR].
        local_train_steps: steps of a local phase for each new class; None: those of an adapter [ours].
        new_images: images of new classes in global phases: drawn by the "local" network [code], or "real" [ours].
        agree: leave out drawn images to which the network that draws them gives another class, but keep a tenth of each class
            [ours; the code does so when it draws by class].

    The other options say how images are drawn, as those of `replay`.
    """

    classification_weight: Weight = 1e-3
    simple_weight: Weight = 0.01
    distillation_weight: Weight = 1.0
    global_classification_weight: Weight = 1e-5
    classification_distillation_weight: Weight = 1e-3
    wait: Share = 0.3333
    head_hidden: Count = 1024
    head_dropout: Share = 0.1
    joint: bool = True
    local_start: Annotated[str, one_of("global", "scratch")] = "global"
    local_train_steps: Count | None = None
    new_images: Annotated[str, one_of("local", "real")] = "local"
    agree: bool = False


class Jdcl(Finetune):
    """Trains a joint network on a task's real images (local), then one of all classes on drawn images (global).

    In a global phase, the network before the task teaches the past classes, and the local one the new classes.
    """

    name = "jdcl"
    options_class = JdclOptions
    trains_own_base = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        checkpoints = setting.output_dir / "checkpoints"
        self.heads = KeptFile(checkpoints / "classifier")
        self.local = KeptFile(checkpoints / "local")
        self.images = GeneratedImages(checkpoints / "replay", self.options, setting.training.seed)
        self._teachers: tuple[JointNet, ...] = ()
        self._drawn: dict[int, Tensor] = {}

    def check(self) -> None:
        super().check()
        check_readable(base_shape(self.setting))

    def phases(self, task: Task) -> list[Phase]:
        phases = super().phases(task)
        if task.index == 0:
            return phases
        settings, steps = self.scaled(len(task.class_ids)), self.options.local_train_steps
        if steps is not None:
            settings = replace(settings, train_steps=steps * len(task.class_ids), epochs=None)
        return [Phase(f"{_LOCAL}{task.index + 1}", task.class_ids, settings, independent=False), *phases]

    def phase_settings(self, task: Task) -> PhaseSettings:
        return self.scaled_to_seen(task)

    def replay_evaluations(self, task: Task) -> int:
        per_image = expected_evaluations(self.options.solver, self.options.num_inference_steps)
        return sum(self._counts(task).values()) * per_image

    def is_finished(self, phase: Phase) -> bool:
        # The task's end deletes the local network.
        of_local = _is_local(phase) and self.local.path(self.task_of(phase)).is_file()
        return of_local or super().is_finished(phase)

    def build(self, phase: Phase) -> Trainable:
        task, head = self.task_of(phase), self.heads.newest(self.setting.tasks[: self.task_of(phase).index])
        if task.index == 0 or (_is_local(phase) and self.options.local_start == "scratch"):
            unet, head = trainable_unet(self.setting, len(self.setting.seen(task))).module, None
        else:
            unet = super().build(phase).module
        net = self._net(unet, task, head).train()
        if _is_global(phase):
            self._teachers = self._build_teachers(task)
        # Those of the U-Net have their own names, as in `Finetune`.
        of_head = {f"head.{name}": parameter for name, parameter in net.head.named_parameters()}
        return Trainable(net, {**dict(unet.named_parameters()), **of_head})

    def make_batch(self, phase: Phase, real: Batch) -> Batch:
        if not _is_global(phase):
            return real
        task = self.task_of(phase)
        if not self._drawn:
            self._drawn = self._draw(task)
        # The more classes are drawn, the fewer are real: with "local", none is.
        return mix(real, self._drawn, len(self.setting.seen(task)) - len(self._drawn))

    def training_step(self, phase: Phase, batch: Batch, module: nn.Module) -> Tensor:
        options, task = self.options, self.task_of(phase)
        rows = label_rows(self.setting.seen(task), batch.class_ids)
        noisy = interpolate(batch.sample, batch.noise, batch.sigma, check_range=False)
        timestep = sigma_to_timestep(batch.sigma, check_range=False)
        inputs = (noisy, timestep, on_device(rows, noisy.device), batch.sample)
        velocity, logits = module(*inputs)
        generation = flow_matching_loss(velocity, velocity_target(batch.sample, batch.noise))
        classification = functional.cross_entropy(logits, inputs[2], reduction="none")
        if not _is_global(phase):
            return generation + options.classification_weight * classification
        taught, probabilities = self._taught(task, rows, inputs)
        begun = batch.number >= options.wait * self._num_batches(phase)
        soft = functional.cross_entropy(logits, probabilities, reduction="none")
        # With a factor in place of a branch, every process has a gradient of every parameter.
        return (
            options.simple_weight * generation
            + options.distillation_weight * 2 * flow_matching_loss(velocity, taught)
            + begun * options.global_classification_weight * classification
            + begun * options.classification_distillation_weight * 2 * soft
        )

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        net, task = trainable.module, self.task_of(phase)
        if _is_local(phase):
            self.local.save(task, net.state_dict())
            return
        # The generator's file is last, since it says that the phase is finished.
        self.heads.save(task, net.head.state_dict())
        super().end_phase(phase, Trainable(net.unet, trainable.parameters))

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        super().release_phase(phase, trainable)
        self._teachers, self._drawn = (), {}

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.heads.drop_before(task, self.setting.tasks)
        self.images.delete()
        shutil.rmtree(self.local.folder, ignore_errors=True)

    def own_classifier(self) -> nn.Module | None:
        newest = self.heads.newest(self.setting.tasks)
        return None if newest is None else JointClassifier(self._kept_net(newest))

    def memory_report(self) -> dict[str, int]:
        report, newest = super().memory_report(), self.heads.newest(self.setting.tasks)
        if newest is not None:
            head, unet = self._head(newest), base_shape(self.setting)
            report["persistent"] += tensor_bytes(self.heads.path(newest))
            report["per_class"] += bytes_of(head[-1])
            # The head's training, both teachers, and the images of the last task, which has the most.
            pixels = unet.config["in_channels"] * unet.config["sample_size"] ** 2
            images = sum(self._counts(self.setting.tasks[-1]).values()) * pixels
            report["transient"] += 6 * bytes_of(head) + 2 * bytes_of(unet) + images
        return report

    def _counts(self, task: Task) -> dict[int, int]:
        """Return the number of images to draw of each class for a task's global phase."""
        given, real = self.options.images_per_class, self.setting.num_images
        seen = () if task.index == 0 else self.setting.seen(task)
        drawn = [c for c in seen if c not in task.class_ids or self.options.new_images == "local"]
        return {class_id: given or real[class_id] for class_id in drawn}

    def _num_batches(self, phase: Phase) -> int:
        training = self.setting.training
        images = sum(self.setting.num_images[class_id] for class_id in phase.class_ids)
        return phase_steps(phase.settings, images, training) * training.gradient_accumulation_steps

    @cached_property
    def _num_features(self) -> int:
        unet = base_shape(self.setting)
        size = unet.config["sample_size"]
        return encode(unet, torch.empty(1, unet.config["in_channels"], size, size, device="meta")).shape[1]

    def _head(self, task: Task, kept: Task | None = None) -> nn.Sequential:
        """Return a head for the classes up to a task; it takes the weights and rows that the one of an earlier task has."""
        options, classes = self.options, len(self.setting.seen(task))
        head = build_head(self._num_features, classes, hidden=options.head_hidden, dropout=options.head_dropout)
        state = head.state_dict()
        for name, tensor in self.heads.load(kept).items():
            state[name][: len(tensor)] = tensor
        return head

    def _net(self, unet: UNet2DModel, task: Task, kept: Task | None = None) -> JointNet:
        return JointNet(unet, self._head(task, kept), joint=self.options.joint).to(self.setting.device)

    def _kept_net(self, task: Task) -> JointNet:
        """Return the network after a task; its U-Net is the one that samples."""
        unet = self.sampler(self.kept.newest([task])).unet
        return self._net(unet, task, task).eval()

    def _build_teachers(self, task: Task) -> tuple[JointNet, JointNet]:
        """Return the network before a task, and the local one."""
        unet, _ = self._unet(task, {})
        arrange(unet, self.setting.training, compiled=False)
        local = self._net(unet, task)
        local.load_state_dict(self.local.load(task))
        before = self._kept_net(self.setting.tasks[task.index - 1])
        return before.requires_grad_(False), local.eval().requires_grad_(False)

    def _draw(self, task: Task) -> dict[int, Tensor]:
        """Return images by class: of past classes from the network before the task, of new ones from the local network."""
        setting, counts, images = self.setting, self._counts(task), {}
        past = setting.seen(setting.tasks[task.index - 1])
        sources = (("replay", past, past), ("local", task.class_ids, setting.seen(task)))
        for teacher, (purpose, mine, known) in zip(self._teachers, sources, strict=True):
            pipe = make_pipeline(teacher.unet, known, setting.class_names)
            wanted = {class_id: counts[class_id] for class_id in mine if class_id in counts}
            for class_id, drawn in self.images.draw(pipe, wanted, f"{purpose}_{task.index + 1}").items():
                row, size = known.index(class_id), self.options.sampling_batch_size
                images[class_id] = agreeing(teacher, drawn, row, size) if self.options.agree else drawn
        return images

    @torch.no_grad()
    def _taught(self, task: Task, rows: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return each sample's velocity and class probabilities by its teacher, which knows no class after its own: 0.

        Args:
            rows: on the CPU, where it is known without waiting for a device which samples are whose.
            inputs: those of `JointNet`.
        """
        noisy, past = inputs[0], len(self.setting.seen(self.setting.tasks[task.index - 1]))
        velocity = torch.zeros_like(noisy)
        probabilities = noisy.new_zeros(len(noisy), len(self.setting.seen(task)))
        for teacher, mine in zip(self._teachers, (rows < past, rows >= past), strict=True):
            if mine.any():
                samples = on_device(mine.nonzero().flatten(), noisy.device)
                predicted, logits = teacher(*(one[samples] for one in inputs))
                velocity[samples] = predicted.to(velocity.dtype)
                probabilities[samples, : logits.shape[1]] = logits.softmax(dim=1)
        return velocity, probabilities


@torch.no_grad()
def agreeing(teacher: JointNet, images: Tensor, row: int, batch_size: int) -> Tensor:
    """Return the images, in their order, whose likeliest class is `row`, and, below a tenth of all, the likeliest of the others.

    Args:
        teacher: in evaluation mode.
        images: uint8, `(n, channels, height, width)`, on the CPU.
        row: of the logits.
        batch_size: images at once.
    """
    device = next(teacher.parameters()).device
    parts = (to_model_range(on_device(part, device)) for part in images.split(batch_size))
    probabilities = torch.cat([teacher.classify(part).softmax(dim=1).cpu() for part in parts])
    agrees = probabilities.argmax(dim=1) == row
    kept = max(int(agrees.sum()), math.ceil(_LEAST_KEPT * len(images)))
    return images[(agrees + probabilities[:, row]).topk(kept).indices.sort().values]


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _is_local(phase: Phase) -> bool:
    return phase.name.startswith(_LOCAL)


def _is_global(phase: Phase) -> bool:
    return not _is_local(phase) and phase.name != BASE_PHASE
