"""Measures two concepts of the tiny base in one picture, side by side: one prompt for both against a region for each.

python examples/measure_regions.py outputs/concepts

Pictures are twice as wide as those that the concepts were learned from. A reader reads the left half and the right half for itself: `own` is
the share of the attributes of the concept that belongs there, `other` of those of its neighbour, which also share some.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

import torch

from funlora_hf.personalization.concepts import Concept, load_concepts
from funlora_hf.personalization.found_concepts import find_concepts
from funlora_hf.personalization.judges import TinyJudge
from funlora_hf.personalization.regions import Region
from funlora_hf.personalization.sampling import sample_prompts
from funlora_hf.personalization.tiny.scenes import RESOLUTION


_HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
_BACKGROUND = "on a white background"


def images_of(run: str, pair: Sequence[Concept], num_images: int) -> dict[str, list[torch.Tensor]]:
    """For each way to draw, the left halves and the right halves of its images, uint8 `(n, 3, 32, 32)`."""
    left, right = (concept.prompt(f"a photo of a {{}} {_BACKGROUND}") for concept in pair)
    both = f"{pair[0].prompt('a photo of a {}')} and {pair[1].prompt('a {}')}"
    regions = [Region(box, prompt) for box, prompt in zip(_HALVES, (left, right), strict=True)]
    how = {"num_images": num_images, "width": 2 * RESOLUTION}
    together, one, other = (row.images.chunk(2, dim=-1) for row in sample_prompts(run, [both, left, right], **how))
    (row,) = sample_prompts(run, [f"a photo {_BACKGROUND}"], regions=regions, **how)
    return {
        "one prompt with both": list(together),
        "a region for each": list(row.images.chunk(2, dim=-1)),
        "each alone in the picture": [one[0], other[1]],
    }


def scores(run: str, num_images: int) -> dict[str, tuple[float, float]]:
    """Return by the way to draw `own` and `other`, means over neighbours in the order of learning, their halves and images."""
    names = {one.record.name for one in find_concepts(run).saved()}
    concepts = [concept for concept in load_concepts("tiny") if concept.name in names]
    if len(concepts) < 2:
        raise ValueError(f"{run!r} has {len(concepts)} concepts of the tiny base, expected at least 2.")
    judge, found = TinyJudge(), {}
    for pair in pairwise(concepts):
        for way, halves in images_of(run, pair, num_images).items():
            for half, own, other in zip(halves, pair, pair[::-1], strict=True):
                read = [judge.concept(half, concept, [""])["attr"].mean().item() for concept in (own, other)]
                found.setdefault(way, []).append(read)
    return {way: tuple(map(fmean, zip(*rows, strict=True))) for way, rows in found.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run of `funlora personalize` on the tiny base")
    parser.add_argument("--num_images", type=int, default=8, help="of each pair and way (default: %(default)s)")
    arguments = parser.parse_args()
    print("| | own | other |\n|---|---|---|")
    for way, (own, other) in scores(arguments.run, arguments.num_images).items():
        print(f"| {way} | {own:.2f} | {other:.2f} |")


if __name__ == "__main__":
    main()
