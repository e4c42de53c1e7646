"""evaluate.py: folders to figures, kept scores, what is left out, tables; `quick_scores`; MP4 files."""
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, golden, read_golden
from PIL import Image
from test_pictures import odd_pictures
from torch import Tensor

import adm
import evaluate
from models.eval import fvd, lpips, metrics, moving_shapes, shapes
from models.checkpoint import InputError, save_safetensors
from models.eval.fvd import frechet_distance
from models.eval.metrics import paper_rows, quick_scores, read_items, table
from models.pictures import picture, read_mp4, save_mp4, save_png, to_uint8

PROMPTS = ["a cat", "a dog", "a red box"]


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image.convert("RGB")).mean())


class Scorer:
    """Brightness plus the length of the prompt; counts what it is asked."""

    def __init__(self, describe: str):
        self.describe, self.seen = describe, 0

    def __call__(self, images, prompts):
        self.seen += len(images)
        if any(image.size == (13, 7) for image in images):
            raise InputError("an image of 13 x 7")
        pairs = zip(images, prompts, strict=True)
        return torch.tensor([brightness(image) + len(prompt) for image, prompt in pairs])


@pytest.fixture
def scorers(monkeypatch) -> list:
    """Those that evaluate.py loads."""
    loaded = []

    def load_scorer(kind, ckpt, tokenizer, device, **options):
        if kind == "mps" and ckpt is None:
            raise InputError("MPS_overall_checkpoint.pth: not on the hub; --mps-ckpt PATH takes the file")
        loaded.append(Scorer(" ".join([kind, *map(str, options.values())])))
        return loaded[-1]

    monkeypatch.setattr("models.eval.scores.load_scorer", load_scorer)
    return loaded


def make_pictures(folder, count: int = 6, note: bool = True, **text) -> Tensor:
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    for i, image in enumerate(images):
        save_png(folder / f"{i:03d}.png", image, dict(prompt=PROMPTS[i % 3], **text) if note else {})
    save_png(folder / "grid.png", images[0])
    return images


def run(out, *flags) -> dict:
    evaluate.main(evaluate.parse_args([*map(str, flags), "--out", str(out), "--device", "cpu"]))
    return json.loads((out / "results.json").read_text())


def row(found: dict, folder) -> dict:
    return found["rows"][str(folder)]


def expected(images, prompts) -> float:
    scores = [brightness(picture(image)) + len(prompt) for image, prompt in zip(images, prompts)]
    return pytest.approx(float(np.mean(scores)))


# ---- whole runs --------------------------------------------------------------------------------------------

def test_mean_scores_beside_the_papers(tmp_path, scorers, capsys):
    images = make_pictures(tmp_path / "a", model="sdxl")
    others = make_pictures(tmp_path / "b", model="sdxl")
    found = run(tmp_path / "out", "--images", tmp_path / "a", tmp_path / "b", "--batch", 4,
                "--metrics", "clip", "pickscore")
    for name, pixels in (("a", images), ("b", others)):
        mean = expected(pixels, PROMPTS * 2)
        assert row(found, tmp_path / name) == {"clip": mean, "pickscore": mean}
    assert found["variants"] == {"clip": "clip ViT-g-14 plain", "pickscore": "pickscore"}
    assert found["broken"] == {}
    written = (tmp_path / "out" / "table.md").read_text()
    assert written in capsys.readouterr().out
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines()]
    assert head == ["", "CLIP score (clip ViT-g-14 plain)", "PickScore (pickscore)"]
    assert rows[0] == ["SDXL-Base, 50 NFE (paper)", "35.0309", "22.2494"]
    assert rows[2] == ["DMDX, 1 step (paper)", "35.2557", "22.2736"]
    assert rows[3] == [f"{tmp_path / 'a'}, 6 samples", *[f"{row(found, tmp_path / 'a')['clip']:.4f}"] * 2]


def test_variants_are_options(tmp_path, scorers):
    make_pictures(tmp_path / "a")
    found = run(tmp_path / "out", "--images", tmp_path / "a", "--metrics", "clip", "hpsv2", "mps",
                "--clip-backbone", "ViT-L-14", "--clip-pipeline", "dmd2", "--hpsv2-version", "v2.1",
                "--mps-threshold", 0.01, "--mps-ckpt", "x.pth")
    assert found["variants"] == {"clip": "clip ViT-L-14 dmd2", "hpsv2": "hpsv2 v2.1", "mps": "mps 0.01"}


def test_a_second_run_computes_only_what_is_missing(tmp_path, scorers):
    make_pictures(tmp_path / "a")
    command = ("--images", tmp_path / "a", "--metrics", "clip", "--batch", 4)
    first = run(tmp_path / "out", *command)
    log = tmp_path / "out" / "scores.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 6 and json.loads(lines[0])["prompt"] == "a cat"
    log.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote the fourth
    assert run(tmp_path / "out", *command)["rows"] == first["rows"] and scorers[-1].seen == 3
    run(tmp_path / "out", *command)
    assert scorers[-1].seen == 0 and len(log.read_text().splitlines()) == 6
    white = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    save_png(tmp_path / "a" / "002.png", white, dict(prompt="a red box"))
    again = run(tmp_path / "out", *command)
    assert scorers[-1].seen == 1 and again["rows"] != first["rows"]
    run(tmp_path / "out", *command, "--clip-backbone", "ViT-B-32")
    assert scorers[-1].seen == 6  # another variant's scores are no use


def test_one_corrupt_picture_is_named_and_loses_nothing_else(tmp_path, scorers, capsys):
    images = make_pictures(tmp_path / "a")
    for i, damage in ((1, b"no picture"), (3, (tmp_path / "a" / "003.png").read_bytes()[:120])):
        (tmp_path / "a" / f"{i:03d}.png").write_bytes(damage)
    save_png(tmp_path / "a" / "006.png", torch.zeros(3, 7, 13), dict(prompt="a cat"))
    found = run(tmp_path / "out", "--images", tmp_path / "a", "--metrics", "clip")
    kept = [0, 2, 4, 5]
    assert row(found, tmp_path / "a") == {"clip": expected(images[kept], [PROMPTS[i % 3] for i in kept])}
    assert found["samples"] == {str(tmp_path / "a"): 4}
    assert [path[-7:] for path in sorted(found["broken"])] == ["001.png", "003.png", "006.png"]
    told = capsys.readouterr().err
    for reason in ("001.png: not a picture", "003.png: not a picture", "006.png: an image of 13 x 7"):
        assert reason in told


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("metric", ["clip", "lpips", "shapes"])
def test_odd_pictures_are_scored_or_left_out_by_name(tmp_path, scorers, metric):
    """60000 x 60000, animated, 16 bits, cut off, empty: no picture ends the run, and the others are scored."""
    good, bad = odd_pictures(tmp_path / "a")
    flags = {"clip": ["--clip-backbone", "ViT-B-32"], "lpips": lpips_flags(tmp_path), "shapes": []}[metric]
    (tmp_path / "p.txt").write_text("a red circle\n")
    command = ("--images", tmp_path / "a", "--metrics", metric, "--prompts", tmp_path / "p.txt", *flags)
    if metric == "shapes":  # which takes pictures of one size alone
        for name in (*good, *bad):
            if name not in ("animated.png", "grey16.png", "half.png", "huge.png"):
                (tmp_path / "a" / name).unlink()
        bad = {name: bad[name] for name in ("animated.png", "grey16.png", "half.png", "huge.png")}
        for i in range(2):
            save_png(tmp_path / "a" / f"{i}.png", torch.zeros(3, 32, 32))
    found = run(tmp_path / "out", *command)
    assert {Path(path).name for path in found["broken"]} >= bad.keys()
    assert all(reason in found["broken"][str(tmp_path / "a" / name)] for name, reason in bad.items())
    assert len(row(found, tmp_path / "a")) > 0
    if metric == "clip":
        assert found["samples"] == {str(tmp_path / "a"): len(good)} and scorers[-1].seen == len(good)


@pytest.mark.parametrize("key, values", [("model", ("tiny-sd3", "tiny-sdxl")), ("ckpt", ("adm-000", "x.safetensors")),
                                         ("steps", ("1", "25")), ("cfg", ("1", "3"))])
def test_a_folder_of_two_generators_is_refused(tmp_path, scorers, key, values):
    make_pictures(tmp_path / "b", seed="0")
    make_pictures(tmp_path / "a", 24, seed="0", **{key: values[0]})
    make_pictures(tmp_path / "a", 8, seed="1", **{key: values[1]})  # the first 8 again, as a shorter run would
    with pytest.raises(InputError) as caught:
        run(tmp_path / "out", "--images", tmp_path / "a", tmp_path / "b", "--metrics", "clip")
    assert str(caught.value) == (f"{tmp_path / 'a'}: 000.png notes {key} {values[1]}, 008.png {key} {values[0]}; "
                                 "expected samples of one generator in a folder")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["rows"]) == [str(tmp_path / "b")]  # the other folder is scored


def test_empty_and_absent_folders_lose_no_others(tmp_path, scorers):
    make_pictures(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    folders = [tmp_path / name for name in ("empty", "a", "absent")]
    with pytest.raises(InputError) as error:
        run(tmp_path / "out", "--images", *folders, "--metrics", "clip")
    empty, absent = str(error.value).splitlines()
    assert "empty: no pictures or videos in this folder" in empty and "absent: no such folder" in absent
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["rows"]) == [str(tmp_path / "a")]


def test_missing_weights_lose_no_other_metric(tmp_path, scorers):
    make_pictures(tmp_path / "a")
    with pytest.raises(InputError) as error:
        run(tmp_path / "out", "--images", tmp_path / "a", "--metrics", "mps", "lpips", "fvd", "clip")
    mps, lpips_, fvd = str(error.value).splitlines()
    assert mps == "mps: MPS_overall_checkpoint.pth: not on the hub; --mps-ckpt PATH takes the file"
    assert "vgg16-397923af.pth (https://" in lpips_ and "--lpips-ckpt" in lpips_ and "--real" in fvd
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["variants"]) == {"clip"}


def test_without_flags_in_a_fresh_folder(tmp_path):
    command = [sys.executable, ROOT / "evaluate.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("evaluate.py: samples: no such folder of pictures or videos; "
                           "`python sample.py --out samples` makes it\n")


# ---- pictures and their prompts ----------------------------------------------------------------------------

def test_prompts_from_the_files_else_in_the_order_of_names(tmp_path):
    notes = {"999.png": {}, "1000.png": {}, "2.png": {"prompt": "noted", "model": "sdxl"}, "x.txt": {}}
    for name, note in notes.items():
        save_png(tmp_path / name, torch.zeros(3, 4, 4), note)
    broken = {}
    items = read_items(tmp_path, ["first", "second"], broken)
    assert [item.path.name for item in items] == ["2.png", "999.png", "1000.png"]
    assert [item.prompt for item in items] == ["noted", "second", "first"]
    assert items[0].model == "sdxl" and broken == {}
    save_png(tmp_path / "999.png", torch.zeros(3, 4, 4), {"prompt": '{"3": {}}', "workflow": "{}"})  # ComfyUI
    (tmp_path / "2.png").write_bytes(b"")
    items = read_items(tmp_path, ["first", "second"], broken)
    assert [item.prompt for item in items] == ["second", "first"]
    assert list(broken) == [str(tmp_path / "2.png")]
    graph = {"prompt": '{"3": {"class_type": "KSampler"}}'}  # queued by ComfyUI's API: no workflow beside it
    save_png(tmp_path / "999.png", torch.zeros(3, 4, 4), graph)
    assert [item.prompt for item in read_items(tmp_path, ["first", "second"], broken)] == ["second", "first"]


def test_files_that_macos_leaves_have_no_prompt(tmp_path):
    for i in range(2):
        save_png(tmp_path / f"{i}.png", torch.zeros(3, 4, 4))
        (tmp_path / f"._{i}.png").write_bytes(b"\0\5\x16\7")
    broken = {}
    assert [item.prompt for item in read_items(tmp_path, ["first", "second"], broken)] == ["first", "second"] and not broken


def test_a_video_named_in_no_utf_8(tmp_path):
    path, broken = tmp_path / os.fsdecode(b"a\xff cat-0.mp4"), {}
    save_mp4(tmp_path / "x.mp4", [Image.new("RGB", (16, 16))] * 2, fps=8)
    (tmp_path / "x.mp4").rename(path)
    assert read_items(tmp_path, None, broken) == [] and list(broken) == [str(path)]


def test_videos_named_after_their_prompts_keep_them(tmp_path):
    """In the order of names, which is not that of --prompts."""
    for name in ("a cat-0", "a cat-1", "b dog-0", "other"):
        save_mp4(tmp_path / f"{name}.mp4", [Image.new("RGB", (16, 16))] * 2, fps=8)
    items = read_items(tmp_path, ["b dog", "a cat"], {})
    assert [item.prompt for item in items] == ["a cat", "a cat", "b dog", "a cat"]
    assert [item.prompt for item in read_items(tmp_path, None, {})] == ["a cat", "a cat", "b dog", None]


def test_a_prompt_that_no_tokenizer_takes_is_told(tmp_path):
    save_mp4(tmp_path / "000.mp4", [Image.new("RGB", (16, 16))] * 2, 8, {"prompt": "blue \ud83d square"})
    broken = {}
    assert read_items(tmp_path, None, broken) == []
    assert "000.mp4" in broken[str(tmp_path / "000.mp4")]


def test_a_folder_whose_name_is_no_utf_8(tmp_path, scorers):
    folder = tmp_path / os.fsdecode(b"b\xff")
    make_pictures(folder)
    assert list(run(tmp_path / "out", "--images", folder, "--metrics", "clip")["rows"])


def test_another_tokenizer_is_another_score(tmp_path, scorers):
    make_pictures(tmp_path / "a")
    for text in ("one", "two", "two"):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "tokenizer" / "vocab.json").write_text(text)
        run(tmp_path / "out", "--images", tmp_path / "a", "--metrics", "clip", "--tokenizer", tmp_path / "tokenizer")
    assert [scorer.seen for scorer in scorers] == [6, 6, 0]


def test_a_picture_without_prompt_is_refused_where_one_is_needed(tmp_path, scorers):
    make_pictures(tmp_path / "a", note=False)
    command = ("--images", tmp_path / "a", "--metrics", "clip")
    with pytest.raises(InputError, match=r"6 of 6 files note no prompt \(000.png, .*\); --prompts FILE"):
        run(tmp_path / "out", *command)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    found = run(tmp_path / "out", *command, "--prompts", tmp_path / "p.txt")
    assert len(found["rows"]) == 1 and scorers[-1].seen == 6


# ---- LPIPS diversity ---------------------------------------------------------------------------------------

def lpips_flags(folder) -> list:
    """A narrow VGG with random weights in the folder, and the flag that takes it."""
    tensors, _ = read_golden(golden("lpips_small*.safetensors")[0])
    file = folder / "vgg.safetensors"
    save_safetensors(file, {name[4:]: t for name, t in tensors.items() if name.startswith("vgg.")})
    return ["--lpips-ckpt", file]


def test_diversity_is_the_mean_over_prompts(tmp_path, capsys):
    (_, file), images = lpips_flags(tmp_path), make_pictures(tmp_path / "a")
    found = run(tmp_path / "out", "--images", tmp_path / "a", "--metrics", "lpips", "--lpips-ckpt", file)
    net = lpips.load_lpips("vgg", [file])
    each = [lpips.diversity(net, [picture(images[i]), picture(images[i + 3])]) for i in range(3)]
    assert row(found, tmp_path / "a") == {"lpips": pytest.approx(np.mean(each))} and np.std(each) > 1e-4
    assert found["variants"] == {"lpips": "vgg, 512 x 512"}
    assert "diversity of 2 pictures a prompt; the paper's is of 4" in capsys.readouterr().err
    # A pair without one of its pictures is no pair, in a second run neither.
    (tmp_path / "a" / "005.png").write_bytes(b"")
    for _ in range(2):
        found = run(tmp_path / "out", "--images", tmp_path / "a", "--metrics", "lpips", "--lpips-ckpt", file)
        assert row(found, tmp_path / "a") == {"lpips": pytest.approx(np.mean(each[:2]))}
        assert [path[-7:] for path in sorted(found["broken"])] == ["002.png", "005.png"]
    assert found["paper"]["DMDX, 1 step (paper)"] == {"lpips": 0.7156}


# ---- videos ------------------------------------------------------------------------------------------------

def save_video(path, frames: Tensor, text: dict | None = None) -> None:
    save_mp4(path, [picture(frame) for frame in frames], 8, text)


def flat_video(levels: list[int]) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


def test_mp4_gives_frames_and_text(tmp_path):
    text = dict(prompt="a \u201cfox\u201d", model="cogvideox-2b")
    save_video(tmp_path / "x.mp4", flat_video([0, 60, 120, 180, 240]), text)
    frames = read_mp4(tmp_path / "x.mp4")
    assert frames.shape == (5, 3, 16, 16) and frames.dtype == torch.uint8
    assert (frames.float().mean((1, 2, 3)) - torch.tensor([0, 60, 120, 180, 240])).abs().max() < 4  # H.264
    assert torch.equal(read_mp4(tmp_path / "x.mp4", frames=2, stride=2), frames[[0, 2]])
    assert metrics.read_text(tmp_path / "x.mp4") == text
    save_video(tmp_path / "a dog-3.mp4", flat_video([0, 0]))
    assert [item.prompt for item in read_items(tmp_path, None, {})] == ["a dog", "a \u201cfox\u201d"]
    for content in (b"", b"no video"):
        (tmp_path / "x.mp4").write_bytes(content)
        with pytest.raises(InputError, match="x.mp4: not a video, or damaged"):
            read_mp4(tmp_path / "x.mp4")


def test_clip_score_of_frames(tmp_path, scorers):
    for i, levels in enumerate(([0, 100], [50, 50, 200, 200])):
        save_video(tmp_path / "a" / f"{i:03d}.mp4", flat_video(levels), dict(prompt=PROMPTS[i]))
    (tmp_path / "a" / "002.mp4").write_bytes(b"no video")
    found = run(tmp_path / "out", "--images", tmp_path / "a", "--metrics", "clip-video", "--batch", 3)
    # Over frames (50, 125), then over videos; both prompts are 5 long.
    assert row(found, tmp_path / "a") == {"clip-video": pytest.approx(87.5 + 5, abs=3)}
    assert found["variants"] == {"clip-video": "clip ViT-B-32"} and len(found["broken"]) == 1
    assert scorers[-1].seen == 6


class Features(torch.nn.Module):
    """In I3D's place: three features of a video (B 3 F H W)."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        frames = x.mean((1, 3, 4))
        return torch.stack([frames.mean(1), frames[:, 0], frames[:, -1]], dim=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_fvd(tmp_path, capsys, monkeypatch):
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Features()).save(path)
    monkeypatch.setattr(fvd, "PROGRAM", sha256(path.read_bytes()).hexdigest())
    levels = torch.randint(0, 256, (6, 20))
    for i, flat in enumerate(levels.tolist()):
        save_video(tmp_path / "a" / f"{i}.mp4", flat_video(flat[:10]))
        save_video(tmp_path / "real" / "deep" / f"{i}.mp4", flat_video(flat))
    save_video(tmp_path / "a" / "short.mp4", flat_video([0] * 9))
    command = ("--images", tmp_path / "a", "--metrics", "fvd", "--i3d-ckpt", tmp_path / "i3d_torchscript.pt",
               "--real", tmp_path / "real", "--frames", 10, "--batch", 9)
    same = row(run(tmp_path / "out", *command, "--stride", 1), tmp_path / "a")
    assert same["fvd"] < 1e-4  # the same first ten frames
    found = run(tmp_path / "out", *command, "--stride", 2)
    x = levels[:, None].float() / 127.5 - 1
    a, b = x[:, 0, :10], x[:, 0, ::2]
    a, b = (torch.stack([y.mean(1), y[:, 0], y[:, -1]], dim=1) for y in (a, b))
    assert row(found, tmp_path / "a") == {"fvd": pytest.approx(frechet_distance(a, b), rel=0.1)}  # H.264
    assert found["variants"] == {"fvd": "i3d_torchscript.pt, crop, 10 frames, real stride 2, 1/(n-1)"}
    biased = run(tmp_path / "out", *command, "--stride", 2, "--fvd-biased")
    assert biased["variants"]["fvd"].endswith("real stride 2, 1/n")
    assert row(biased, tmp_path / "a")["fvd"] < row(found, tmp_path / "a")["fvd"]  # smaller covariances
    assert "short.mp4: 9 frames" in str(found["broken"])
    assert "FVD of 6 videos against 6 real ones" in capsys.readouterr().err
    assert found["paper"]["AVDM2, 2D SDM (paper)"] == {"fvd": 1271.45}


def test_vbench_results(tmp_path, capsys):
    values = {name.replace(" ", "_"): [value / 100, []] for name, value in json.loads(
        golden("vbench_scores*.json")[0].read_text())["paper_rows"][0]["dims_percent"].items()}
    (tmp_path / "a_eval_results.json").write_text(json.dumps(values))
    found = run(tmp_path / "out", "--metrics", "vbench", "--vbench-results", tmp_path)
    assert row(found, tmp_path)["final"] == pytest.approx(78.584, abs=0.02)  # the paper cuts its cells
    assert row(found, tmp_path)["scene"] == pytest.approx(42.64)
    assert "| ADM, 8 steps (paper) " in capsys.readouterr().out
    del values["scene"]
    (tmp_path / "a_eval_results.json").write_text(json.dumps(values))
    found = run(tmp_path / "out", "--metrics", "vbench", "--vbench-results", tmp_path)
    assert not {"final", "semantic", "scene"} & set(row(found, tmp_path))
    assert "missing (scene)" in capsys.readouterr().err


def test_vbench_lays_the_videos_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for i, prompt in enumerate(["a long cat", "a long dog", "a long cat"]):
        save_video(tmp_path / "a" / f"{i:03d}.mp4", flat_video([0, 0]), dict(prompt=prompt))
    (tmp_path / "long.txt").write_text("a long cat\na long dog\n")
    (tmp_path / "short.txt").write_text("a cat\na dog\n")
    (tmp_path / "other.txt").write_text("a\n")
    command = ("--images", tmp_path / "a", "--metrics", "vbench", "--prompts", tmp_path / "long.txt")
    with pytest.raises(InputError, match="VBench is not installed"):
        run(tmp_path / "out", *command, "--vbench-short", tmp_path / "short.txt")
    folder, = (tmp_path / "out" / "vbench").glob("*_a/videos")
    assert sorted(path.name for path in folder.iterdir()) == ["a cat-0.mp4", "a cat-1.mp4", "a dog-0.mp4"]
    with pytest.raises(InputError, match="other.txt: 1 prompts, and 2 in --prompts"):
        run(tmp_path / "out", *command, "--vbench-short", tmp_path / "other.txt")


# ---- the exact evaluator -----------------------------------------------------------------------------------

def test_shapes(tmp_path, capsys):
    prompts = shapes.evaluation_prompts(64)
    images = shapes.reference(prompts, seed=9)
    for i, (image, prompt) in enumerate(zip(images, prompts)):
        save_png(tmp_path / "a" / f"{i:03d}.png", image, dict(prompt=prompt, model="tiny-sd3"))
    found = run(tmp_path / "out", "--images", tmp_path / "a")
    exact = row(found, tmp_path / "a")
    assert exact == shapes.evaluate(to_uint8(images), prompts)
    assert exact == quick_scores(to_uint8(images), prompts, ["shapes"], {})
    assert exact["accuracy"] == 1 and found["paper"] == {}
    assert capsys.readouterr().err.count("total variation") == 0  # 32 samples of each prompt
    save_png(tmp_path / "a" / "100.png", torch.zeros(3, 64, 64), dict(prompt="a circle"))
    with pytest.raises(InputError, match="65 samples of .*3 x 64 x 64.*takes the tiny models' 32 x 32"):
        run(tmp_path / "out", "--images", tmp_path / "a")


def test_samples_of_a_sample_py_that_has_not_ended_are_told(tmp_path, capsys):
    for i in range(2):
        save_png(tmp_path / "a" / f"{i}.png", torch.zeros(3, 32, 32), dict(prompt="a circle"))
    for lock, told in ((False, 0), (True, 1)):
        if lock:
            (tmp_path / "a" / "lock").touch()
        for out in ("a", "out"):  # whose own lock says nothing of the samples
            run(tmp_path / out, "--images", tmp_path / "a")
            assert capsys.readouterr().err.count(f"{tmp_path / 'a'}: sample.py is at work there or was stopped") == told


def test_moving_shapes(tmp_path, monkeypatch, capsys):
    prompts = moving_shapes.evaluation_prompts(6, repeats=1)
    clips = moving_shapes.reference(prompts, seed=9)
    for i, (clip, prompt) in enumerate(zip(clips, prompts)):
        # As sample.py does: at 32 x 32, H.264's halved colours would change what is read off.
        frames = [picture(frame, 128) for frame in clip]
        save_mp4(tmp_path / "a" / f"{i:03d}.mp4", frames, 8, dict(prompt=prompt))
    given = []
    monkeypatch.setattr(moving_shapes, "evaluate", lambda *args: given.extend(args) or {"direction": 1.0})
    assert row(run(tmp_path / "out", "--images", tmp_path / "a"), tmp_path / "a") == {"direction": 1.0}
    assert given[1] == prompts and given[0].dtype == torch.uint8
    seen, true = (moving_shapes.read_clip(x)[0] for x in (given[0] / 127.5 - 1, clips))
    assert torch.equal(seen, true)
    assert "`python sample.py --prompts moving-shapes`" in capsys.readouterr().err
    for i in range(2):
        save_mp4(tmp_path / "b" / f"{i}.mp4", frames[:1], 8, dict(prompt=prompt))
    with pytest.raises(InputError, match="b/0.mp4: a video of one frame; the exact evaluator takes two at least"):
        run(tmp_path / "out", "--images", tmp_path / "b")


# ---- in memory ---------------------------------------------------------------------------------------------

def test_quick_scores_of_images_and_videos():
    images, scorer = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8), Scorer("")
    prompts = [*PROMPTS, "x", "yy"]
    found = quick_scores(images, prompts, ["clip"], {"clip": scorer}, batch=2)
    assert found == {"clip": expected(images, prompts)} and scorer.seen == 5
    videos = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    found = quick_scores(videos, ["x", "yy"], ["clip"], {"clip": scorer}, batch=2)
    assert found == {"clip": expected(videos.flatten(0, 1), ["x"] * 3 + ["yy"] * 3)}


def test_a_scorers_network_is_on_the_device_only_while_it_scores():
    images, scorer, places = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), Scorer(""), []
    scorer.net = SimpleNamespace(to=lambda place: places.append((str(place), scorer.seen)))
    quick_scores(images, ["x", "y", "z"], ["clip"], {"clip": scorer}, batch=2, device=torch.device("cuda", 0))
    assert places == [("cuda:0", 0), ("cpu", 3)]


# ---- tables ------------------------------------------------------------------------------------------------

def test_paper_rows_fit_the_model_and_the_columns():
    assert paper_rows({"sd3-medium"}, ["clip"]) == {"SD3-Medium, 50 NFE (paper)": {"clip": 34.7633},
                                                    "ADM, 4 steps (paper)": {"clip": 34.9076}}
    assert "DMDX, 1 step (paper)" in paper_rows({"tiny-sd3", None}, ["mps"])  # of no known model: Table 1
    assert "CogVideoX-5b (paper)" in paper_rows({"cogvideox-5b"}, ["final"])
    assert list(paper_rows({"sd3-medium"}, ["fvd"])) == ["AVDM2, 2D SDM (paper)", "AVDM2, video SDM (paper)"]
    assert paper_rows({"sdxl"}, ["accuracy"]) == {}


def test_table():
    rows = {"a": dict(clip=1.0, final=2.0), "bb": dict(clip=12.34567)}
    assert table(rows, {"clip": "v"}) == ("|    | CLIP score (v) | VBench final |\n"
                                          "| -- | -------------- | ------------ |\n"
                                          "| a  | 1.0000         | 2.000        |\n"
                                          "| bb | 12.3457        | -            |\n")


def test_flags_below_1(tmp_path):
    with pytest.raises(InputError, match="--frames 0: expected at least 1"):
        run(tmp_path, "--frames", 0)


# ---- while a generator is trained ----------------------------------------------------------------------------------

def test_training_keeps_figures_of_the_same_samples_as_it_goes(tmp_path, monkeypatch):
    """--evaluate-every: the exact evaluator and a scorer, through `quick_scores`; a resume leaves no line twice."""
    asked = []

    def load(kind):
        asked.append(kind)
        scorer = Scorer("")
        scorer.net = torch.nn.Identity()
        return scorer
    monkeypatch.setattr("models.eval.scores.load_scorer", load)
    flags = ["--batch-size", "2", "--steps", "1", "--evaluate-every", "1", "--evaluate", "8", "--evaluate-metrics", "shapes", "clip",
             "--lora-rank", "4", "--fake-lora", "4", "--save-every", "1", "--out", str(tmp_path / "run")]
    adm.main(adm.parse_args([*flags, "--max-iter", "2"]))

    def lines():
        return [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [line["gen_iter"] for line in lines()] == [1, 2] and asked == ["clip"]
    assert all(line.keys() == {"gen_iter", "accuracy", "total_variation", "frechet", "sharpness", "clip"} for line in lines())
    last = json.loads((tmp_path / "run" / "comparison.json").read_text())["student, 1 step"]
    assert {name: lines()[1][name] for name in last} == last  # the closing comparison's samples are the same
    adm.main(adm.parse_args([*flags, "--max-iter", "3", "--resume",
                             str(tmp_path / "run" / "state" / "iter_00000001")]))
    assert [line["gen_iter"] for line in lines()] == [1, 2, 3]


@pytest.mark.parametrize("flags, words", [
    (["--evaluate-every", "-1"], "--evaluate-every -1"),
    (["--evaluate-every", "5", "--evaluate", "0"], "expected 0 or more updates, and samples to evaluate"),
    (["--evaluate-every", "5", "--size", "24", "24"], "for the tiny models at their own size"),
])
def test_a_training_hook_that_cannot_work_is_refused(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        adm.main(adm.parse_args([*flags, "--max-iter", "1", "--out", str(tmp_path / "run")]))
