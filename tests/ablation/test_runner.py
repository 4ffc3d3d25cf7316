from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
from runs import short_run

from funlora_hf.ablation.runner import AblationArguments, with_changes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": []}, r"`seeds` is \[\], expected different numbers"),
        ({"seeds": [1, 1]}, r"`seeds` is \[1, 1\], expected different numbers"),
        ({"num_workers": 0}, "`num_workers` should be a positive integer"),
        ({"learning_rates": [0.01, -1.0]}, "`learning_rates` has -1, expected numbers above 0"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        AblationArguments(**arguments)


def test_changes_reach_the_part_they_belong_to_and_leave_the_rest():
    reference = short_run()
    changed = with_changes(reference, {"seed": 7, "function": "power", "solver": "euler", "num_tasks": 1})
    assert (changed.training.seed, changed.model.function, changed.evaluation.solver) == (7, "power", "euler")
    assert changed.data.num_tasks == 1
    assert changed.training.base_train_steps == reference.training.base_train_steps
    assert reference.model.function == "cosine"


WORKERS = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from funlora_hf.ablation.runner import end_with_parent

def work():
    print(os.getpid(), flush=True)
    time.sleep(300)

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)
    pool.submit(work).result()
"""


def has_ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # nobody may be there to ask how it ended
    except psutil.NoSuchProcess:
        return True


def test_a_busy_worker_ends_when_the_ablation_is_killed(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        assert not has_ended(worker)
        parent.kill()
        for _ in range(600):
            if has_ended(worker):
                break
            time.sleep(0.1)
    assert has_ended(worker)
