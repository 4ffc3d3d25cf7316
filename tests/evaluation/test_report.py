"""After which tasks the samples of all classes are drawn."""

import itertools

import pytest

from funlora_hf.data.tasks import Task
from funlora_hf.evaluation.report import recognised, tasks_with_grid


def tasks(count):
    return [Task(index, (index,)) for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 19, 20])
def test_few_tasks_all_have_a_grid(count):
    assert tasks_with_grid(tasks(count)) == tasks(count)


@pytest.mark.parametrize("count", [21, 50, 197, 1000])
def test_of_many_tasks_twenty_have_one_at_even_distances(count):
    drawn = [task.index for task in tasks_with_grid(tasks(count))]
    assert len(set(drawn)) == 20
    assert (drawn[0], drawn[-1]) == (0, count - 1)
    steps = [after - before for before, after in itertools.pairwise(drawn)]
    assert max(steps) - min(steps) <= 1


def test_recognised_is_of_the_last_task():
    rows = [{"0": {"accuracy": 1.0}}, {"0": {"accuracy": 99.0}, "5": {"accuracy": 90.0}}]
    assert recognised({"by_task": rows}) == {"mean": 94.5, "per_class": {"0": 99.0, "5": 90.0}}
    assert recognised({"by_task": [*rows, None]}) is recognised(None) is None
