"""sample.py on tiny-sd3: what it writes, what its pictures depend on, and that a run's exports give the run's own pictures."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import refusal_of, states_saved
from PIL import Image

import adm
import sample
from models.checkpoint import InputError, open_tensors, save_safetensors
from models.diffusion import generator_times, teacher_times
from models.pictures import save_png
from models.presets import PRESETS
from models.shards import fingerprint

ROW = PRESETS["tiny-sd3"]
DENOISER = "model.diffusion_model."
N, SHIFT = ROW.steps + 1, 2.0  # of the runs below: not the preset's, so that they must come from the run


def pictures(out, *flags):
    """sample.py with these flags: the pictures it wrote, in order."""
    sample.main(sample.parse_args([*map(str, flags), "--out", str(out)]))
    return [Image.open(path) for path in sorted(out.glob("[0-9]*.png"))]


def difference(a, b) -> int:
    """The largest difference of two lists of pictures, in grey levels of 255."""
    assert len(a) == len(b) > 0 and all(x.size == y.size for x, y in zip(a, b))
    return max(int(np.abs(np.asarray(x).astype(int) - np.asarray(y)).max()) for x, y in zip(a, b))


def train(out, *flags, states=()):
    """One update at a large rate, so that the student, a moving average, is no longer the teacher."""
    short = ["--max-iter", 1, "--ema", 0.5, "--batch-size", 2, "--evaluate", 0, "--sample-every", 1, "--steps", N, "--shift", SHIFT]
    with states_saved(*states):
        adm.main(adm.parse_args(list(map(str, [*short, "--lr-theta", 0.01, "--out", out, *flags]))))
    return out


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return train(tmp_path_factory.mktemp("full") / "run", states=[1])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return train(tmp_path_factory.mktemp("lora") / "run", "--lora-rank", 4)


@pytest.fixture(params=["full", "adapter"])
def finished(request):
    return request.getfixturevalue(request.param)


# ---- what is written ----------------------------------------------------------------------------------------------

def test_a_picture_for_every_prompt_and_a_grid(tmp_path):
    images = pictures(tmp_path / "new" / "folder", "--steps", 1)
    names = [f"{i:03d}.png" for i in range(len(ROW.sample_prompts))]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [*names, "grid.png"]
    for i, (image, prompt) in enumerate(zip(images, ROW.sample_prompts, strict=True)):
        assert image.size == ROW.size[::-1] and image.mode == "RGB"
        assert image.text == dict(prompt=prompt, seed="0", index=str(i), steps="1", cfg=f"{ROW.teacher_cfg:g}", model="tiny-sd3",
                                  ckpt="tiny_sd3.safetensors", size="32x32", precision="fp32 fp32",
                                  weights=fingerprint(ROW.ckpt)[:16])


def test_text_chunks_tell_the_settings(tmp_path):
    prompt = "a ring, \u201cr\u00f3sa\u201d \u7ea2"
    image, = pictures(tmp_path, "--prompt", prompt, "--steps", 2, "--cfg", 1.5, "--seed", 7)
    assert image.text == dict(prompt=prompt, seed="7", index="0", steps="2", cfg="1.5", model="tiny-sd3",
                              ckpt="tiny_sd3.safetensors", size="32x32", precision="fp32 fp32",
                              weights=fingerprint(ROW.ckpt)[:16])


def test_prompts_from_a_file_repeat_with_other_noise(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n\na blue ring\n")
    images = pictures(tmp_path / "out", "--prompts", tmp_path / "p.txt", "--steps", 1, "--count", 3)
    assert [image.text["prompt"] for image in images] == ["a red circle", "a blue ring", "a red circle"]
    assert difference(images[:1], images[2:]) > 1
    assert len(pictures(tmp_path / "two", "--prompts", tmp_path / "p.txt", "--steps", 1)) == 2


def test_the_empty_prompt_is_a_prompt(tmp_path):
    assert [image.text["prompt"] for image in pictures(tmp_path, "--prompt", "", "--steps", 1)] == [""]


# ---- what the pictures depend on ----------------------------------------------------------------------------------

def test_seed_and_place_decide_not_batch_or_count(tmp_path):
    flags = ["--steps", 2, "--seed", 3]
    images = pictures(tmp_path / "a", *flags, "--count", 5)
    assert difference(images, pictures(tmp_path / "b", *flags, "--count", 5)) == 0
    for batch in (1, 2, 100):  # matrix products of another height round otherwise, at most to the next grey level
        assert difference(images, pictures(tmp_path / f"batch{batch}", *flags, "--count", 5, "--batch", batch)) <= 1
    assert difference(images[:2], pictures(tmp_path / "c", *flags, "--count", 2)) <= 1
    others = pictures(tmp_path / "d", "--steps", 2, "--seed", 4, "--count", 5)
    assert all(difference([a], [b]) > 1 for a, b in zip(images, others))


@pytest.mark.parametrize("size", [(16, 40), (64, 64)])
def test_other_sizes(tmp_path, size):
    image, = pictures(tmp_path, "--steps", 1, "--count", 1, "--size", *size)
    assert image.size == size[::-1]


def settings(monkeypatch, tmp_path, *flags):
    """The times and the guidance that sample.py chooses."""
    seen = []

    def generate(F, text, vae, prompts, tn, latent_shape, seed, cfg, batch, decode_batch, *parallel):
        seen[:] = tn, cfg  # of each block the same
        return torch.zeros(len(prompts), 3, 8, 8, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(sample.sampling, "generate", generate)
        pictures(tmp_path / f"settings{len(list(tmp_path.iterdir()))}", *flags)
    return seen


def test_a_teacher_is_sampled_as_a_teacher(monkeypatch, tmp_path):
    tn, cfg = settings(monkeypatch, tmp_path)
    assert torch.equal(tn, teacher_times(ROW.teacher_steps, ROW.shift)) and cfg == ROW.teacher_cfg
    tn, cfg = settings(monkeypatch, tmp_path, "--steps", 5, "--cfg", 1)
    assert torch.equal(tn, teacher_times(5, ROW.shift)) and cfg is None  # one evaluation a step


def test_a_run_is_sampled_with_its_own_steps_and_no_guidance(monkeypatch, tmp_path, finished):
    tn, cfg = settings(monkeypatch, tmp_path, "--ckpt", finished)
    assert torch.equal(tn, generator_times(N, SHIFT)) and cfg is None
    tn, cfg = settings(monkeypatch, tmp_path, "--ckpt", finished, "--steps", 4, "--cfg", 2)
    assert torch.equal(tn, generator_times(4, SHIFT)) and cfg == 2


def test_other_students(monkeypatch, tmp_path):
    """Few even times without guidance, or those named; a student of others says nothing of itself."""
    tn, cfg = settings(monkeypatch, tmp_path, "--shift", 1, "--steps", 4)
    assert torch.equal(tn, generator_times(4, 1.0)) and cfg is None
    tn, _ = settings(monkeypatch, tmp_path, "--shift", 3)
    assert torch.equal(tn, generator_times(ROW.steps, 3.0))
    tn, cfg = settings(monkeypatch, tmp_path, "--times", 1, 0.75, 0.5, 0.25, "--cfg", 2)
    assert tn.tolist() == [0, 0.25, 0.5, 0.75, 1] and cfg == 2
    tn, _ = settings(monkeypatch, tmp_path, "--model", "tiny-sdxl", "--times", 0.40049)  # DDPM's are n / 1000
    assert tn.tolist() == pytest.approx([0, 0.4])
    along, again = (pictures(tmp_path / name, "--count", 1, "--shift", 1, "--steps", 2, *flags)
                    for name, flags in (("along", ()), ("again", ["--renoise"])))
    once, = pictures(tmp_path / "once", "--count", 1, "--shift", 1, "--steps", 1, "--renoise")
    assert along[0].tobytes() != again[0].tobytes()
    assert once.tobytes() == pictures(tmp_path / "one", "--count", 1, "--shift", 1, "--steps", 1)[0].tobytes()


# ---- exports ------------------------------------------------------------------------------------------------------

def test_a_run_folder_gives_the_pictures_of_the_run(tmp_path, finished):
    """The run's last grid comes from the weights in training, an adapter unmerged; sample.py reads the export and merges it."""
    images = pictures(tmp_path, "--ckpt", finished)
    assert {(image.text["steps"], image.text["cfg"]) for image in images} == {(str(N), "1")}
    # Merged or not, and batches of 4 and of 2 * 2, are float32 sums in another order: at most the next grey level.
    assert difference([Image.open(tmp_path / "grid.png")], [Image.open(finished / "samples" / "00000001.png")]) <= 1
    assert difference(images, pictures(tmp_path / "teacher", "--steps", N, "--cfg", 1)) > 1


def test_the_exported_file_alone_is_enough(tmp_path, full):
    assert difference(pictures(tmp_path / "file", "--ckpt", full / "generator.safetensors"),
                      pictures(tmp_path / "run", "--ckpt", full)) == 0


def test_both_lora_files_give_the_pictures_of_the_run(tmp_path, adapter):
    assert not (adapter / "generator.safetensors").exists()
    images = pictures(tmp_path / "run", "--ckpt", adapter)
    for name in ("generator_lora.safetensors", "generator_lora_kohya.safetensors"):
        same = pictures(tmp_path / name, "--lora", adapter / name)
        assert difference(same, images) == 0
        weights = " ".join(fingerprint(path)[:16] for path in (ROW.ckpt, adapter / name))
        assert same[0].text == images[0].text | dict(weights=weights)
    assert difference(pictures(tmp_path / "off", "--lora", adapter / name, "--lora-scale", 0), images) > 1


def test_a_folder_with_an_adapter_is_that_adapter(tmp_path, adapter):
    """Which says how it is sampled: without that it would be a teacher's 28 guided steps."""
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "generator_lora.safetensors").symlink_to(adapter / "generator_lora.safetensors")
    images = pictures(tmp_path / "out", "--lora", tmp_path / "copy", "--count", 2)
    assert difference(images, pictures(tmp_path / "run", "--ckpt", adapter, "--count", 2)) == 0


def test_an_export_knows_its_model(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny-other", ROW)
    out = train(tmp_path / "run", "--model", "tiny-other", "--lora-rank", 1)
    for flags in (["--ckpt", out], ["--lora", out / "generator_lora.safetensors"]):
        assert pictures(tmp_path / "out", *flags, "--count", 1)[0].text["model"] == "tiny-other"


def test_a_local_copy_of_a_repository_of_several_checkpoints(tmp_path):
    (tmp_path / "copy").mkdir()
    for name in (ROW.file, "of_another_kind.safetensors"):
        (tmp_path / "copy" / name).symlink_to(ROW.ckpt)
    images = pictures(tmp_path / "out", "--ckpt", tmp_path / "copy", "--steps", 1, "--count", 2)
    assert difference(images, pictures(tmp_path / "default", "--steps", 1, "--count", 2)) == 0


def test_the_exported_file_is_the_source_but_for_the_denoiser(full):
    source, export = open_tensors(ROW.ckpt), open_tensors(full / "generator.safetensors")
    assert export.shapes == source.shapes
    changed = {name for name in source if not torch.equal(source[name].float(), export[name].float())}
    assert changed and all(name.startswith(DENOISER) for name in changed)
    for name in source:
        assert export[name].dtype == (torch.float32 if name.startswith(DENOISER) else source[name].dtype), name
    assert export.metadata["dmdx.steps"] == str(N) and export.metadata["dmdx.model"] == "tiny-sd3"


def test_export_again_in_another_dtype(tmp_path, full):
    """--resume of a finished run trains nothing more and exports."""
    before = open_tensors(full / "generator.safetensors")
    before = {name: before[name] for name in before}
    train(full, "--resume", "--export-dtype", "fp16")
    after = open_tensors(full / "generator.safetensors")
    for name, value in before.items():
        assert torch.equal(after[name], value.half() if name.startswith(DENOISER) else value), name


def test_a_run_folder_is_sampled_at_its_size_and_without_t5_as_trained(tmp_path):
    out = train(tmp_path / "run", "--size", 16, 24, "--no-t5")
    assert pictures(tmp_path / "own", "--ckpt", out)[0].size == (24, 16)
    assert difference([Image.open(tmp_path / "own" / "grid.png")], [Image.open(out / "samples" / "00000001.png")]) <= 1
    assert pictures(tmp_path / "other", "--ckpt", out, "--size", 32, 16, "--count", 1)[0].size == (16, 32)


def test_text_encoders_beside_the_checkpoint(tmp_path, monkeypatch):
    """As in SD3's repositories: a single file without text encoders, and text_encoders/ beside it."""
    source, names = open_tensors(ROW.ckpt), ("clip_l", "clip_g", "t5xxl")
    save_safetensors(tmp_path / "x.safetensors", {name: source[name] for name in source if not name.startswith("text_encoders.")})
    for name in names:
        encoder = source.group(f"text_encoders.{name}.transformer.")
        save_safetensors(tmp_path / "text_encoders" / f"{name}.safetensors", {key: encoder[key] for key in encoder})
    files = tuple(f"text_encoders/{name}.safetensors" for name in names)
    monkeypatch.setitem(PRESETS, "tiny-sd3", ROW._replace(text_files=files))
    out = train(tmp_path / "run", "--ckpt", tmp_path / "x.safetensors")
    pictures(tmp_path / "out", "--ckpt", out)
    assert difference([Image.open(tmp_path / "out" / "grid.png")], [Image.open(out / "samples" / "00000001.png")]) <= 1


# ---- one folder, one generator -------------------------------------------------------------------------------------

def test_a_folder_with_samples_of_other_settings_is_refused(tmp_path, full):
    """A shorter run would leave the end of a longer one, which evaluate.py could not tell apart."""
    pictures(tmp_path, "--ckpt", full, "--count", 6)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    weights = [fingerprint(path)[:16] for path in (full / "generator.safetensors", ROW.ckpt)]
    cases = {f"seed 0 (now 1), steps {N} (now 1), cfg 1 (now {ROW.teacher_cfg:g}), ckpt run (now tiny_sd3.safetensors), "
             "weights {} (now {})".format(*weights): ["--seed", 1, "--steps", 1, "--count", 2],
             "seed 0 (now 1)": ["--ckpt", full, "--seed", 1, "--count", 2],
             "size 32x32 (now 16x16)": ["--ckpt", full, "--size", 16, 16],
             f"prompt {ROW.sample_prompts[0]} (now a ring)": ["--ckpt", full, "--prompt", "a ring"]}
    for differences, flags in cases.items():
        with pytest.raises(InputError) as caught:
            pictures(tmp_path, *flags)
        assert str(caught.value) == (f"{tmp_path}: 000.png is of other settings: {differences}; "
                                     "expected another --out, or this one emptied")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_another_process_fills_while_this_one_loads(tmp_path, monkeypatch):
    def hold(out):
        save_png(out / "000.png", torch.zeros(3, 8, 8), {"prompt": "x", "model": "tiny-sdxl"})
    monkeypatch.setattr(sample, "hold", hold)
    with pytest.raises(InputError, match="000.png is of other settings: .*model tiny-sdxl"):
        pictures(tmp_path, "--count", 2)


def test_the_same_settings_again_shorter_or_longer(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"whatever is not named as sample.py does is left alone")
    for count in (3, 2, 4):
        images = pictures(tmp_path, "--steps", 1, "--count", count)
    assert len(images) == 4 and {image.text["prompt"] for image in images} == set(ROW.sample_prompts[:4])


# ---- what is refused ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (["--size", 36, 32], "--size 36 32: tiny-sd3 takes multiples of 8 up to 64"),
    (["--size", 72, 32], "--size 72 32"), (["--size", 0, 32], "--size 0 32"),
    (["--steps", 0], "--steps 0: expected at least 1"), (["--count", -1], "--count -1"), (["--batch", 0], "--batch 0"),
    (["--ckpt", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    (["--ckpt", "runs/nowhere"], "runs/nowhere: no such file or folder; expected a checkpoint or a run folder"),
    (["--lora", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    (["--lora", ROW.ckpt], f"{ROW.ckpt}: expected LoRA keys"),
    (["--times", 0.5, 1], "--times 0.5 1.0: expected falling times"), (["--times", 0], "--times 0: expected at least"),
    (["--times", 1, "--steps", 1], "--times 1.0: expected falling times, no --steps"), (["--shift", 0], "--shift 0"),
    (["--prompts", "nowhere.txt"], "nowhere.txt: no such file"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_refused_in_words(tmp_path, flags, words):
    with pytest.raises(InputError) as caught:
        pictures(tmp_path / "out", *flags)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_another_base_than_its_runs_is_told(tmp_path, capsys):
    tensors = open_tensors(ROW.ckpt)
    weights = {name: tensors[name] for name in tensors}
    save_safetensors(tmp_path / "x.safetensors", weights)
    run = train(tmp_path / "run", "--ckpt", tmp_path / "x.safetensors", "--lora-rank", 4)
    pictures(tmp_path / "out", "--ckpt", run, "--count", 1)
    assert "another checkpoint" not in capsys.readouterr().out
    save_safetensors(tmp_path / "x.safetensors", weights | {DENOISER + "pos_embed": weights[DENOISER + "pos_embed"] + 1})
    pictures(tmp_path / "new", "--ckpt", run, "--count", 1)
    note = f"note: {run / 'generator_lora.safetensors'} was trained on another checkpoint than {tmp_path / 'x.safetensors'}\n"
    assert note in capsys.readouterr().out
    train(tmp_path / "on", "--ckpt", tmp_path / "x.safetensors", "--lora-rank", 4, "--init", run)
    assert note in capsys.readouterr().out
    (run / "generator_lora.safetensors").rename(tmp_path / "moved.safetensors")
    pictures(tmp_path / "apart", "--ckpt", tmp_path / "x.safetensors", "--lora", tmp_path / "moved.safetensors", "--count", 1)
    assert f"note: {tmp_path / 'moved.safetensors'} was trained on another checkpoint than" in capsys.readouterr().out


def test_a_runs_export_is_decoded_by_the_vae_that_it_holds(tmp_path):
    """And not by what stands by now in the file that training was given."""
    vae = tmp_path / "vae.safetensors"
    vae.write_bytes(ROW.ckpt.read_bytes())
    run = train(tmp_path / "run", "--vae-ckpt", vae)
    vae.unlink()
    assert difference(pictures(tmp_path / "a", "--ckpt", run), pictures(tmp_path / "b", "--ckpt", run / "generator.safetensors")) == 0


def test_text_encoders_that_changed_since_a_run_are_told(tmp_path, capsys):
    tensors, texts = open_tensors(ROW.ckpt), tmp_path / "texts.safetensors"
    encoders = {name: tensors[name] for name in tensors if name.startswith("text_encoders.")}
    save_safetensors(texts, encoders)
    run = train(tmp_path / "run", "--text-ckpt", texts)
    pictures(tmp_path / "a", "--ckpt", run, "--count", 1)
    assert "is not as it was" not in capsys.readouterr().out
    name = "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias"
    save_safetensors(texts, encoders | {name: encoders[name] + 1})
    pictures(tmp_path / "b", "--ckpt", run, "--count", 1)
    assert f"note: {texts} is not as it was when {run} was trained\n" in capsys.readouterr().out
    pictures(tmp_path / "c", "--ckpt", run, "--count", 1, "--text-ckpt", ROW.ckpt)
    assert "is not as it was" not in capsys.readouterr().out


def test_flags_of_which_one_would_be_passed_over(tmp_path, adapter):
    other = adapter / "generator_lora.safetensors"
    with pytest.raises(InputError, match=f"--lora {other}: {adapter} is an adapter itself; expected no --lora"):
        pictures(tmp_path / "out", "--ckpt", adapter, "--lora", other)
    with pytest.raises(InputError, match="--prompt a ring --prompts shapes: expected one of the two"):
        pictures(tmp_path / "out", "--prompt", "a ring", "--prompts", "shapes")
    assert not (tmp_path / "out").exists()


def test_another_model_than_the_export_says(tmp_path, full, adapter):
    for flags, file in ((["--ckpt", full], full / "generator.safetensors"),
                        (["--lora", adapter / "generator_lora.safetensors"], adapter / "generator_lora.safetensors")):
        with pytest.raises(InputError) as caught:
            pictures(tmp_path / "out", *flags, "--model", "tiny-sdxl")
        assert str(caught.value) == f"--model tiny-sdxl: {file} was trained for tiny-sd3; expected that one or no --model"


def test_a_run_that_went_on_after_its_export(tmp_path, full, capsys):
    """And was stopped: what it has exported is the generator of its first end."""
    run, said = shutil.copytree(full, tmp_path / "run"), "note: {} is at update 1 of 9; the generator there is of an end before that\n"
    pictures(tmp_path / "a", "--ckpt", run, "--count", 1)
    assert "note:" not in capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())
    config["args"]["max_iter"] = 9
    (run / "config.json").write_text(json.dumps(config))
    pictures(tmp_path / "b", "--ckpt", run, "--count", 1)
    assert said.format(run) in capsys.readouterr().out
    train(tmp_path / "c", "--init", run)
    assert said.format(run) in capsys.readouterr().out
    (run / "state" / "iter_00000001" / "progress.json").write_text("{")
    pictures(tmp_path / "d", "--ckpt", run, "--count", 1)
    assert "note:" not in capsys.readouterr().out


def test_folders_that_are_no_finished_run(tmp_path, full):
    (tmp_path / "config.json").write_bytes((full / "config.json").read_bytes())
    with pytest.raises(InputError, match="no exported generator yet"):
        pictures(tmp_path / "out", "--ckpt", tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 1}')  # of some other program
    with pytest.raises(InputError, match="no weights in this folder"):
        pictures(tmp_path / "out", "--ckpt", tmp_path)


def test_a_refused_size_is_one_line_and_exit_code_2(tmp_path):
    message = refusal_of("sample.py", "--size", 30, 32, "--out", tmp_path / "out")
    assert message == "sample.py: --size 30 32: tiny-sd3 takes multiples of 8 up to 64\n"
    assert not (tmp_path / "out").exists()
