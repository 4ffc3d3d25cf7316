"""How many guided images a judge accepts, by the largest weight of the guidance: how `largest_weight` was chosen.

    python examples/guidance_weights.py outputs/digits_ddgr --largest_weights 1 3 10 30 100 --output guidance_weights.json

Draws every class with the generator of a finished run of `replay`, `ddgr` or `guide`, as `ddgr` draws for one more task:
guided by the run's own classifier, always from the same noise. The judge is a support vector machine on the run's real training
images, which sees no drawn image before. "deviation" is that of the pixels within a class, as a share of the real images':
guidance makes images alike (below 1) or noise (above).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from seed_tables import markdown_table
from sklearn.svm import SVC

from funlora_hf import Guidance
from funlora_hf.continual.strategies.ddgr import log_probability
from funlora_hf.data.pixels import to_model_range
from funlora_hf.run import Run, RunArguments
from funlora_hf.sampling.drawing import draw_samples, to_uint8
from funlora_hf.utils.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--largest_weights", type=float, nargs="+", default=[1.0, 3.0, 10.0, 30.0, 100.0])
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--num_samples_per_class", type=int, default=100)
    parser.add_argument("--output", type=Path, help="JSON file for what is printed")
    given = parser.parse_args()
    try:
        rows = measure(given.run, given.largest_weights, given.guidance_scale, given.num_samples_per_class)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if given.output:
        write_json(given.output, rows)
    titles = ("largest weight", "judge accepts (%)", "the classifier itself (%)", "deviation")
    print(markdown_table(titles, [[format(value, ".4g") for value in row.values()] for row in rows]))


def measure(folder: Path, largest_weights: list[float], scale: float, count: int) -> list[dict[str, Any]]:
    """Return a row for each largest weight; the first row, of weight 0, is without guidance."""
    strategy, data = Run(RunArguments.of(folder), None).prepared()
    setting, classifier = strategy.setting, strategy.own_classifier()
    if classifier is None:
        raise ValueError(f"{folder} has kept no classifier, expected a finished run of 'replay', 'ddgr' or 'guide'.")
    classifier.requires_grad_(False)
    options: Any = strategy.options
    classes = setting.seen(setting.tasks[-1])
    real = {class_id: data.images(class_id).flatten(1).float() for class_id in classes}
    judge = SVC().fit(torch.cat([*real.values()]), [class_id for class_id in classes for _ in real[class_id]])
    rows = []
    for largest in (0.0, *largest_weights):
        accepted, own, deviations = [], [], []
        for row, class_id in enumerate(classes):
            score = partial(log_probability, classifier, row)
            with strategy.inference([class_id]) as pipe:
                samples = draw_samples(
                    pipe,
                    class_id,
                    count,
                    purpose="guidance_weights",
                    seed=setting.training.seed,
                    batch_size=options.sampling_batch_size,
                    solver=options.solver,
                    num_inference_steps=options.num_inference_steps,
                    guidance=Guidance(score, scale, largest) if largest else None,
                )
            images = to_uint8(samples.images)
            drawn = images.flatten(1).float()
            accepted.append((judge.predict(drawn) == class_id).mean())
            own.append((classifier(to_model_range(images)).argmax(dim=1) == row).float().mean())
            deviations.append(drawn.std(dim=0).mean() / real[class_id].std(dim=0).mean())
        means = [float(torch.tensor(values).mean()) for values in (accepted, own, deviations)]
        rows.append(
            {"largest_weight": largest, "accepted": 100 * means[0], "own": 100 * means[1], "deviation": means[2]}
        )
    return rows


if __name__ == "__main__":
    main()
