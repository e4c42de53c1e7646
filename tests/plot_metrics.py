"""Curves of the diagnostics in metrics.jsonl, several runs in one picture.

    python tests/plot_metrics.py diagnostics.png healthy=runs/adm-tiny-sd3-000 undamped=runs/adm-tiny-sd3-001

Panels: cosine of the generator's gradient with DMD's direction, length of that gradient, share of pairs that D
tells apart, deviation of x_0; each a mean over WINDOW iterations.
"""
import argparse
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

WINDOW, WIDTH, HEIGHT, MARGIN = 20, 260, 170, 30
COLOURS = ((40, 90, 200), (210, 60, 40), (30, 150, 70), (150, 90, 190), (200, 150, 20))
PANELS = {  # title -> figure of a row of metrics.jsonl, or None
    "cosine with DMD's direction": lambda row: row.get("cos_dmd", [None])[0],
    "log10 of the gradient's length": lambda row: math.log10(row["grad_x_0"][0]) if row.get("grad_x_0", [0])[0] else None,
    "share of pairs told apart": lambda row: mean(row.get("told_apart")),
    "deviation of x_0": lambda row: mean(row.get("x_0_std")),
}


def mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def curve(rows: list[dict], figure) -> list[tuple[int, float]]:
    """(iteration, mean over the WINDOW iterations until it)."""
    known = [(row["gen_iter"], figure(row)) for row in rows]
    known = [(i, value) for i, value in known if value is not None]
    return [(known[k][0], mean([value for _, value in known[max(0, k + 1 - WINDOW):k + 1]]))
            for k in range(max(0, min(WINDOW, len(known)) - 1), len(known))]


def draw_panel(title: str, curves: list[list[tuple[int, float]]]) -> Image.Image:
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    points = [point for points in curves for point in points]
    pen.text((4, 2), title, fill="black")
    if not points:
        return picture
    right, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    high = high if high > low else low + 1
    box = (MARGIN + 10, 18, WIDTH - 8, HEIGHT - 18)
    pen.rectangle(box, outline=(180, 180, 180))
    for y, text in ((box[1], f"{high:.2f}"), (box[3] - 10, f"{low:.2f}")):
        pen.text((2, y), text, fill="black")
    pen.text((box[2] - 24, box[3] + 3), str(right), fill="black")
    for colour, line in zip(COLOURS, curves):
        pen.line([(box[0] + (box[2] - box[0]) * x / right, box[3] - (box[3] - box[1]) * (y - low) / (high - low))
                  for x, y in line], fill=colour, width=2)
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    args = parser.parse_args()
    names, folders = zip(*(run.split("=", 1) for run in args.runs))
    runs = [[json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
            for folder in folders]
    picture = Image.new("RGB", (len(PANELS) * WIDTH, HEIGHT + 18), "white")
    for i, (title, figure) in enumerate(PANELS.items()):
        picture.paste(draw_panel(title, [curve(rows, figure) for rows in runs]), (i * WIDTH, 18))
    for i, (name, colour) in enumerate(zip(names, COLOURS)):
        ImageDraw.Draw(picture).text((6 + i * 140, 3), name, fill=colour)
    picture.save(args.out)


if __name__ == "__main__":
    main()
