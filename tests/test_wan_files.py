"""Wan2.1's presets, the layouts of its files, and the scripts on a small release of random weights."""
import json
import shutil

import av
import pytest
import sentencepiece
import torch
from conftest import golden, rows, run, wan_golden
from safetensors.torch import save_file

import adm
import dmd
import sample
from models import wan_vae
from models.checkpoint import InputError, Tensors, find, open_tensors
from models.diffusers_names import WAN, wan_from_diffusers, wan_vae_from_diffusers
from models.job import networks
from models.job.families import FAMILIES
from models.job.flags import resolve_model
from models.lora import merge_lora, read_lora
from models.parallel import init_distributed
from models.pictures import read_text
from models.presets import PRESETS
from models.wan import Wan, config_from_shapes

pytestmark = pytest.mark.filterwarnings("ignore:ftfy is not installed")  # it need not be


@pytest.mark.parametrize("size", ["1.3b", "14b"])
def test_preset_is_the_published_checkpoint(size):
    row, family = PRESETS[f"wan2.1-{size}"], FAMILIES["wan"]
    published, autoencoder = (json.loads(path.read_text())["original"]["keys"] for path in (
        *golden(f"wan_{size}.keys.json"), *golden("wan_vae.keys.json")))
    for config_of, keys, expected in ((config_from_shapes, published, row.config),
                                      (family.vae_config_from_shapes, autoencoder, row.vae)):
        assert config_of({name: tuple(shape) for name, shape in keys.items()}) == expected
    assert (row.steps, row.cfg, row.batch_size, row.micro_batch, row.lr_theta) == (4, (4.0, 6.0), 8, 1, 1e-7)
    assert (row.shift, row.lora_rank, row.teacher_cfg, family.fps) == (5, *((0, 6) if size == "1.3b" else (64, 5)), 16)
    args = adm.parse_args(["--model", f"wan2.1-{size}", "--ckpt", "x"])
    init_distributed()
    resolve_model(args)
    assert networks.latent_shape(args, row) == (21, 16, 60, 104)  # 81 frames of 480 x 832
    assert args.null_prompt == "negative"


@pytest.mark.parametrize("flags, said", [
    (["--frames", "8"], "takes 4 k + 1 frames: 1, 5, 9, 13, ...; its own are 81"),
    (["--size", "480", "840"], "takes multiples of 16"),
    (["--sequence-parallel", "8"], "12 attention heads; expected one of 1, 2, 3, 4, 6, 12"),
    (["--context-parallel", "2"], "--context-parallel 2: not for wan2.1-1.3b; expected none"),
    (["--null-prompt", "zeros"], "--null-prompt zeros: not for wan2.1-1.3b; expected negative or empty")])
def test_flags_that_it_cannot_take_are_refused(flags, said):
    init_distributed()
    with pytest.raises(InputError) as caught:
        resolve_model(adm.parse_args(["--model", "wan2.1-1.3b", *flags]))
    assert str(caught.value).endswith(said)


@pytest.mark.parametrize("file, read", [("wan_1.3b", wan_from_diffusers), ("wan_14b", wan_from_diffusers),
                                        ("wan_vae", wan_vae_from_diffusers)])
def test_diffusers_names_become_the_originals(file, read):
    path, = golden(f"{file}.keys.json")
    data = json.loads(path.read_text())
    original, theirs = ({name: tuple(shape) for name, shape in data[key]["keys"].items()}
                        for key in ("original", "diffusers"))
    tensors, again = read(Tensors(path, theirs | {"router.weight": (2,)}, None)), Tensors(path, original, None)
    assert tensors.shapes == original | {"router.weight": (2,)} and read(again) is again
    if file != "wan_vae":  # and back, as adapters are named
        found = [name for name in original if name.endswith(".weight") and len(original[name]) > 1]
        named = {name: WAN.to_diffusers(name.removesuffix(".weight"), 7, None) for name in found}
        for name, modules in named.items():
            (module, rows), = modules.items()
            assert theirs[f"{module}.weight"] == original[name] and rows == [(0, 7)]
        assert len({*sum(map(list, named.values()), [])}) == len(found)


def test_an_autoencoder_of_other_levels_has_its_names_too():
    """With 1 and 3 ResNets a level going down, 2 and 4 going up; the published one has 2 and 3."""
    for blocks in (1, 3):
        with torch.device("meta"):
            ours = wan_vae.WanVAE((6, 12), blocks, 16, (True,)).state_dict()
        last = f"decoder.upsamples.{blocks + 1}."  # of level 0: the upsampling
        named = {name: tuple(p.shape) for name, p in ours.items() if name.startswith("decoder.upsamples.")}
        theirs = {"encoder.conv_in.weight": ()}
        for name in named:
            level, i = divmod(int(name.split(".")[2]), blocks + 2)
            place = "upsamplers.0" if name.startswith(last) else f"resnets.{i}"
            rest = name.split(".", 3)[3]
            for old, new in (("residual.0", "norm1"), ("residual.2", "conv1"), ("residual.3", "norm2"),
                             ("residual.6", "conv2"), ("shortcut", "conv_shortcut")):
                rest = rest.replace(old, new)
            theirs[f"decoder.up_blocks.{level}.{place}.{rest}"] = named[name]
        read = wan_vae_from_diffusers(Tensors("vae", theirs, None)).shapes
        assert {name: shape for name, shape in read.items() if name in named} == named


SIZES = dict(depth=3, width=256, heads=2, ffn_dim=64, freq_dim=32, text_dim=48, in_channels=16, patch=2, text_len=20)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A folder like the original's release, of random weights, and its preset in place of that of 1.3B."""
    folder = tmp_path_factory.mktemp("Wan2.1-T2V-1.3B")
    torch.manual_seed(0)
    save_file(Wan(**SIZES).state_dict(), folder / "diffusion_pytorch_model.safetensors")
    for file, name in (("wan_vae_small", "Wan2.1_VAE"), ("wan_t5_small", "models_t5_umt5-xxl-enc-bf16")):
        _, weights, _ = wan_golden(golden(f"{file}.safetensors")[0])
        torch.save({name: w.bfloat16() if "t5" in file else w for name, w in weights.items()}, folder / f"{name}.pth")
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "prompts.txt").write_text("a red fox runs\nsnow in the fox\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "prompts.txt"), model_prefix=str(folder / "google" / "umt5-xxl" / "spiece"), vocab_size=20,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    (folder / "google" / "umt5-xxl" / "tokenizer_config.json").write_text(json.dumps(
        dict(tokenizer_class="T5Tokenizer", extra_ids=0, additional_special_tokens=[])))
    row = PRESETS["wan2.1-1.3b"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "wan2.1-1.3b", row._replace(
            config=SIZES, vae=row.vae | dict(ch=(6, 12, 24, 24)), t5_length=20, size=(32, 32), frames=5,
            teacher_steps=2, steps=2, batch_size=1, head_width=32, evaluate=1, sample_prompts=("a fox",),
            lr_theta=1e-2))
        yield folder


def loaded(*flags):
    """(denoiser, VAE, text encoder) by the flags."""
    args = adm.parse_args(["--model", "wan2.1-1.3b", *map(str, flags)])
    device, mesh = init_distributed()
    row = resolve_model(args)
    return (networks.load_network(args, row, mesh, device), networks.load_vae(args, row, device),
            networks.load_text(args, row, mesh, device))


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def theirs_of(weights, read):
    """Tensors under the names that `read` presents as these: found by reading each name of a manifest."""
    file = "wan_vae" if read is wan_vae_from_diffusers else "wan_1.3b"
    names = json.loads(golden(f"{file}.keys.json")[0].read_text())["diffusers"]["keys"]
    presented = read(Tensors(file, {name: (i,) for i, name in enumerate(names)}, None)).shapes
    names = {ours: list(names)[i] for ours, (i,) in presented.items()}
    return {names[name]: w for name, w in weights.items()}


def test_every_layout_is_the_same_network(release, tmp_path):
    denoiser, vae, text = loaded("--ckpt", release)
    file = release / "diffusion_pytorch_model.safetensors"
    weights = dict(open_tensors(file))
    equal(loaded("--ckpt", file)[0], denoiser)  # what is beside a file is found

    shards, index = tmp_path / "shards", {}
    shards.mkdir()
    for i in (0, 1):
        part = {name: w for j, (name, w) in enumerate(weights.items()) if j % 2 == i}
        save_file(part, shards / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
        index |= dict.fromkeys(part, f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({"model.diffusion_model." + name: w for name, w in weights.items()}, tmp_path / "comfyui.safetensors")
    parts = ["--vae-ckpt", release / "Wan2.1_VAE.pth", "--tokenizers", release / "google" / "umt5-xxl",
             "--text-ckpt", release / "models_t5_umt5-xxl-enc-bf16.pth"]
    for ckpt in (shards, tmp_path / "comfyui.safetensors"):
        equal(loaded("--ckpt", ckpt, *parts)[0], denoiser)

    hub = tmp_path / "hub"
    for part in ("transformer", "vae", "text_encoder", "scheduler"):
        (hub / part).mkdir(parents=True)
    shutil.copytree(release / "google" / "umt5-xxl", hub / "tokenizer")
    save_file(theirs_of(weights, wan_from_diffusers), hub / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(theirs_of(dict(open_tensors(release / "Wan2.1_VAE.pth")), wan_vae_from_diffusers),
              hub / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(text.umt5.state_dict(), hub / "text_encoder" / "model.safetensors")
    (hub / "scheduler" / "scheduler_config.json").write_text(json.dumps(  # as published
        dict(_class_name="UniPCMultistepScheduler", prediction_type="flow_prediction", flow_shift=3.0)))
    (hub / "transformer" / "config.json").write_text(json.dumps(dict(num_attention_heads=2, eps=1e-6)))
    (hub / "vae" / "config.json").write_text(json.dumps(
        dict(_class_name="AutoencoderKLWan", latents_mean=wan_vae.MEAN, latents_std=wan_vae.STD)))
    for ours, theirs in zip((denoiser, vae, text), loaded("--ckpt", hub)):
        equal(theirs, ours)
    (hub / "vae" / "config.json").write_text(json.dumps(
        dict(_class_name="AutoencoderKLWan", latents_mean=[0.0] * 16, latents_std=wan_vae.STD)))
    with pytest.raises(InputError, match=r"config.json: latents_mean \[0.0, 0.0.*; expected \[-0.7571, "):
        loaded("--ckpt", hub)


def test_other_wan_models_of_the_same_shapes_are_refused(release, tmp_path):
    """Wan2.2 14B is two denoisers of 2.1's shapes, each for a part of the times; no shape tells the heads."""
    def refused(words, *parts, file="diffusion_pytorch_model.safetensors", **config):
        folder = tmp_path.joinpath(str(len(list(tmp_path.iterdir()))), *parts)
        folder.mkdir(parents=True)
        shutil.copy(release / "diffusion_pytorch_model.safetensors", folder / file)
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        if parts == ("transformer",):
            folder.with_name("transformer_2").mkdir()
        with pytest.raises(InputError, match=f": is .*{words}.*; expected a network"):
            loaded("--ckpt", folder if parts else folder / file)
    refused("high_noise", "high_noise_model")
    refused("wan2.2", file="wan2.2_t2v_low_noise_14B_fp16.safetensors")
    refused("transformer_2/", "transformer")
    refused("num_heads 4", "shards", num_heads=4)
    refused("num_attention_heads 4", "hub", num_attention_heads=4)
    refused("eps 1e-05, model_type vace", "vace", model_type="vace", eps=1e-5)
    weights = dict(open_tensors(release / "diffusion_pytorch_model.safetensors"))
    for architecture in ("wan2.2-t2v-a14b", "wan2.1-i2v", "Wan2.1-VACE"):
        save_file(weights, tmp_path / "said.safetensors", {"modelspec.architecture": architecture})
        with pytest.raises(InputError, match="another model .modelspec.architecture wan2"):
            loaded("--ckpt", tmp_path / "said.safetensors")


def test_image_to_video_files_are_refused(release, tmp_path):
    weights = dict(open_tensors(release / "diffusion_pytorch_model.safetensors"))
    for name in ("img_emb.proj.0.weight", "blocks.0.cross_attn.k_img.weight", "blocks.0.attn2.add_k_proj.weight"):
        save_file(weights | {name: torch.zeros(2)}, tmp_path / "i2v.safetensors")
        with pytest.raises(InputError, match=f"an image-to-video checkpoint .it has {name}.; expected one of Wan2.1's"):
            loaded("--ckpt", tmp_path / "i2v.safetensors")


def test_the_shards_of_the_hub_come_with_their_index(monkeypatch, tmp_path):
    asked, row = [], PRESETS["wan2.1-14b"]
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda *args, **named: asked.append((args, named)) or tmp_path)
    assert find(row.file, None, row.repo) == tmp_path / row.file
    assert asked == [((row.repo,), dict(allow_patterns=["diffusion_pytorch_model*"]))]


def test_adm_trains_an_adapter_and_its_three_files_are_the_same_student(release, tmp_path):
    out, common = tmp_path / "run", ["--model", "wan2.1-1.3b", "--ckpt", release]
    run(adm, *common, "--prompts", release / "prompts.txt", "--lora-rank", 2, "--fake-lora", 2, "--max-iter", 1,
        "--out", out)
    record, = rows(out)
    assert record["skipped"] == 0 and (out / "compare.mp4").exists()
    args = adm.parse_args(list(map(str, common)))
    resolve_model(args)
    layouts = {"generator_lora": "transformer.blocks.0.attn1.to_q.lora_A.weight",
               "generator_lora_kohya": "lora_unet_blocks_0_self_attn_q.lora_down.weight",  # musubi-tuner's
               "generator_lora_comfyui": "diffusion_model.blocks.0.self_attn.q.lora_down.weight"}
    found = []
    for file, name in layouts.items():
        args.lora = out / f"{file}.safetensors"
        assert name in open_tensors(args.lora)
        found.append(networks.open_lora(args, PRESETS[args.model]))
    assert len(found[0]) == 3 * 8
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.equal(a.scale * a.up @ a.down, b.scale * b.up @ b.down)
                   for name in other for a, b in zip(found[0][name], other[name], strict=True))
    assert any((piece.up @ piece.down).any() for pieces in found[0].values() for piece in pieces)
    run(sample, "--ckpt", out, "--prompt", "a fox", "--out", tmp_path / "samples")
    with av.open(tmp_path / "samples" / "000.mp4") as video:
        assert (video.streams.video[0].frames, video.streams.video[0].average_rate) == (5, 16)


def test_differences_and_names_of_mixed_style_are_read(tmp_path):
    """As extracted LoRAs and several trainers write them, one of a kind."""
    net = Wan(**SIZES)
    before = {name: p.clone() for name, p in net.named_parameters()}
    diffs = {"diffusion_model.blocks.0.diff_m": "blocks.0.modulation", "diffusion_model.head.modulation.diff": "head.modulation",
             "lora_unet_blocks_0_norm3.diff": "blocks.0.norm3.weight", "pipe.dit.blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
             "blocks.2.self_attn.norm_q.diff": "blocks.2.self_attn.norm_q.weight",
             "lora_unet_blocks_2_self_attn_q.diff_b": "blocks.2.self_attn.q.bias"}
    tensors = {key: torch.full_like(before[name], 0.5) for key, name in diffs.items()}
    tensors["lora_unet_blocks_0_norm3.diff"] = tensors["lora_unet_blocks_0_norm3.diff"].to(torch.float8_e4m3fn)
    mixed = {"lora_unet_blocks_1.self_attn.k.lora_down.weight": torch.full((1, 256), 0.5),
             "lora_unet_blocks_1.self_attn.k.lora_up.weight": torch.ones(256, 1),
             "lora_unet_blocks_1.self_attn.k.alpha": torch.tensor(1.0)}

    def read(tensors):
        save_file(tensors, tmp_path / "lora.safetensors")
        return read_lora(open_tensors(tmp_path / "lora.safetensors"), net, WAN)

    lora = read(tensors | mixed)
    merge_lora(net, lora)
    changed = {*diffs.values(), "blocks.1.self_attn.k.weight"}
    assert lora.keys() == changed
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.5 * (name in changed), rtol=0, atol=0)
    for key, value in (("transformer.blocks.0.norm3.diff", torch.zeros(256)),  # diffusers' norm3 is another
                       ("diffusion_model.blocks.0.norm3.diff", torch.zeros(256, dtype=torch.int32)),
                       ("diffusion_model.blocks.0.norm3.diff", torch.full((256,), torch.nan)),
                       ("diffusion_model.blocks.0.norm9.diff", torch.zeros(256))):
        with pytest.raises(InputError, match=key):
            read({key: value} | mixed)


def test_an_export_of_all_weights_is_the_originals_layout(release, tmp_path):
    out = tmp_path / "run"
    run(dmd, "--model", "wan2.1-1.3b", "--ckpt", release, "--prompts", release / "prompts.txt", "--max-iter", 1,
        "--evaluate", 0, "--null-prompt", "empty", "--generator-cfg-offset", 2, "--shift", 3, "--out", out)
    exported = open_tensors(out / "generator.safetensors")
    original = open_tensors(release / "diffusion_pytorch_model.safetensors")
    assert exported.shapes == original.shapes and any(not torch.equal(exported[n], original[n]) for n in exported)
    assert exported.metadata["dmdx.schedule"] == "wan" and exported.metadata["dmdx.null_prompt"] == "empty"
    assert exported.metadata["dmdx.shift"] == "3.0"
    run(sample, "--ckpt", out, "--prompt", "a fox", "--out", tmp_path / "samples")
    assert read_text(tmp_path / "samples" / "000.mp4")["null_prompt"] == "empty"  # as it was trained
