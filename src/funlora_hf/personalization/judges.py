"""Judges of images of concepts, and of base prompts: of each image, by the name of the score.

Every judge also has features, by which it says how alike images are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch.nn import functional

from ..evaluation.features import FeatureExtractor, extract_features
from .arguments import ConceptEvaluationArguments
from .concepts import Concept
from .pictures import load_images
from .scores import ClipFeatures, DinoFeatures, clip_score, image_similarity, text_similarity
from .tiny import tiny_dual_encoder
from .tiny.reader import VALUES, features, read
from .tiny.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES
from .tiny.shore import shows_water


Scores = dict[str, torch.Tensor]
# Images whose features are computed at once.
_BATCH = 64


class Judge(Protocol):
    """Gives scores of images, uint8 `(n, 3, h, w)`."""

    def concept(self, images: torch.Tensor, concept: Concept, prompts: Sequence[str]) -> Scores:
        """Score images of a concept: `(n,)` by name. `prompts`: n, as the base knows them."""

    def base(self, images: torch.Tensor, prompts: Sequence[str]) -> Scores:
        """Score how images follow prompts without a new token: `(n,)` by name."""

    def similarity(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return the cosine of the features of each pair of images, `(n,)`."""


class TinyJudge:
    """The reader of the tiny base: what a concept is, it reads from the reference pictures.

    Scores of a concept: "attr", the share of its attributes that are right; "whole", 1 if all are; "background", 1 if it is that of
    the prompt; "sim", the mean cosine of features to the references. Of a style, which is that of `shore`: "attr", 1 if there is
    water, as in the references; "whole", 1 if also shape, colour and size are as told. Of base prompts: 1 for each word that is right.
    """

    _WORDS: Mapping[str, Sequence[str]] = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES}

    def concept(self, images: torch.Tensor, concept: Concept, prompts: Sequence[str]) -> Scores:
        references, found = load_images(concept.references, size=images.shape[-1]), read(images)
        sims = functional.cosine_similarity(features(images)[:, None], features(references)[None], dim=-1)
        scores = (
            self._style(images, references, prompts) if concept.is_style else self._subject(found, concept, references)
        )
        return {**scores, "sim": sims.mean(dim=1), **self._background(found, prompts)}

    def base(self, images: torch.Tensor, prompts: Sequence[str]) -> Scores:
        found = read(images)
        scores = {name: (read_as == told).float() for name, (read_as, told) in self._told(found, prompts).items()}
        return {**scores, **self._background(found, prompts)}

    @staticmethod
    def _subject(found: Mapping[str, torch.Tensor], concept: Concept, references: torch.Tensor) -> Scores:
        wanted = {name: values.mode().values for name, values in read(references).items()}
        # A toy has no size, and only a toy has a second shape.
        absent = {"size", "background"} | (set() if concept.noun == "toy" else {"second_shape"})
        if concept.noun in SHAPES:
            absent = {"background", "sign", "second_shape", "second_colour"}
        right = torch.stack([found[name] == wanted[name] for name in VALUES if name not in absent]).float()
        return {"attr": right.mean(dim=0), "whole": right.amin(dim=0)}

    def _style(self, images: torch.Tensor, references: torch.Tensor, prompts: Sequence[str]) -> Scores:
        if not shows_water(references).all():
            # Another style, of which this reader knows nothing.
            return {}
        water = shows_water(images)
        follows = [(read_as == told) | (told < 0) for read_as, told in self._told(read(images), prompts).values()]
        return {"attr": water.float(), "whole": torch.stack([water, *follows]).all(dim=0).float()}

    def _told(
        self, found: Mapping[str, torch.Tensor], prompts: Sequence[str]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return, of each kind of word, what was read and what the prompts tell, `(n,)`; -1: nothing."""
        pairs = {}
        for name, words in self._WORDS.items():
            told = [next((i for i, word in enumerate(words) if word in text.split()), -1) for text in prompts]
            pairs[name] = (found["noun" if name == "shape" else name], torch.tensor(told))
        return pairs

    def similarity(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return functional.cosine_similarity(features(images), features(others))

    @staticmethod
    def _background(found: Mapping[str, torch.Tensor], prompts: Sequence[str]) -> Scores:
        told = [re.search(r"on a (\w+) background", prompt) for prompt in prompts]
        if not all(told):
            return {}
        names = list(BACKGROUNDS)
        wanted = torch.tensor([names.index(one[1]) if one and one[1] in names else -1 for one in told])
        return {"background": (found["background"] == wanted).float()}


class _FeatureJudge:
    """Judges by the features of an extractor."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return features of images, `(n, d)`, on the CPU."""
        return extract_features(self.extractor, images, batch_size=_BATCH).cpu()

    def to_references(self, found: torch.Tensor, concept: Concept, size: int) -> torch.Tensor:
        """Return the mean cosine of features `(n, d)` to those of a concept's references, read in this size, `(n,)`."""
        return image_similarity(found, self.features(load_images(concept.references, size=size)))

    def similarity(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return functional.cosine_similarity(self.features(images), self.features(others))


class ClipJudge(_FeatureJudge):
    """Scores of a concept: "clip_i", the mean cosine to the references; "clip_t", the cosine to the prompt without the token; "clip_score",
    of which papers print 100 times: 2.5 max(clip_t, 0). Of base prompts: "clip_t".
    """

    extractor: ClipFeatures

    def concept(self, images: torch.Tensor, concept: Concept, prompts: Sequence[str]) -> Scores:
        found = self.features(images)
        cosines = text_similarity(found, self._texts(prompts))
        to_references = self.to_references(found, concept, images.shape[-1])
        return {"clip_i": to_references, "clip_t": cosines, "clip_score": clip_score(cosines)}

    def base(self, images: torch.Tensor, prompts: Sequence[str]) -> Scores:
        return {"clip_t": text_similarity(self.features(images), self._texts(prompts))}

    def _texts(self, prompts: Sequence[str]) -> torch.Tensor:
        texts = list(dict.fromkeys(prompts))
        return self.extractor.texts(texts)[[texts.index(prompt) for prompt in prompts]].cpu()


class DinoJudge(_FeatureJudge):
    """Score of a concept: "dino_i", the mean cosine to the references."""

    def concept(self, images: torch.Tensor, concept: Concept, prompts: Sequence[str]) -> Scores:
        return {"dino_i": self.to_references(self.features(images), concept, images.shape[-1])}

    def base(self, images: torch.Tensor, prompts: Sequence[str]) -> Scores:
        return {}


def judges(config: ConceptEvaluationArguments, *, tiny: bool, device: torch.device) -> list[Judge]:
    """Load the judges that a run asks for; the first one's features say how far base prompts have changed."""
    clip = config.clip_model or (tiny_dual_encoder() if tiny else None)
    found: list[Judge] = [TinyJudge()] if tiny else []
    found += [] if clip is None else [ClipJudge(ClipFeatures(str(clip), device=device))]
    found += [] if config.dino_model is None else [DinoJudge(DinoFeatures(config.dino_model, device=device))]
    return found
