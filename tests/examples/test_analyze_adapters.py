"""The example as users start it."""

from __future__ import annotations

from runs import write_adapters


def test_it_measures_runs_and_prints_a_table(tiny_pipe, tmp_path, run_example):
    write_adapters(tiny_pipe, tmp_path / "one", target_modules=["conv_out"])
    write_adapters(tiny_pipe, tmp_path / "two", target_modules=["conv_out"], function="identity")
    done = run_example("one", "two", "--output_dir", "out", cwd=tmp_path, example="analyze_adapters.py")
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[2:]] == ["| cosine", "| identity"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "ranks.json",
        "coefficients.json",
        "rank_by_layer.png",
        "coefficients_cosine.png",
        "importance_cosine.png",
        "importance_identity.png",
    }


def test_a_known_error_ends_in_one_line(tmp_path, run_example):
    (tmp_path / "empty").mkdir()
    done = run_example("empty", "--output_dir", "out", cwd=tmp_path, example="analyze_adapters.py", check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: empty has no adapters/class_<id> folders")
    assert "Traceback" not in done.stderr
