from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from funlora_hf.continual.config import ContinualTrainingArguments
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.continual.strategy import Phase, PhaseSettings
from funlora_hf.data.tasks import Task
from funlora_hf.evaluation.task_log import TaskLog
from funlora_hf.utils.files import write_json


TASKS = [Task(0, (0, 1)), Task(1, (2, 3)), Task(2, (4,)), Task(3, (5,))]
STEPS = PhaseSettings(10, None, 4, 0.1, 0, 0.5, 0.0)


@pytest.fixture
def log(tmp_path):
    """Of a run of a base and a phase of 40 images a class, without records."""
    setting = SimpleNamespace(
        tasks=TASKS,
        class_names={0: "a", 1: "b", 2: "c", 3: "d", 4: "e", 5: "f"},
        has_base=False,
        num_images={},
        training=ContinualTrainingArguments(),
        seen=lambda task: tuple(c for one in TASKS[: task.index + 1] for c in one.class_ids),
    )
    phases = lambda task: [Phase(f"class_{c}", (c,), STEPS, independent=True) for c in task.class_ids]  # noqa: E731
    evaluator = SimpleNamespace(
        strategy=SimpleNamespace(setting=setting, phases=phases),
        folder=RunFolder(tmp_path),
        accelerator=SimpleNamespace(is_main_process=True, num_processes=1),
        config=SimpleNamespace(evaluation=True),
        records=lambda: [None] * 4,
        sampled_classes=lambda task: task.class_ids,
    )
    return TaskLog(evaluator)


def trained(log, name, seconds, images, task):
    record = {"seconds": seconds, "images": images, "task": task}
    write_json(log.folder.checkpoints / "seconds" / f"{name}.json", record)


def test_the_base_s_speed_counts_until_another_phase_is_done(log):
    trained(log, "base", 100.0, 1000, 0)
    # Four classes of 40 images are left, at 0.1 s each.
    assert log.seconds_left(TASKS[0]) == pytest.approx(16)
    trained(log, "class_2", 4.0, 40, 1)
    trained(log, "class_3", 12.0, 40, 1)
    assert log.seconds_left(TASKS[1]) == pytest.approx(2 * 8)
    log.evaluator.accelerator.num_processes = 2
    assert log.seconds_left(TASKS[1]) == pytest.approx(8)
    assert log.seconds_left(TASKS[3]) == 0


def test_sampling_counts_by_the_classes_sampled_and_the_classifier_by_those_seen(log):
    record = {"accuracies": [100.0], "seconds": {"sampling": 6.0, "classifier": 4.0}}
    log.evaluator.records = lambda: [record, None, None, None]
    # 3 s for each of the four new classes, 2 s for each class of 4, 5 and 6.
    assert log.seconds_left(TASKS[0]) == pytest.approx(3 * 4 + 2 * (4 + 5 + 6))
    log.evaluator.config.evaluation = False
    assert log.seconds_left(TASKS[0]) == 0


def test_the_line_of_a_task(log, caplog):
    caplog.set_level(logging.INFO)
    trained(log, "class_2", 4.0, 40, 1)
    trained(log, "class_3", 8.0, 40, 1)
    log.end_task(TASKS[1])
    record = {"accuracies": [99.0, 99.6], "seconds": {"sampling": 0.0, "classifier": 0.0}}
    log.evaluator.records = lambda: [None, record, None, record]
    log.end_task(TASKS[1])
    log.end_task(TASKS[3])
    log.setting.has_base = True
    log.end_task(TASKS[0])
    assert caplog.messages == [
        "task 2 of 4: classes c, d learned in 12 s; about 12 s left",
        "task 2 of 4: classes c, d learned in 12 s, accuracy 99.3 %; about 12 s left",
        "task 4 of 4: class f learned in 0 s, accuracy 99.3 %",
        "task 1 of 4: classes a, b of the base; about 24 s left",
    ]
