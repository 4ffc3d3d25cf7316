"""Batches of concepts: what a cache, processes and prior images may change, and what they may not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from funlora_hf.continual.strategy import Phase, PhaseSettings
from funlora_hf.personalization import batches as batches_module
from funlora_hf.personalization.batches import ConceptBatch, ConceptBatches
from funlora_hf.personalization.concepts import Concept
from funlora_hf.personalization.pictures import load_images
from funlora_hf.personalization.prior import Prior
from funlora_hf.utils.seeds import generator_for


TENSORS = ("latents", "noise", "times", "concept_ids", "weights")


class Encoder:
    """A VAE with random weights that counts the images it encodes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, sample_size=8, norm_num_groups=4).eval()
        self.count = 0

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.count += len(images)
        found = [self.vae.encode(one[None].float() / 127.5 - 1).latent_dist for one in images]
        return torch.cat([one.mean for one in found]), torch.cat([one.std for one in found])


class Uniform:
    def times(self, n, generator):
        return torch.randint(1000, (n,), generator=generator)

    def noise(self, shape, generator):
        return torch.randn(shape, generator=generator)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture(scope="module")
def concepts(tmp_path_factory) -> dict[int, Concept]:
    """3: four pictures of a cat; 5: three of a dog. Their pictures have captions of their own."""
    folder, found = tmp_path_factory.mktemp("concepts"), {}
    pixels = np.random.default_rng(0)
    for number, name, count in ((3, "cat", 4), (5, "dog", 3)):
        images = tuple(folder / f"{name}{index}.png" for index in range(count))
        for path in images:
            Image.fromarray(pixels.integers(0, 255, (6, 10, 3), dtype=np.uint8)).save(path)
        captions = {path.name: f"<{name}> {path.stem}" for path in images}
        found[number] = Concept(name, f"<{name}>", name, name, f"a <{name}> {name}", (), images, captions)
    return found


def batches(encoder, concepts, *, name="p", size=4, seed=0, ids=(3, 5), **options) -> ConceptBatches:
    phase = Phase(name, ids, PhaseSettings(1, None, size, 1e-3, 0, 0.9, 0.0), independent=False)
    options = {"random_flip": True, "resolution": 8, **options}
    return ConceptBatches(encoder, concepts, phase, seed=seed, objective=Uniform(), **options)


def of_classes(concepts, **options) -> Prior:
    """Whose pictures, two each, are those of the other concept."""
    return Prior({one: classes(concepts, other, 2) for one, other in ((3, 5), (5, 3))}, **options)


def classes(concepts, number, count=3) -> dict[Path, str]:
    return {path: f"a {path.stem}" for path in concepts[number].images[:count]}


def assert_equal(one: ConceptBatch, other: ConceptBatch, order=slice(None)) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)[order]), name
    assert one.captions == np.array(other.captions)[order].tolist()


def test_a_cached_run_equals_one_that_encodes_each_batch(encoder, concepts, monkeypatch):
    """Written out once more, without a cache: which generator, and in what order it is drawn from."""
    monkeypatch.setattr(batches_module, "_AT_ONCE", 3)
    prior, number, size = of_classes(concepts, batch_size=3), 2, 4
    source = batches(encoder, concepts, prior=prior)
    encoded = encoder.count
    batch = source.batch(number)
    assert encoder.count == encoded
    order = []
    for kind, count, rows in (
        (
            "order",
            size,
            [(concepts[one].captions[path.name], one, path) for one in (3, 5) for path in concepts[one].images],
        ),
        ("class order", 3, [(f"a {path.stem}", one, path) for one in (3, 5) for path in prior.images[one]]),
    ):
        orders = [torch.randperm(len(rows), generator=generator_for(0, "p", kind, epoch)) for epoch in range(3)]
        order += [rows[row] for row in torch.cat(orders)[number * count : (number + 1) * count]]
    generator = generator_for(0, "p", "batch", number)
    flips = torch.rand(7, generator=generator) < 0.5
    times = torch.randint(1000, (7,), generator=generator)
    spread = torch.randn(7, 4, 8, 8, generator=generator)
    noise = torch.randn(7, 4, 8, 8, generator=generator)
    images = load_images([path for _, _, path in order], size=8)
    images[flips] = images[flips].flip(-1)
    mean, std = encoder.encode_images(images)
    weights = torch.tensor([1.0] * 4 + [4 / 3] * 3)
    ids = torch.tensor([one for _, one, _ in order])
    expected = ConceptBatch(mean + std * spread, noise, times, [text for text, _, _ in order], ids, weights)
    assert_equal(batch, expected)
    assert (batch.number, source.num_images) == (number, 7)
    assert 0 < flips.sum() < 7


@pytest.mark.parametrize("num_shares", [2, 3, 5])
def test_shares_make_up_the_whole_batch(encoder, concepts, num_shares):
    source = batches(encoder, concepts, prior=of_classes(concepts, batch_size=2))
    whole = source.batch(5)
    for share in range(num_shares):
        order = [*range(4)[share::num_shares], *range(4, 6)[share::num_shares]]
        assert_equal(source.batch(5, share=share, num_shares=num_shares), whole, order)


def test_a_batch_depends_on_seed_phase_and_number_only(encoder, concepts):
    reference = batches(encoder, concepts).batch(7)
    torch.manual_seed(3)
    again = batches(encoder, concepts)
    again.batch(2)
    assert_equal(again.batch(7), reference)
    for other in (batches(encoder, concepts, seed=1), batches(encoder, concepts, name="q"), again):
        assert not torch.equal(other.batch(8 if other is again else 7).noise, reference.noise)


def test_every_epoch_sees_every_picture_once(encoder, concepts):
    source = batches(encoder, concepts, size=5, random_flip=False)
    seen = [caption for number in range(7) for caption in source.batch(number).captions]
    for epoch in range(5):
        assert {*Counter(seen[7 * epoch : 7 * (epoch + 1)]).values()} == {1}


def test_flips(encoder, concepts):
    plain = batches(encoder, concepts, size=400, random_flip=False).batch(0)
    flipped = batches(encoder, concepts, size=400).batch(0)
    for name in ("noise", "times"):
        assert torch.equal(getattr(plain, name), getattr(flipped, name))
    changed = (plain.latents != flipped.latents).flatten(1).any(1)
    assert 0.4 < changed.float().mean() < 0.6


@pytest.mark.parametrize(("counts", "weight"), [((4, 3), 0.5), ((2, 5), 1.0), ((3, None), 2.0)])
def test_the_loss_is_dreambooths(encoder, concepts, counts, weight):
    """The sum over the processes, as the trainer takes it, is the mean of the subject plus the weighted mean of the class."""
    size, others = counts
    source = batches(encoder, concepts, size=size, prior=of_classes(concepts, loss_weight=weight, batch_size=others))
    whole = source.batch(1)
    losses = whole.latents.square().flatten(1).mean(1)
    expected = losses[:size].mean() + weight * losses[size:].mean()
    assert len(losses) == size + (others or size)
    for num_shares in (1, 2):
        shares = [source.batch(1, share=share, num_shares=num_shares) for share in range(num_shares)]
        sums = [(one.weights * one.latents.square().flatten(1).mean(1)).sum() * num_shares / size for one in shares]
        torch.testing.assert_close(torch.stack(sums).mean(), expected)


def test_only_the_concepts_of_the_phase_are_read(encoder, concepts):
    source = batches(encoder, concepts, ids=(5,), prior=Prior({5: classes(concepts, 3)}))
    assert source.num_images == 3
    assert {*source.batch(0).concept_ids.tolist()} == {5}
    with pytest.raises(ValueError, match="Concept 'cat' has no pictures of its class"):
        batches(encoder, concepts, prior=Prior({5: classes(concepts, 3)}))


def test_a_picture_that_is_gone_is_named(encoder, concepts, tmp_path):
    lost = Concept("cat", "<cat>", "cat", "cat", "a <cat> cat", (), (tmp_path / "lost.png",))
    with pytest.raises(ValueError, match=r"the picture '.*lost\.png' cannot be read"):
        batches(encoder, {**concepts, 3: lost})
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("size", [2, 4, 7])
def test_each_concept_old_or_new_has_the_same_share(encoder, concepts, size):
    """Every three rows have one of each concept, every picture of a concept comes before any comes again; classes are further rows."""
    earlier = {5: classes(concepts, 5), 7: {path: f"<7> {path.stem}" for path in concepts[5].images[:2]}}
    prior = Prior({3: classes(concepts, 5, 1)}, batch_size=1)
    source = batches(encoder, concepts, size=size, ids=(3,), replayed=earlier, prior=prior, random_flip=False)
    whole = [source.batch(number) for number in range(8)]
    ids = [row for one in whole for row in one.concept_ids[:size].tolist()]
    for start in range(0, len(ids) - 2, 3):
        assert sorted(ids[start : start + 3]) == [3, 5, 7]
    captions = [caption for one in whole for caption in one.captions[:size]]
    for number, known in (
        (3, {*concepts[3].captions.values()}),
        *((one, {*texts.values()}) for one, texts in earlier.items()),
    ):
        mine = [caption for one, caption in zip(ids, captions, strict=True) if one == number]
        assert {*mine[: len(known)]} == known
    assert {one.captions[-1] for one in whole} == {"a dog0"}
    assert source.num_images == 4
    shares = [source.batch(3, share=share, num_shares=2) for share in range(2)]
    for share, one in enumerate(shares):
        assert_equal(one, whole[3], [*range(share, size, 2), *[size][share::2]])
    plain = batches(encoder, concepts, size=size, ids=(3,), prior=prior, random_flip=False).batch(3)
    for name in ("noise", "times", "weights"):
        assert torch.equal(getattr(plain, name), getattr(whole[3], name))
