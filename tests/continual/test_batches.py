from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funlora_hf.continual import batches as batches_module
from funlora_hf.continual.batches import PhaseBatches
from funlora_hf.continual.strategy import Phase, PhaseSettings
from funlora_hf.flow_matching import expected_velocity, interpolate
from funlora_hf.utils.seeds import generator_for


# Products of matrices of other sizes are rounded differently, and images that differ by one grey level show it.
ROUNDING = {"atol": 1e-3, "rtol": 1e-3}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Images:
    """Two classes whose images tell which one they are: class 4 has the values 0..4, class 6 the values 100..102."""

    class_names = {4: "four", 6: "six"}  # noqa: RUF012

    def images(self, class_id: int) -> torch.Tensor:
        values = torch.arange(5) if class_id == 4 else torch.arange(100, 103)
        images = values.to(torch.uint8)[:, None, None, None].repeat(1, 1, 2, 2)
        images[..., 1] += 1  # not symmetric, so that a flip shows
        return images


def batches(
    batch_size: int = 4,
    name: str = "p",
    random_flip: bool = False,
    seed: int = 0,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.preserve_format,
    **kwargs,
) -> PhaseBatches:
    phase_settings = PhaseSettings(1, None, batch_size, 1e-3, 0, 0.9, 0.0, **kwargs)
    phase = Phase(name, (4, 6), phase_settings, independent=False)
    return PhaseBatches(
        Images(),
        phase,
        seed=seed,
        timestep_density="uniform",
        random_flip=random_flip,
        device=torch.device(device),
        memory_format=memory_format,
    )


def values(batch) -> list[int]:
    return ((batch.sample[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@given(batch_size=st.integers(1, 20), epochs=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_every_epoch_sees_every_image_once(batch_size, epochs):
    source = batches(batch_size)
    seen = []
    number = 0
    while len(seen) < 8 * epochs:
        seen += values(source.batch(number))
        number += 1
    for epoch in range(epochs):
        assert Counter(seen[8 * epoch : 8 * (epoch + 1)]) == Counter([0, 1, 2, 3, 4, 100, 101, 102])


def test_labels_go_with_their_images():
    batch = batches().batch(3)
    assert batch.class_ids.tolist() == [4 if value < 100 else 6 for value in values(batch)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("num_shares", [2, 3, 4])
def test_shares_make_up_the_whole_batch(num_shares, pairs, device):
    source = batches(10, random_flip=True, device=device, target="expected", pairs=pairs)
    whole = source.batch(5)
    shares = [source.batch(5, share=share, num_shares=num_shares) for share in range(num_shares)]
    for name in ("sample", "class_ids", "noise", "sigma"):
        joined = torch.cat([getattr(share, name) for share in shares])
        order = np.concatenate([np.arange(share, 10, num_shares) for share in range(num_shares)])
        assert torch.equal(joined, getattr(whole, name)[order])
    torch.testing.assert_close(torch.cat([share.target for share in shares]), whole.target[order], **ROUNDING)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("random_flip", [False, True])
def test_the_expected_target_is_over_the_images_of_the_sample_s_own_class(random_flip, device):
    plain = batches(40, random_flip=random_flip, device=device).batch(2)
    batch = batches(40, random_flip=random_flip, device=device, target="expected").batch(2)
    assert plain.target is None
    for name in ("sample", "class_ids", "noise", "sigma"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    noisy = interpolate(batch.sample, batch.noise, batch.sigma)
    for row, class_id in enumerate(batch.class_ids.tolist()):
        images = Images().images(class_id).to(device) / 127.5 - 1
        images = torch.cat([images, images.flip(-1)]) if random_flip else images
        found = expected_velocity(noisy[row : row + 1], batch.sigma[row : row + 1], images)
        torch.testing.assert_close(batch.target[row], found[0], **ROUNDING)


@pytest.mark.parametrize("device", DEVICES)
def test_the_second_half_of_pairs_is_the_first_with_opposite_noise(device):
    source = batches(10, random_flip=True, device=device, pairs=True)
    for number in range(3):
        batch = source.batch(number)
        for name in ("sample", "class_ids", "sigma"):
            first, second = getattr(batch, name).chunk(2)
            assert torch.equal(first, second)
        first, second = batch.noise.chunk(2)
        assert torch.equal(first, -second)
    seen = Counter(value for number in range(8) for value in values(batches(10, pairs=True).batch(number))[:5])
    assert set(seen.values()) == {5}


def test_images_are_converted_once_for_the_expected_target(monkeypatch):
    source, converted, convert = batches(4, target="expected"), [], batches_module.to_model_range
    monkeypatch.setattr(batches_module, "to_model_range", lambda x: converted.append(len(x)) or convert(x))
    for number in range(3):
        source.batch(number)
    assert sorted(converted) == [3, 4, 4, 4, 5]


def test_a_batch_depends_on_seed_phase_and_number_only():
    reference = batches().batch(7)
    torch.rand(3)
    again = batches()
    again.batch(2)
    same = again.batch(7)
    assert torch.equal(same.noise, reference.noise)
    assert values(same) == values(reference)
    for other in (batches(seed=1).batch(7), batches(name="q").batch(7), batches().batch(8)):
        assert not torch.equal(other.noise, reference.noise)


@given(
    seed=st.integers(0, 2**31),
    phase=st.text(min_size=1, max_size=8),
    batch_size=st.integers(1, 19),
    numbers=st.lists(st.integers(0, 15), min_size=1, max_size=4),
    processes=st.integers(1, 4),
    elsewhere=st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_what_a_class_sees_is_a_function_of_seed_phase_and_step(
    seed, phase, batch_size, numbers, processes, elsewhere
):
    """Whatever was asked for before, as after a resume; on any number of processes; whatever the global generators say."""
    arguments = {"batch_size": batch_size, "name": phase, "seed": seed, "random_flip": True}
    whole, shared = batches(**arguments), [batches(**arguments) for _ in range(processes)]
    in_order = {number: whole.batch(number) for number in range(max(numbers) + 1)}
    for number in numbers:
        torch.manual_seed(elsewhere)
        np.random.seed(elsewhere % 2**32)
        state = torch.get_rng_state()
        parts = [source.batch(number, share=i, num_shares=processes) for i, source in enumerate(shared)]
        assert torch.equal(torch.get_rng_state(), state)
        order = np.concatenate([np.arange(share, batch_size, processes) for share in range(processes)])
        for name in ("sample", "class_ids", "noise", "sigma"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(in_order[number], name)[order])


def test_one_image_is_every_image_of_its_epochs():
    class One(Images):
        def images(self, class_id):
            return super().images(class_id)[:1]

    phase = Phase("p", (4,), PhaseSettings(1, None, 3, 1e-3, 0, 0.9, 0.0), independent=True)
    source = PhaseBatches(One(), phase, seed=0, timestep_density="uniform", random_flip=False)
    assert [values(source.batch(number)) for number in range(3)] == [[0, 0, 0]] * 3
    # It is the same image, and not the same noise.
    assert len(source.batch(0).noise.flatten(1).unique(dim=0)) == 3


def test_a_class_without_images_is_named():
    class Without(Images):
        def images(self, class_id):
            return super().images(class_id)[: 0 if class_id == 6 else None]

    phase = Phase("task_2", (4, 6), PhaseSettings(1, None, 3, 1e-3, 0, 0.9, 0.0), independent=True)
    with pytest.raises(
        ValueError, match=r"Class 6 \(six\) of phase 'task_2' has no training image.*: add one, or leave"
    ):
        PhaseBatches(Without(), phase, seed=0, timestep_density="uniform", random_flip=False)


def test_flips_mirror_about_half_of_the_images():
    plain, flipped = batches(2000).batch(0), batches(2000, random_flip=True).batch(0)
    mirrored = (flipped.sample != plain.sample).flatten(1).any(dim=1)
    assert torch.equal(flipped.sample[mirrored], plain.sample[mirrored].flip(-1))
    assert 0.45 < mirrored.float().mean() < 0.55


def test_a_batch_is_what_it_has_always_been():
    """Written out once more: which generator, and in what order it is drawn from."""
    source = batches(6, random_flip=True)
    batch = source.batch(3)
    order = torch.cat([torch.randperm(8, generator=generator_for(0, "p", "order", epoch)) for epoch in (2, 3)])[2:8]
    generator = generator_for(0, "p", "batch", 3)
    sample = torch.cat([Images().images(4), Images().images(6)])[order].float() / 127.5 - 1
    flip = torch.rand(6, generator=generator) < 0.5
    sample[flip] = sample[flip].flip(-1)
    sigma = torch.rand(6, generator=generator)
    assert torch.equal(batch.sample, sample)
    assert torch.equal(batch.sigma, sigma)
    assert torch.equal(batch.noise, torch.randn(6, 1, 2, 2, generator=generator))
    assert batch.class_ids.tolist() == [4 if index < 5 else 6 for index in order]


@pytest.mark.parametrize("device", DEVICES)
def test_images_too_many_for_the_device_give_the_same_batches(device, monkeypatch):
    expected = batches(random_flip=True, device=device).batch(3)
    monkeypatch.setattr(batches_module, "MOST_BYTES_ON_DEVICE", 0)
    source = batches(random_flip=True, device=device)
    assert source.images.device.type == "cpu"
    for name in ("sample", "class_ids", "noise", "sigma"):
        assert torch.equal(getattr(source.batch(3), name), getattr(expected, name))


def test_images_of_a_phase_lie_on_the_device(monkeypatch):
    """The meta device stands for one that is not the CPU, but has no random numbers."""
    monkeypatch.setattr(PhaseBatches, "_noise", lambda self, shape, *_: torch.empty(shape, device="meta"))
    for limit, place in ((8 * 4, "meta"), (8 * 4 - 1, "cpu")):
        monkeypatch.setattr(batches_module, "MOST_BYTES_ON_DEVICE", limit)
        source = batches(random_flip=True, device="meta")
        assert source.images.device.type == place
    batch = source.batch(0)
    assert {getattr(batch, name).device.type for name in ("sample", "noise", "sigma")} == {"meta"}
    assert batch.class_ids.device.type == "cpu"


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
def test_a_gpu_draws_the_noise_itself_and_nothing_else():
    here, there = batches(random_flip=True).batch(3), batches(random_flip=True, device="cuda").batch(3)
    for name in ("sample", "class_ids", "sigma"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
    assert not torch.equal(there.noise.cpu(), here.noise)
    assert torch.equal(batches(random_flip=True, device="cuda").batch(3).noise, there.noise)


def test_the_memory_format_changes_no_value():
    plain, last = (
        batches(memory_format=f, target="expected").batch(3) for f in (torch.preserve_format, torch.channels_last)
    )
    for name in ("sample", "noise", "target"):
        assert getattr(last, name).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(getattr(last, name), getattr(plain, name))
