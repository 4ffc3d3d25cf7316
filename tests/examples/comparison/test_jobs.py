from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from comparisons import made_up_results
from runs import REPOSITORY, short_run

from comparison.jobs import Job, run_jobs, threads_per_worker, with_changes
from funlora_hf.continual.config import run_settings
from funlora_hf.utils.files import write_json


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY / "examples")}


def test_changes_reach_the_part_they_belong_to_and_leave_the_rest():
    reference = short_run()
    changed = with_changes(reference, {"seed": 7, "function": "power", "solver": "euler", "num_tasks": 1})
    assert (changed.training.seed, changed.model.function, changed.evaluation.solver) == (7, "power", "euler")
    assert changed.data.num_tasks == 1
    assert changed.training.base_train_steps == reference.training.base_train_steps
    assert reference.model.function == "cosine"


def test_unknown_changes_are_named():
    with pytest.raises(ValueError, match="`changes` has 'functoin'"):
        with_changes(short_run(), {"functoin": "power"})


def test_changes_may_overwrite_instead_of_going_on():
    going_on = with_changes(short_run(overwrite_output_dir=True), {})
    assert (going_on.training.resume_from_checkpoint, going_on.training.overwrite_output_dir) == ("latest", False)
    anew = with_changes(short_run(), {"overwrite_output_dir": True, "resume_from_checkpoint": None})
    assert (anew.training.resume_from_checkpoint, anew.training.overwrite_output_dir) == (None, True)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot limit a process to some cores")
def test_workers_share_the_cores_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_per_worker(workers) for workers in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_worker(2) is None


class Deadly(type(Path())):
    """A folder that kills the process that makes it, as the system does one that takes too much memory."""

    def mkdir(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)


def finished_job(folder, *, forgotten=None):
    """A job that only has to be read."""
    arguments = short_run(output_dir=str(folder))
    settings = run_settings(*(getattr(arguments, name) for name in ("data", "model", "training", "evaluation")))
    results = made_up_results("funlora", seed=0)
    zero_forgetting = {"identical": forgotten is None, "classes_compared": 10, "classes_changed": forgotten or []}
    zero_forgetting |= {"base_sha256_before": "0", "base_sha256_after": "0"}
    written = {"seconds": {"total": 1.0}, "settings": settings, "zero_forgetting": zero_forgetting}
    write_json(folder / "results.json", {**results, **written, "folder": folder.name})
    return Job(arguments, folder, f"run {folder.name}")


@pytest.mark.slow
def test_no_failure_loses_the_others(tmp_path, caplog, capsys):
    broken = Job(short_run(dataset_name=str(tmp_path / "nowhere")), tmp_path / "broken", "broken run")
    deadly = Job(short_run(), Deadly(tmp_path / "deadly"), "deadly run")
    forgetful = finished_job(tmp_path / "forgetful", forgotten=[3])
    jobs = [broken, deadly, forgetful, *(finished_job(tmp_path / name) for name in "abc")]
    first, second, third, *rest = run_jobs(jobs, 2, description="runs")
    assert (first.results, second.results) == (None, None)
    assert "nowhere" in first.error
    assert "Traceback" in (tmp_path / "broken" / "log.txt").read_text()
    assert "killed" in second.error
    # What failed when it was finished does not pass when it is read.
    assert (third.results, third.error.partition(":")[0]) == (None, "ForgettingError")
    assert [(outcome.results["folder"], outcome.error) for outcome in rest] == [("a", None), ("b", None), ("c", None)]
    # Those that ran again after a worker was killed, and finished, are not reported.
    failed = [record.message.partition(" failed, the others go on: ")[0] for record in caplog.records]
    assert sorted(failed) == ["broken run", "deadly run", "run forgetful"]
    # No bar where there is no terminal.
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("runs, ")]
    assert sorted(line.partition(": ")[2].partition(":")[0] for line in lines) == ["run a", "run b", "run c"]
    assert all(" of 6: run " in line and re.search(r": LA \d+\.\d\d %, 1 s$", line) for line in lines)


THREADS = """
import sys, torch
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from comparison.jobs import start_worker

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=start_worker, initargs=(3,)) as pool:
        print(pool.submit(torch.get_num_threads).result())
"""


@pytest.mark.slow
def test_a_worker_computes_with_its_threads(tmp_path):
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.strip() == "3"


WORKERS = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from comparison.jobs import end_with_parent

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


def test_a_busy_worker_ends_when_its_parent_is_killed(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        assert not has_ended(worker)
        parent.kill()
        for _ in range(600):
            if has_ended(worker):
                break
            time.sleep(0.1)
    assert has_ended(worker)
