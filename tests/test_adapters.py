"""Adapters of every family: on one base, in the files that diffusers, kohya and AnimateDiff read, in the scripts."""
import json
import warnings

import pytest
import torch
from conftest import golden, states_saved
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from test_lora import train
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import adm
import adp
import collect_odes
import sample
from models import diffusers_names
from models.animatediff import AnimateDiff
from models.checkpoint import InputError, open_tensors
from models.job.families import FAMILIES
from models.lora import add_lora, lora_layers, lora_state, merge_lora, read_lora, save_diffusers, save_kohya
from models.parallel import init_distributed, shard
from models.presets import PRESETS
from models.sdxl_unet import UNet

MODELS = ["tiny-sdxl", "tiny-sd15", "tiny-animatediff", "tiny-cogvideox"]
NAMES = {model: FAMILIES[PRESETS[model].family].names for model in MODELS}


@torch.no_grad()
def build(model):
    """(network of random weights, its inputs x_t, t and cond)"""
    row, family = PRESETS[model], FAMILIES[PRESETS[model].family]
    torch.manual_seed(0)
    net = family.network(**row.config).requires_grad_(False)
    for p in net.parameters():  # also of the motion modules' last layers, which start as zeros
        p.copy_(torch.randn(p.shape) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.2))
    frames = [(row.frames - 1) // family.frames_per_latent + 1] if row.frames else []
    x = torch.randn(2, *frames, row.latent_channels, *(side // row.vae_factor for side in row.size))
    return net, (x, torch.tensor([0.5, 0.9]), [torch.randn(2, *shape) for shape in family.condition_shapes(row)])


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


# ---- on one base -------------------------------------------------------------------------------------------

def test_an_adapter_acts_and_learns_where_it_is_named_and_nowhere_else(model):
    net, inputs = build(model)
    row = PRESETS[model]
    shape = inputs[0].shape[1:]
    taps = tuple(net.tap_shapes(*(shape if row.frames else shape[-2:])))
    with torch.no_grad():
        before, features = net(*inputs), net(*inputs, taps=taps)
        for name, rank in (("generator", 4), ("fake", 2)):
            add_lora(net, NAMES[model], name, rank)
        assert all(torch.equal(net(*inputs, lora=lora), before) for lora in ((), ("generator",), ("fake",)))
        train(net, "generator")
        assert (net(*inputs, lora=("generator",)) - before).abs().max() > 0.01
        assert torch.equal(net(*inputs), before) and torch.equal(net(*inputs, lora=("fake",)), before)
        assert all(map(torch.equal, net(*inputs, taps=taps), features))  # D's backbone is the base alone
    net(*inputs, lora=("generator",)).square().mean().backward()
    reached = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    # Of both sides of every layer. The last block of CogVideoX reads no text, but its layers are the video's too.
    assert reached == {f"{path}.lora_{side}.generator" for path in lora_layers(net, "generator") for side in "AB"}


def test_every_attention_gets_one(model):
    net, _ = build(model)
    add_lora(net, NAMES[model], "generator", 2)
    found = {path for path, _ in net.named_modules()
             if path.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
    assert lora_layers(net, "generator").keys() == found
    assert any("temporal_transformer" in path for path in found) == (model == "tiny-animatediff")


# ---- files -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("save", [save_diffusers, save_kohya])
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_a_written_file_is_the_adapter(model, save, alpha, tmp_path):
    net, inputs = build(model)
    add_lora(net, NAMES[model], "generator", 4, alpha, NAMES[model].adaptable if alpha is None
             and model != "tiny-animatediff" else None)  # MotionLoRA files hold attentions alone
    train(net, "generator")
    save(tmp_path / "lora.safetensors", net, NAMES[model], "generator", {"dmdx.steps": "4"})
    tensors = open_tensors(tmp_path / "lora.safetensors")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # it says its alpha
        merged, _ = build(model)
        merge_lora(merged, read_lora(tensors, merged, NAMES[model]))
        # Merged or not are float32 sums in another order: 2e-5 on outputs of up to 10.
        torch.testing.assert_close(merged(*inputs), net(*inputs, lora=("generator",)), atol=1e-4, rtol=1e-4)
    assert tensors.metadata["dmdx.steps"] == "4"
    if save is save_kohya:
        assert tensors.metadata["ss_network_dim"] == "4"
        assert tensors.metadata["ss_network_alpha"] == f"{alpha or 4:g}"
        assert tensors.metadata["modelspec.architecture"].endswith("/lora")


WRITTEN = {
    "tiny-sdxl": ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
                  "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.lora_down.weight"),
    "tiny-sd15": ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_B.weight",
                  "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_up.weight"),
    "tiny-animatediff": (
        "unet.up_blocks.2.motion_modules.1.transformer_blocks.0.attn2.to_out.0.lora_A.weight",
        "up_blocks.2.motion_modules.1.temporal_transformer.transformer_blocks.0.attention_blocks.1."
        "processor.to_out_lora.down.weight"),
    "tiny-cogvideox": ("transformer.transformer_blocks.5.attn1.to_out.0.lora_B.weight",
                       "lora_unet_transformer_blocks_5_attn1_to_out_0.lora_up.weight")}


def test_names_in_the_two_layouts(model, tmp_path):
    """diffusers' modules; kohya's: SDXL's original ones, SD1.5's as in diffusers, MotionLoRA's for motion modules."""
    net, _ = build(model)
    add_lora(net, NAMES[model], "generator", 2)
    for save, key in zip((save_diffusers, save_kohya), WRITTEN[model]):
        save(tmp_path / "lora.safetensors", net, NAMES[model], "generator")
        assert key in load_file(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("part, model", [("sdxl", "sdxl"), ("sd15", "sd1.5")])
def test_full_size_unets_have_diffusers_names(part, model):
    shapes = json.loads(golden("diffusers_layout.keys.json")[0].read_text())[part]
    with torch.device("meta"):
        net = UNet(**PRESETS[model].config)
    names = [name.rpartition(".") for name in net.state_dict()]
    assert {f"{diffusers_names.unet_name(module, net)}.{kind}" for module, _, kind in names} == shapes.keys()


def test_a_motion_module_has_diffusers_names():
    with torch.device("meta"):
        net = AnimateDiff(**PRESETS["animatediff"].config)
    start = "mid_block.motion_modules.0."
    found = {diffusers_names.unet_name(name.rpartition(".")[0], net) for name in net.state_dict()
             if name.startswith(start)}
    block = [f"attn{i}.{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    block += ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"]
    assert found == {start + name for name in ("norm", "proj_in", "proj_out")} | {
        f"{start}transformer_blocks.0.{name}" for name in block}


def written(net, names, tmp_path, respell=lambda key: key, **metadata):
    """The adapter's file in diffusers' layout, its keys spelled otherwise."""
    save_diffusers(tmp_path / "lora.safetensors", net, names, "generator")
    tensors = load_file(tmp_path / "lora.safetensors")
    save_file({respell(key): t for key, t in tensors.items()}, tmp_path / "new.safetensors", metadata or None)
    return open_tensors(tmp_path / "new.safetensors")


@pytest.fixture
def sdxl():
    net, _ = build("tiny-sdxl")
    add_lora(net, NAMES["tiny-sdxl"], "generator", 4)
    train(net, "generator")
    return net, NAMES["tiny-sdxl"]


OLD = {
    "processors": lambda key: key.replace(".to_out.0.", ".to_out.").replace(".lora_A.", "_lora.down.").replace(
        ".lora_B.", "_lora.up.").replace(".to_", ".processor.to_"),
    "dotted": lambda key: key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."),
    "lora_linear_layer": lambda key: key.replace(".lora_A.", ".lora_linear_layer.down.").replace(
        ".lora_B.", ".lora_linear_layer.up."),
    "kohya": lambda key: "lora_unet_" + key.removeprefix("unet.").removesuffix(".weight")[:-7].replace(".", "_")
    + {"A": ".lora_down.weight", "B": ".lora_up.weight"}[key.removesuffix(".weight")[-1]],
    "peft": lambda key: "base_model.model." + key.removeprefix("unet.")}


@pytest.mark.parametrize("spelling", OLD)
def test_older_spellings_are_read(sdxl, tmp_path, spelling):
    """Those of LCM-LoRA and SDXL-Lightning (kohya with diffusers' blocks), and of diffusers before peft."""
    expected = read_lora(written(*sdxl, tmp_path, lora_alpha="4"), *sdxl)
    tensors = written(*sdxl, tmp_path, OLD[spelling], lora_alpha="4")
    lora = read_lora(tensors, *sdxl)
    assert not set(tensors) & set(load_file(tmp_path / "lora.safetensors"))
    assert lora.keys() == expected.keys()
    for name, (piece,) in lora.items():
        assert torch.equal(piece.up, expected[name][0].up) and piece.scale == expected[name][0].scale == 1


@pytest.mark.parametrize("key", ["lora_alpha", "network_alpha", "ss_network_alpha"])
def test_an_alpha_in_plain_metadata_is_used(sdxl, tmp_path, key):
    lora = read_lora(written(*sdxl, tmp_path, **{key: "2.0"}), *sdxl)
    assert {piece.scale for pieces in lora.values() for piece in pieces} == {0.5}  # 2 / rank 4


def test_an_alpha_that_a_converter_multiplied_in_is_not_used_again(sdxl, tmp_path):
    """musubi-tuner's dotted files keep kohya's note."""
    dotted = written(*sdxl, tmp_path, lambda key: key.replace("unet.", "diffusion_model."), ss_network_alpha="1")
    with pytest.warns(UserWarning, match="strength 1 is assumed"):
        lora = read_lora(dotted, *sdxl)
    assert {piece.scale for pieces in lora.values() for piece in pieces} == {1}


@pytest.mark.parametrize("metadata", [{}, {"ss_network_alpha": "None"}, {"lora_alpha": "nan"}])
def test_a_file_without_alpha_is_announced(sdxl, tmp_path, metadata):
    with pytest.warns(UserWarning, match="new.safetensors: says no alpha; strength 1 is assumed, alpha = rank"):
        lora = read_lora(written(*sdxl, tmp_path, **metadata), *sdxl)
    assert {piece.scale for pieces in lora.values() for piece in pieces} == {1}


@pytest.mark.parametrize("config", ['{"lora_alpha": null}', '{"lora_alpha": 4', "[1]", "", '{"lora_alpha": true}',
                                    '{"lora_alpha": 4, "alpha_pattern": [2]}', '{"alpha_pattern": {"to_q": "x"}}',
                                    '{"alpha_pattern": {"(": 1}}', '{"lora_alpha": NaN}',
                                    '{"alpha_pattern": {"(to_q|to_k)+x": 1}}', '{"alpha_pattern": {".*.*.*x": 1}}'])
def test_damaged_settings_of_peft_are_one_sentence(sdxl, tmp_path, config):
    written(*sdxl, tmp_path)
    (tmp_path / "new.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    inside = written(*sdxl, tmp_path, lora_adapter_metadata=config)
    for tensors, place in ((open_tensors(tmp_path / "adapter_model.safetensors"), "adapter_config.json: "),
                           (inside, "new.safetensors: its lora_adapter_metadata: ")):
        with pytest.raises(InputError) as caught:
            read_lora(tensors, *sdxl)
        assert f"{place}expected peft's settings of an adapter, found" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_bundled_embeddings_are_announced(sdxl, tmp_path):
    tensors = written(*sdxl, tmp_path, lora_alpha="4")
    more = {key: tensors[key] for key in tensors} | {"bundle_emb.cat.clip_l": torch.zeros(2, 8)}
    save_file(more, tmp_path / "more.safetensors", {"lora_alpha": "4"})
    with pytest.warns(UserWarning, match="its 1 embeddings are not applied"):
        assert read_lora(open_tensors(tmp_path / "more.safetensors"), *sdxl).keys()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(sdxl, tmp_path, value):
    next(iter(lora_state(sdxl[0], "generator").values()))[1].fill_(value)
    with pytest.raises(InputError, match="expected finite values"):
        read_lora(written(*sdxl, tmp_path, lora_alpha="4"), *sdxl)


# ---- the scripts -------------------------------------------------------------------------------------------

def run(script, out, *flags):
    with states_saved():
        script.main(script.parse_args(list(map(str, [*flags, "--out", out]))))
    return out


def same_picture(a, b, levels=1):
    """Merged or not are float32 sums in another order: at most the next grey level."""
    with Image.open(a) as a, Image.open(b) as b:
        extremes = ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema()
    return max(high for _, high in extremes) <= levels


SHORT = ["--max-iter", 1, "--batch-size", 2, "--evaluate", 0, "--sample-every", 1, "--lora-rank", 3]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of adp.py whose generator is an adapter on the epsilon teacher, and predicts velocity."""
    folder = tmp_path_factory.mktemp("adp")
    run(collect_odes, folder / "pairs", "--model", "tiny-sdxl", "--count", 4, "--steps", 2)
    return run(adp, folder / "run", "--pairs", folder / "pairs", *SHORT, "--lr-theta", 0.1, "--lambdas", 1, 0)


def test_an_adapter_of_adp_is_sampled_as_velocity(pretrained, tmp_path):
    files = [pretrained / f"generator_lora{kind}.safetensors" for kind in ("", "_kohya")]
    for tensors in map(open_tensors, files):
        assert tensors.metadata["dmdx.predicts"] == "velocity" and tensors.metadata["dmdx.schedule"] == "flow"
    for i, flags in enumerate((["--ckpt", pretrained], ["--lora", files[0]], ["--lora", files[1]])):
        run(sample, tmp_path / str(i), *flags)
        assert same_picture(tmp_path / str(i) / "grid.png", pretrained / "samples" / "00000001.png")
    run(sample, tmp_path / "off", "--lora", files[0], "--lora-scale", 0)
    assert not same_picture(tmp_path / "off" / "grid.png", tmp_path / "1" / "grid.png")


def test_adm_goes_on_from_an_adapter(pretrained, tmp_path):
    """At a rate of 0 what it exports is what it began with, and predicts the same."""
    for i, init in enumerate((pretrained, pretrained / "generator_lora_kohya.safetensors")):
        out = run(adm, tmp_path / str(i), "--model", "tiny-sdxl", *SHORT, "--init", init, "--lr-theta", 0)
        before, after = (open_tensors(folder / "generator_lora.safetensors") for folder in (pretrained, out))
        assert before.metadata["dmdx.predicts"] == after.metadata["dmdx.predicts"] == "velocity"
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("flags, words", [
    (["--model", "tiny-sdxl", "--lora-rank", 4], "an adapter of rank 3, and --lora-rank is 4; expected the same"),
    (["--model", "tiny-sdxl", "--lora-rank", 0], "an adapter on the teacher's weights; expected --lora-rank"),
    (["--model", "tiny-sd3", "--lora-rank", 3], "a generator of tiny-sdxl; expected one of tiny-sd3")])
def test_adapters_that_cannot_be_gone_on_from(pretrained, tmp_path, flags, words):
    with pytest.raises(InputError) as caught:
        run(adm, tmp_path / "run", "--init", pretrained, *flags)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["tiny-animatediff", "tiny-cogvideox"])
def test_a_video_students_adapter_gives_the_runs_videos(model, tmp_path, monkeypatch):
    """With --fake-lora all roles are one module."""
    nets, load = [], adm.networks.load_network
    with monkeypatch.context() as patch:
        patch.setattr(adm.networks, "load_network", lambda *args, **named: nets.append(args) or load(*args, **named))
        out = run(adm, tmp_path / "run", "--model", model, *SHORT, "--fake-lora", 2, "--lr-theta", 0.01,
                  "--steps", 1, "--sample-every", 9)
    assert len(nets) == 1
    for i, flags in enumerate((["--ckpt", out], *(["--lora", out / f"generator_lora{kind}.safetensors"]
                                                  for kind in ("", "_kohya")))):
        run(sample, tmp_path / str(i), *flags, "--count", 1)
        assert same_picture(tmp_path / str(i) / "grid.png", tmp_path / "0" / "grid.png", levels=0)
    run(sample, tmp_path / "off", "--ckpt", out, "--lora-scale", 0, "--count", 1)
    assert not same_picture(tmp_path / "off" / "grid.png", tmp_path / "0" / "grid.png")


def test_an_adapter_of_another_family_is_refused_before_the_network_is_loaded(sdxl, tmp_path, monkeypatch):
    written(*sdxl, tmp_path)
    monkeypatch.setattr(sample.networks, "load_network", None)
    for model in ("tiny-sd3", "tiny-cogvideox", "tiny-sd15"):
        with pytest.raises(InputError) as caught:
            run(sample, tmp_path / "out", "--model", model, "--lora", tmp_path / "new.safetensors")
        assert "new.safetensors: expected LoRA keys of this model's modules, found: unet." in str(caught.value)
        assert "\n" not in str(caught.value)


def test_one_process_in_bf16_needs_no_fsdp(model):
    """Frozen weights are in the computation's type already and adapters cast themselves: the same output, and
    gradients, as with the hooks of FSDP."""
    _, mesh = init_distributed()
    outputs, grads = [], []
    for forced in (False, True):
        net, inputs = build(model)
        add_lora(net.bfloat16(), NAMES[model], "generator", rank=4)
        train(net, "generator")
        if forced:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            for block in [*net.blocks(), net]:
                fully_shard(block, mesh=mesh["shard"], mp_policy=policy)
        else:
            assert not isinstance(shard(net, mesh, torch.bfloat16), FSDPModule)
        outputs.append(net(*inputs, lora=("generator",)).float())
        outputs[-1].square().sum().backward()
        grads.append(torch.cat([(p.grad.full_tensor() if forced else p.grad).flatten()
                                for name, p in net.named_parameters() if ".lora_" in name]))
    assert torch.equal(*outputs)
    assert grads[0].dtype == torch.float32
    assert (grads[0] - grads[1]).norm() < 1e-2 * grads[1].norm()  # FSDP's are of bf16, whose step is 4e-3
