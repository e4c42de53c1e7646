"""tests/plot_metrics.py: rolling means, gaps, and a picture with a curve of each run."""
import json
import sys

import numpy as np
import pytest
from PIL import Image

import plot_metrics
from plot_metrics import COLOURS, PANELS, WINDOW, curve


def test_a_curve_is_the_mean_of_the_window_before_it():
    rows = [dict(gen_iter=i, cos_dmd=[None if i == 3 else i / 10, 0.0, 0.0, None]) for i in range(1, 41)]
    points = curve(rows, PANELS["cosine with DMD's direction"])
    known = [i / 10 for i in range(1, 41) if i != 3]
    assert points[0] == (21, pytest.approx(sum(known[:WINDOW]) / WINDOW)) and len(points) == len(known) - WINDOW + 1
    assert points[-1] == (40, pytest.approx(sum(known[-WINDOW:]) / WINDOW))


def test_figures_that_a_run_has_not():
    assert [curve([dict(gen_iter=1)], figure) for figure in PANELS.values()] == [[]] * 4
    assert curve([dict(gen_iter=1, grad_x_0=[0.01])], PANELS["log10 of the gradient's length"]) == [(1, pytest.approx(-2))]


def test_the_picture_has_every_run(tmp_path, monkeypatch):
    for k, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        lines = [json.dumps(dict(gen_iter=i, cos_dmd=[k + i / 50])) for i in range(1, 31)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "argv", ["plot_metrics.py", str(tmp_path / "x.png"), f"first={tmp_path / 'a'}",
                                      f"second={tmp_path / 'b'}"])
    plot_metrics.main()
    panel = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))[40:, :plot_metrics.WIDTH]
    columns = [(panel == colour).all(2).nonzero()[1] for colour in COLOURS[:3]]
    assert columns[0].min() >= plot_metrics.MARGIN and columns[0].max() > plot_metrics.WIDTH - 15
    assert len(columns[1]) and not len(columns[2])
