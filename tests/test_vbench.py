"""VBench: totals against its own script and the paper's tables, result files, videos' names, its program."""
import json
import os
import stat

import pytest
from conftest import golden

from models.eval import vbench
from models.checkpoint import InputError
from models.eval.vbench import DIMENSIONS, QUALITY, SEMANTIC, lay_out, read_results, run, totals

FILES = golden("vbench_scores*.json")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def data(request) -> dict:
    return json.loads(request.param.read_text())


# ---- totals ------------------------------------------------------------------------------------------------

def test_constants_are_vbenchs(data):
    assert set(QUALITY) == set(data["quality_dims"]) and set(SEMANTIC) == set(data["semantic_dims"])
    for name, (least, greatest, prompts) in DIMENSIONS.items():
        constants = data["normalization"][name]
        assert (least, greatest) == (constants["min"], constants["max"])
        assert vbench.WEIGHTS.get(name, 1) == constants["weight"]
        assert prompts == data["prompt_count"][name]


def test_equals_its_script(data):
    for case in [*data["cases"], *data["edge_cases"]]:
        found = totals(case["dims"])
        expected = {name: case[name] for name in ("quality", "semantic", "final")}
        assert found == pytest.approx(expected, abs=1e-12)


def test_the_papers_tables(data):
    """The paper cuts its cells after two decimals: Tables 8 and 9 give an interval for each cell of 3."""
    outside = []
    for row in data["paper_rows"]:
        cells = {name: value / 100 for name, value in row["dims_percent"].items()}
        lower, upper = totals(cells), totals({name: value + 1e-4 for name, value in cells.items()})
        for name, printed in row["paper_table3"].items():
            # Table 3 has three decimals, cut or rounded.
            inside = 100 * lower[name] - 5e-4 <= printed <= 100 * upper[name] + 5e-4
            outside += [] if inside else [(row["name"], name)]
    # By 0.008: a misprint in Table 9, or another run.
    assert outside == [("CogVideoX-5b 100/200", "semantic")]


def test_totals_without_a_dimension():
    all_best = {name: greatest for name, (_, greatest, _) in DIMENSIONS.items()}
    assert totals(all_best) == pytest.approx(dict(quality=1, semantic=1, final=1))
    no_scene = {name: value for name, value in all_best.items() if name != "scene"}
    assert totals(no_scene) == {"quality": pytest.approx(1)} and totals({}) == {}


# ---- result files ------------------------------------------------------------------------------------------

def results_file(folder, name: str, values: dict, count: int | None = None):
    """As VBench writes it; `count` videos a dimension, or as many as the benchmark has."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {}
    for dimension, value in values.items():
        video = {"video_path": "x.mp4", "video_results": value}
        content[dimension.replace(" ", "_")] = [value, [video] * (count or 5 * DIMENSIONS[dimension][2])]
    path = folder / f"{name}_eval_results.json"
    path.write_text(json.dumps(content))
    return path


def test_results_of_several_files(tmp_path):
    values = {name: 0.1 + 0.05 * i for i, name in enumerate(DIMENSIONS)}
    for name, value in values.items():  # one file a dimension, as its program leaves them
        results_file(tmp_path / "deep", name, {name: value})
    (tmp_path / "deep" / "x_full_info.json").write_text("[]")
    assert read_results([tmp_path]) == (pytest.approx(values), [])


def test_absent_dimensions_are_named_and_never_0(tmp_path):
    values = {name: 0.5 for name in DIMENSIONS if name not in ("color", "scene")}
    found, notes = read_results([results_file(tmp_path, "a", values)])
    assert found == values and len(notes) == 1 and "2 of 16 dimensions are missing (color, scene)" in notes[0]
    assert set(totals(found)) == {"quality"}


def test_a_part_of_the_videos_is_told(tmp_path):
    path = results_file(tmp_path, "a", dict.fromkeys(DIMENSIONS, 0.5), count=10)
    notes = read_results([path])[1]
    assert "scene rests on 10 videos, the benchmark on 430" in notes
    assert len(notes) == 15  # all but temporal flickering, whose moving videos are filtered out


@pytest.mark.parametrize("content, message", [
    ('{"scene": [', "expected VBench's results"), ('{"scene": 3}', "expected VBench's results"),
    ("[1]", "expected VBench's results"), ('{"scene": [54.3, []]}', "scene is 54.3; expected a fraction")])
def test_damaged_results(tmp_path, content, message):
    path = tmp_path / "a_eval_results.json"
    path.write_text(content)
    with pytest.raises(InputError, match=f"a_eval_results.json: {message}"):
        read_results([path])


def test_contradicting_and_absent_results(tmp_path):
    with pytest.raises(InputError, match="no \\*_eval_results.json in this folder"):
        read_results([tmp_path])
    results_file(tmp_path, "a", {"color": 0.5})
    results_file(tmp_path, "b", {"color": 0.6})
    with pytest.raises(InputError, match="b_eval_results.json: color is 0.6, but 0.5 in .*a_eval_results"):
        read_results([tmp_path])


# ---- videos and program ------------------------------------------------------------------------------------

def some_videos(folder, prompts: list[str]) -> list:
    folder.mkdir()
    pairs = [(folder / f"{i:03d}.mp4", prompt) for i, prompt in enumerate(prompts)]
    for path, prompt in pairs:
        path.write_text(f"{path.name} {prompt}")
    return pairs


def test_videos_are_named_after_prompts(tmp_path):
    prompts = ["a cat, \u201creal\u201d", "In a still frame, a stop sign", "a cat, \u201creal\u201d"]
    videos = lay_out(tmp_path / "out", some_videos(tmp_path / "in", prompts))
    assert {path.name: path.read_text() for path in videos.iterdir()} == {
        "a cat, \u201creal\u201d-0.mp4": "000.mp4 a cat, \u201creal\u201d",
        "In a still frame, a stop sign-0.mp4": "001.mp4 In a still frame, a stop sign",
        "a cat, \u201creal\u201d-1.mp4": "002.mp4 a cat, \u201creal\u201d"}


def test_results_go_with_their_videos(tmp_path):
    videos = some_videos(tmp_path / "in", ["a cat", "a dog"])
    lay_out(tmp_path / "out", videos)
    results_file(tmp_path / "out" / "results", "a", {"color": 0.5})
    lay_out(tmp_path / "out", videos)
    assert (tmp_path / "out" / "results").exists()
    assert len(list(lay_out(tmp_path / "out", videos[:1]).iterdir())) == 1
    assert not (tmp_path / "out" / "results").exists()


@pytest.mark.parametrize("prompt", ["a/b", "x" * 250])
def test_prompts_that_are_no_file_names(tmp_path, prompt):
    with pytest.raises(InputError, match="000.mp4: its prompt, .* is no file name.*--vbench-short"):
        lay_out(tmp_path / "out", some_videos(tmp_path / "in", [prompt]))


PROGRAM = """#!/bin/sh
# evaluate --videos_path V --dimension D --output_path R, or static_filter --videos_path V --result_path S
[ "$1" = static_filter ] && { mkdir -p "$5/filtered_videos"; exit 0; }
[ "$5" = temporal_flickering ] && { [ "$3" = "${7%results}static/filtered_videos" ] && [ -d "$3" ] || exit 0; }
echo "$5" >> "$7.calls"
[ "$5" = scene ] && exit 0
mkdir -p "$7"
echo "{\\"$5\\": [0.5, []]}" > "$7/results_$5_eval_results.json"
"""


def test_its_program_runs_on_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vbench").write_text(PROGRAM)
    (tmp_path / "bin" / "vbench").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    results = tmp_path / "results"
    results_file(results, "earlier", {"color": 0.25})
    assert run(tmp_path / "videos", results) == ["scene"]
    called = (tmp_path / "results.calls").read_text().split()
    others = [name.replace(" ", "_") for name in DIMENSIONS if name not in ("color", "temporal flickering")]
    assert called == [*others, "temporal_flickering"]  # the last, as its filter needs what another downloads
    values = read_results([results])[0]
    assert values == {name: 0.25 if name == "color" else 0.5 for name in DIMENSIONS if name != "scene"}
    run(tmp_path / "videos", results)  # again: only what failed
    assert (tmp_path / "results.calls").read_text().split()[15:] == ["scene"]


def test_without_its_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="VBench is not installed .*pip install vbench.*--vbench-results"):
        run(tmp_path / "videos", tmp_path / "results")
