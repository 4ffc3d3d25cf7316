from __future__ import annotations

import hashlib

import torch

from funlora_hf.utils.seeds import derive_seed, generator_for


def test_a_seed_is_a_hash_of_its_keys_on_every_machine():
    expected = int.from_bytes(hashlib.sha256(b"7/class_3/batch/12").digest()[:8], "big") >> 1
    assert derive_seed(7, "class_3", "batch", 12) == expected < 2**63


def test_other_keys_give_other_seeds():
    seeds = {derive_seed(seed, name, step) for seed in range(5) for name in ("a", "b") for step in range(50)}
    assert len(seeds) == 500


def test_generators_repeat_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    first, second = (torch.rand(4, generator=generator_for(1, "x")) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
