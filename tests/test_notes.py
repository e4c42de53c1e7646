"""Files that say what they are, and are read so or refused: checkpoints, exports, adapters, run folders, ODE pairs."""
import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refusal_of, run, says
from safetensors.torch import save_file

import adm
import adp
import collect_odes
import sample
from models.checkpoint import InputError, Tensors, open_tensors, save_safetensors
from models.diffusers_names import MMDIT
from models.diffusion import alphas_cumprod
from models.job.families import FAMILIES, check_positions
from models.job import flags as flags_of_scripts
from models.job.networks import teacher_files
from models.job.notes import check_announced, check_scale, export_notes, run_settings
from models.presets import PRESETS

SD3, SDXL = PRESETS["tiny-sd3"], PRESETS["tiny-sdxl"]
DENOISER, VAE = "model.diffusion_model.", "first_stage_model."
SMALL = ["--batch-size", 2, "--max-iter", 1, "--evaluate", 0]


def contents(path, **metadata) -> tuple[dict, dict]:
    tensors = open_tensors(path)
    return {name: tensors[name] for name in tensors}, tensors.metadata | metadata


def file_of(names=(), metadata=None) -> Tensors:
    tensors = names if isinstance(names, dict) else {name: torch.zeros(0) for name in names}
    return Tensors(Path("x.safetensors"), {name: tuple(t.shape) for name, t in tensors.items()},
                   lambda name, rows: tensors[name], metadata)


# ---- checkpoints ---------------------------------------------------------------------------------------------------

ZERO_SNR = alphas_cumprod("cogvideox-5b").float()  # SDXL's, shifted and stretched to end at 0


@pytest.mark.parametrize("names, metadata, words", [
    (["v_pred"], {}, "a v-prediction checkpoint (it has a tensor v_pred)"),
    (["v_pred", "ztsnr"], {}, "a v-prediction checkpoint"),
    (["ztsnr"], {}, "trained with zero terminal SNR"),
    (["edm_mean", "edm_std"], {}, "trained on an EDM schedule (it has a tensor edm_mean)"),
    (["edm_vpred.sigma_max"], {}, "trained on an EDM schedule"),
    ({"alphas_cumprod": ZERO_SNR}, {}, "trained on another noise schedule"),
    ({"alphas_cumprod": torch.full((1000,), float("nan"))}, {}, "trained on another noise schedule"),
    ([], {"modelspec.prediction_type": "v"}, "of another prediction (modelspec.prediction_type v)"),
    ([], {"modelspec.predict_key": "v"}, "of another prediction"),
    ([], {"modelspec.architecture": "stable-diffusion-3-medium"}, "another model"),
    ([], {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "another model"),
    ([], {"dmdx.predicts": "velocity", "dmdx.schedule": "flow"}, "a generator of another parametrisation"),
])
def test_another_parametrisation_of_sdxl_is_refused(names, metadata, words):
    message = says(check_announced, file_of(names, metadata), PRESETS["sdxl"])
    assert message.startswith(f"x.safetensors: is {words}")
    assert message.endswith("; expected a network that predicts epsilon on the schedule sdxl")


@pytest.mark.parametrize("model, names, metadata", [
    ("sdxl", {"alphas_cumprod": alphas_cumprod("sdxl").half()},
     {"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-xl-v1-base"}),
    ("sd1.5", {"alphas_cumprod": alphas_cumprod("sdxl").float()}, {"modelspec.architecture": "stable-diffusion-v1"}),
    ("animatediff", {"alphas_cumprod": alphas_cumprod("sdxl").float()}, {}),  # the base's, not the motion modules'
    ("sd3-medium", {}, {"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-3-medium"}),
    ("sd3.5-large", {}, {"modelspec.architecture": "stable-diffusion-v3.5-large"}),
    ("cogvideox-2b", {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {"dmdx.predicts": "v"}),
    ("sdxl", {}, {"modelspec.architecture": "my-model", "dmdx.predicts": "epsilon", "dmdx.schedule": "sdxl"}),
])
def test_what_files_say_truly_is_accepted(model, names, metadata):
    check_announced(file_of(names, metadata), PRESETS[model])


@pytest.mark.parametrize("model, settings, words", [
    ("sdxl", {"prediction_type": "v_prediction"}, "prediction_type v_prediction"),
    ("sdxl", {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
    ("sdxl", {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"}, "_class_name EDM"),
    ("sdxl", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name Flow"),
    ("sdxl", {"beta_schedule": "linear"}, "beta_schedule linear"),
    ("sd3-medium", {"_class_name": "EulerDiscreteScheduler"}, "_class_name Euler"),
    ("cogvideox-2b", {"snr_shift_scale": 1.0}, "snr_shift_scale 1.0"),
    ("sdxl", {"prediction_type": "epsilon", "beta_start": 0.00085, "timestep_spacing": "leading"}, ""),
    ("sd3-medium", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, ""),
    ("cogvideox-5b", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}, ""),
], ids=str)
def test_the_scheduler_beside_a_denoisers_folder(tmp_path, model, settings, words):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    tensors = file_of()
    tensors.path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    if words:
        message = says(check_announced, tensors, PRESETS[model])
        assert f"scheduler_config.json has {words}" in message
    else:
        check_announced(tensors, PRESETS[model])


def test_a_vae_of_another_scale(tmp_path):
    for settings, refused in (({"_class_name": "AutoencoderKL", "scaling_factor": 0.18215}, True),
                              ({"_class_name": "AutoencoderKL", "scaling_factor": 0.13025, "shift_factor": None}, False),
                              ({"_class_name": ["AutoencoderKL"], "scaling_factor": 0.18215}, True),
                              ({"scaling_factor": 1}, False)):  # some other program's
        (tmp_path / "config.json").write_text(json.dumps(settings))
        if refused:
            assert "scaling_factor 0.18215; expected 0.13025" in says(check_scale, tmp_path / "x", PRESETS["sdxl"].vae)
        else:
            check_scale(tmp_path / "x", PRESETS["sdxl"].vae)


def test_learned_positions_of_cogvideox():
    row = PRESETS["tiny-cogvideox"]
    rows = 12 + 3 * 4 * 4  # text; 3 latent frames of 4 x 4 patches
    from models.cogvideox import sincos_table
    table = torch.zeros(1, rows, 96)
    table[0, 12:] = sincos_table(3, 4, 4, 96, 0.625, torch.float32)
    for name in ("patch_embed.pos_embedding", "model.diffusion_model.mixins.pos_embed.pos_embedding"):
        check_positions(file_of({name: table.bfloat16()}), row)
        assert f"{name} holds learned positions" in says(check_positions, file_of({name: table + 0.1 * torch.randn(rows, 96)}), row)
        assert "or those of another size" in says(check_positions, file_of({name: table[:, 1:]}), row)


@pytest.mark.parametrize("key, value", [
    ("dmdx.steps", "abc"), ("dmdx.steps", "-4"), ("dmdx.steps", "1000000000"), ("dmdx.steps", "1.5"), ("dmdx.shift", "nan"),
    ("dmdx.shift", "-1"), ("dmdx.cfg", "inf"), ("dmdx.model", "sd9"), ("dmdx.schedule", "cosine"), ("dmdx.predicts", "x"),
    ("dmdx.rollout", ""), ("dmdx.null_prompt", "a\nb")])
def test_metadata_that_no_export_writes(tmp_path, key, value):
    assert f"its metadata say {key} " in says(export_notes, file_of([], {"dmdx.steps": "4", key: value}))
    save_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"dmdx.model": "tiny-sd3", key: value})
    message = refusal_of("sample.py", "--ckpt", tmp_path / "x.safetensors", "--out", tmp_path / "out")
    assert message.startswith(f"sample.py: {tmp_path / 'x.safetensors'}: its metadata say {key}") and message.count("\n") == 1


def test_every_script_refuses_a_teacher_of_another_parametrisation(tmp_path):
    tensors, metadata = contents(SDXL.ckpt)
    save_safetensors(tmp_path / "v.safetensors", tensors | {"v_pred": torch.zeros(0)}, metadata)
    save_safetensors(tmp_path / "adp.safetensors", tensors, {
        "dmdx.model": "tiny-sdxl", "dmdx.steps": "1", "dmdx.predicts": "velocity", "dmdx.schedule": "flow"})
    for script in ("adm.py", "collect_odes.py"):
        for name, words in (("v", "v_pred"), ("adp", "dmdx.predicts velocity")):
            message = refusal_of(script, "--model", "tiny-sdxl", "--ckpt", tmp_path / f"{name}.safetensors", "--out",
                                 tmp_path / "out", printed=".*")
            assert words in message and "expected a network that predicts epsilon on the schedule sdxl" in message
    assert "v_pred" in refusal_of("sample.py", "--model", "tiny-sdxl", "--ckpt", tmp_path / "v.safetensors", printed="loading .*\n")
    run(sample, "--ckpt", tmp_path / "adp.safetensors", "--count", 1, "--out", tmp_path / "out")  # used as what it is


# ---- what people hold ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny-sd3 as a diffusers-layout download, twice as one has it (fp16 too); the VAE keeps its original names."""
    root, tensors = tmp_path_factory.mktemp("hub"), contents(SD3.ckpt)[0]
    net = argparse.Namespace(depth=SD3.config["depth"])
    hub = {}
    for name, value in tensors.items():
        if name.startswith(DENOISER):
            module, _, kind = name.removeprefix(DENOISER).rpartition(".")
            module, kind = (module, kind) if module else (kind, "")
            for theirs, rows in MMDIT.to_diffusers(module, value.shape[0], net).items():
                hub[f"{theirs}.{kind}".rstrip(".")] = torch.cat([value[start:stop] for start, stop in rows])
    parts = {"transformer/diffusion_pytorch_model": hub, "vae/diffusion_pytorch_model": VAE, "text_encoder/model": "clip_l",
             "text_encoder_2/model": "clip_g", "text_encoder_3/model": "t5xxl"}
    for place, part in parts.items():
        prefix = part if part == VAE else f"text_encoders.{part}.transformer."
        chosen = part if part is hub else {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        (root / place).parent.mkdir(exist_ok=True)
        for suffix in (".safetensors", ".fp16.safetensors"):
            save_file({name: t.contiguous().clone() for name, t in chosen.items()}, root / f"{place}{suffix}")
    for name in ("tokenizer", "tokenizer_3"):
        shutil.copytree(SD3.ckpt.parent / name, root / name)
    return root


def pictures(out, *flags) -> list[bytes]:
    run(sample, "--steps", 1, "--count", 2, "--out", out, *flags)
    from PIL import Image
    return [Image.open(out / f"{i:03d}.png").tobytes() for i in range(2)]


def test_a_diffusers_folder_samples_as_the_single_file_and_its_student_too(folder, tmp_path, capsys):
    expected = pictures(tmp_path / "single")
    assert pictures(tmp_path / "folder", "--ckpt", folder) == expected
    assert pictures(tmp_path / "inside", "--ckpt", folder / "transformer") == expected
    run(adm, *SMALL, "--ckpt", folder, "--lora-rank", 0, "--lr-theta", 1e-12, "--out", tmp_path / "run")
    assert "note: generator.safetensors holds no text encoders" in capsys.readouterr().out
    export = open_tensors(tmp_path / "run" / "generator.safetensors")
    assert set(export) == {name for name in open_tensors(SD3.ckpt) if name.startswith((DENOISER, VAE))}
    assert pictures(tmp_path / "student", "--ckpt", tmp_path / "run", "--cfg", SD3.teacher_cfg) == \
        pictures(tmp_path / "again", "--ckpt", tmp_path / "run" / "generator.safetensors", "--cfg", SD3.teacher_cfg,
                 "--text-ckpt", folder)


def test_a_denoiser_alone_and_a_vae_alone(tmp_path):
    tensors, _ = contents(SD3.ckpt)
    for prefix, name in ((DENOISER, "denoiser"), (VAE, "vae")):
        save_file({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)} | (
            {"loss.logvar": torch.zeros(())} if prefix == VAE else {}), tmp_path / f"{name}.safetensors")
    flags = ["--ckpt", tmp_path / "denoiser.safetensors", "--vae-ckpt", tmp_path / "vae.safetensors", "--text-ckpt", SD3.ckpt]
    assert pictures(tmp_path / "parts", *flags) == pictures(tmp_path / "single")


@pytest.mark.parametrize("row", [SD3, SDXL], ids=["sd3", "sdxl"])
def test_a_folder_with_a_sharded_single_file(tmp_path, row):
    tensors, _ = contents(row.ckpt)
    files = {name: f"x-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(tensors)}
    (tmp_path / "shards").mkdir()
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, tmp_path / "shards" / file)
    (tmp_path / "shards" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    model = f"tiny-{row.file[5:-12]}"
    assert pictures(tmp_path / "folder", "--model", model, "--ckpt", tmp_path / "shards") == \
        pictures(tmp_path / "single", "--model", model)


# ---- exports -------------------------------------------------------------------------------------------------------

def test_an_export_holds_this_runs_vae_and_nothing_stale(tmp_path):
    tensors, metadata = contents(SDXL.ckpt)
    stale = {"model_ema.decay": torch.ones(()), "model_ema.diffusion_modelout2weight": torch.zeros(2), "denoiser.sigmas": torch.ones(9),
             "alphas_cumprod": alphas_cumprod("sdxl").float()}
    save_safetensors(tmp_path / "base.safetensors", tensors | stale, metadata)
    other = {name.removeprefix(VAE): 2 * t for name, t in tensors.items() if name.startswith(VAE)}
    save_file(other, tmp_path / "vae.safetensors")
    run(adm, "--model", "tiny-sdxl", *SMALL, "--ckpt", tmp_path / "base.safetensors", "--vae-ckpt", tmp_path / "vae.safetensors",
        "--out", tmp_path / "run")
    export = open_tensors(tmp_path / "run" / "generator.safetensors")
    assert set(export) == set(tensors)
    assert all(torch.equal(export[VAE + name], t) for name, t in other.items())


def test_a_generator_that_is_not_finite_is_not_exported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flags_of_scripts, "check_numbers", lambda *args: None)  # else an infinite rate is refused
    for flags in ([], ["--lora-rank", 2]):
        with pytest.raises(InputError, match=r"the generator is not exported, because \d+ of its tensors are not finite"):
            run(adm, *SMALL, *flags, "--lr-theta", "inf", "--out", tmp_path / f"run{len(flags)}")
        assert not list((tmp_path / f"run{len(flags)}").glob("generator*"))
    with pytest.raises(InputError):  # the second update meets those weights
        run(adm, *SMALL, "--max-iter", 2, "--lr-theta", "inf", "--out", tmp_path / "two")
    found = capsys.readouterr()
    assert "iteration 2: loss_psi, grad_norm_psi" in found.out and "not finite, so that update is skipped; 1 iterations" in found.out


@pytest.mark.parametrize("name", [DENOISER + "final_layer.linear.bias", VAE + "decoder.conv_out.weight",
                                  "text_encoders.clip_g.transformer.text_model.embeddings.token_embedding.weight"])
def test_a_checkpoint_with_one_bad_number_is_refused_by_its_tensors_name(tmp_path, name):
    tensors, metadata = contents(SD3.ckpt)
    tensors[name].view(-1)[-1] = float("nan")
    save_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    message = refusal_of("sample.py", "--ckpt", tmp_path / "x.safetensors", "--out", tmp_path / "out",
                         printed="loading .*\n")
    assert message == f"sample.py: {tmp_path / 'x.safetensors'}: {name} holds NaN or infinity; expected finite weights\n"


# ---- run folders ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, words", [
    ("", "damaged"), ('{"args": {"model"', "damaged"), ("[1]", "expected the settings of a run, found [1]"), ("[" * 200_000, "too deep"),
    ('{"args": 3}', "holds args 3"), ('{"args": {}}', "has model missing"),
    ('{"args": {"model": "tiny-sd9", "ckpt": null, "text_ckpt": null, "tokenizers": "x", "size": [8, 8], "no_t5": false}}',
     "has model tiny-sd9")])
def test_broken_and_foreign_settings_of_a_run(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    message = says(run_settings, tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and words in message
    assert words in refusal_of("sample.py", "--ckpt", tmp_path, "--out", tmp_path / "out")


def test_another_programs_settings_are_none_of_ours(tmp_path):
    assert run_settings(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert run_settings(tmp_path) == {}


def test_resume_says_that_the_prompts_changed(tmp_path, capsys):
    flags = [*SMALL, "--lora-rank", 2, "--fake-lora", 2, "--prompts", tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "run"]
    (tmp_path / "a.txt").write_text("a red circle\n")
    (tmp_path / "b.txt").write_text("a blue square\n")
    run(adm, *flags)
    run(adm, *flags, "--resume")
    assert "changed since" not in capsys.readouterr().out
    (tmp_path / "b.txt").write_text("a green square\n")
    run(adm, *flags, "--resume")
    assert "changed since this run was last started: prompts\n" in capsys.readouterr().out


# ---- ODE pairs and latents -----------------------------------------------------------------------------------------

def test_pairs_of_another_teacher_or_other_conditions_are_refused(tmp_path, capsys):
    pairs = tmp_path / "pairs"
    run(collect_odes, "--count", 2, "--steps", 1, "--cfg", 3, 3, "--out", pairs)
    flags = [*SMALL, "--pairs", pairs, "--loss", "mse"]
    run(adp, *flags, "--out", tmp_path / "run")
    assert f"note: {pairs} was made with steps 1 (this run's: 25), cfg [3.0, 3.0] (this run's: [1.5, 2.5])\n" in capsys.readouterr().out
    tensors, metadata = contents(SDXL.ckpt)
    tensors[DENOISER + "out.2.bias"] += 1
    save_safetensors(tmp_path / "other.safetensors", tensors, metadata)
    assert f"{pairs}: these pairs were made with other --ckpt; expected" in says(
        run, adp, *flags, "--ckpt", tmp_path / "other.safetensors", "--out", tmp_path / "no")
    tensors, metadata = contents(SDXL.ckpt)
    tensors[DENOISER + "input_blocks.1.0.in_layers.0.bias"] += 1  # a few bytes anywhere in the file
    save_safetensors(tmp_path / "few.safetensors", tensors, metadata)
    assert "made with other --ckpt" in says(run, adp, *flags, "--ckpt", tmp_path / "few.safetensors", "--out", tmp_path / "no")
    manifest = json.loads((pairs / "manifest.json").read_text())
    (pairs / "manifest.json").write_text(json.dumps(manifest | {"no_t5": True}))
    assert "made with other --no-t5" in says(run, adp, *flags, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_teachers_are_told_by_the_files_that_are_read(folder, tmp_path):
    """Of a folder not by its VAE or what else lies there; by its tokenizers too."""
    copy = shutil.copytree(folder, tmp_path / "folder")
    args = argparse.Namespace(ckpt=copy, motion_ckpt=None, text_ckpt=None, tokenizers=SD3.tokenizers, no_t5=False, null_prompt=None)
    before = teacher_files(args, SD3)
    save_file({"x": torch.zeros(1)}, copy / "lora.safetensors")
    save_file({"x": torch.zeros(1)}, copy / "vae" / "diffusion_pytorch_model.safetensors")
    assert teacher_files(args, SD3) == before
    (copy / "tokenizer_3" / "added.json").write_text("{}")
    assert [key for key, value in teacher_files(args, SD3).items() if value != before[key]] == ["tokenizers"]
    (tmp_path / "text_encoders").mkdir()
    args.ckpt = Path(shutil.copy(SD3.ckpt, tmp_path))
    before = teacher_files(args, SD3)
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert teacher_files(args, SD3) == before
    save_file({"x": torch.zeros(1)}, tmp_path / "text_encoders" / "clip_l.safetensors")
    assert [key for key, value in teacher_files(args, SD3).items() if value != before[key]] == ["text_ckpt"]


def test_families_take_the_same_vae_for_the_export():
    """`networks.export` takes the tensors of `open_vae` for those of a single file."""
    for name in ("tiny-sd3", "tiny-sdxl", "tiny-sd15"):
        args = argparse.Namespace(ckpt=PRESETS[name].ckpt, vae_ckpt=None)
        vae, single = FAMILIES[PRESETS[name].family].open_vae(args, PRESETS[name]), open_tensors(args.ckpt)
        assert {VAE + key: shape for key, shape in vae.shapes.items()} == \
            {key: shape for key, shape in single.shapes.items() if key.startswith(VAE)}
