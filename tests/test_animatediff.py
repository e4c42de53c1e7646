"""AnimateDiff against the original's outputs, taps and gradients, the published files' names, and its two
files: what is read, what is refused."""
import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, from_recipe, golden, near, read_golden
from test_checkpoint import refusal
from test_sdxl_unet import Recorder
from torch import nn
from torch.utils.checkpoint import checkpoint

import models.animatediff
from models.animatediff import (
    MAX_FRAMES,
    AnimateDiff,
    MotionModule,
    attend_in_parts,
    config_from_shapes,
    positions,
)
from models.checkpoint import Tensors, open_tensors, save_safetensors
from models.job.motion import base_tensors, merged, motion_tensors
from models.sdxl_unet import UNet, attend

PREFIX, PE = "model.diffusion_model.", ".pos_encoder.pe"
FILES = [p for p in golden("animatediff_*.safetensors") if "out.motion" in read_golden(p)[0]]
TAPS = golden("animatediff_taps_*.safetensors")
SMALL = min(FILES, key=lambda p: read_golden(p)[1]["golden"]["n_weights"])
every_golden = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


@cache
def read(path: Path) -> tuple[dict, dict, dict]:
    """(tensors, weights by their names in the files, metadata) of a golden file with weights."""
    g, meta = read_golden(path)
    about = meta["golden"]
    weights = {name: w for name, w in g.items() if not name.startswith(("in.", "out.", "aux.", "tap."))}
    if not about["weights_stored"]:  # positions, which are no part of the recipe, may be
        keys = {name: shape for name, shape in about["recipe_keys"].items() if not name.endswith(PE)}
        weights |= from_recipe(about | {"recipe_keys": keys})
    return g, weights, about


def build(motion: Path, mid: bool = True) -> AnimateDiff:
    """The network with the motion weights of a golden file and the UNet weights that this file names."""
    _, weights, about = read(motion)
    state = {name: w for name, w in weights.items() if not name.endswith(PE)}
    state = {name: w for name, w in state.items() if mid or not name.startswith("mid_block.")}
    unet = read(GOLDEN / about["unet_weights_from"])[1]
    state |= {name.removeprefix(PREFIX): w for name, w in unet.items()}
    c, mm = about["config"], about["mm"]
    assert mm["norm_groups"] == c["norm_groups"] and mm["pe_max_len"] == MAX_FRAMES
    net = AnimateDiff(**config_from_shapes({name: tuple(w.shape) for name, w in state.items()}),
                      heads=c["num_heads"], groups=c["norm_groups"], motion_heads=mm["num_attention_heads"])
    net.load_state_dict(state)
    return net.requires_grad_(False)


def clip(golden_clip: torch.Tensor) -> torch.Tensor:
    """B C T H W, the original's order <-> B T C H W, ours."""
    return golden_clip.transpose(1, 2)


def inputs(g: dict) -> tuple:
    """(x_t, t, cond); the vector is of no size, as SD1.5's text encoder gives it."""
    context = g["in.context"]
    return clip(g["in.sample"]), (g["in.timesteps"] + 1) / 1000, (context, context.new_zeros(len(context), 0))


# ---- the original's outputs --------------------------------------------------------------------------------

@every_golden
@pytest.mark.parametrize("version, mid", [("motion", True), ("motion_v3_no_mid", False)], ids=["v2", "v3"])
def test_noise_equals_the_original(path, version, mid):
    g, net = read(path)[0], build(path, mid)
    near(net(*inputs(g)), clip(g[f"out.{version}"]))


@every_golden
def test_single_frame_and_single_modules_equal_the_original(path):
    g, net = read(path)[0], build(path)
    x, t, cond = inputs(g)
    near(net(x[:, :1], t, cond), clip(g["out.motion_frame0_only"]))
    for name, module in (("mm0", net.down_blocks[0].motion_modules[0]),
                         ("mm_mid", net.mid_block.motion_modules[0])):
        before, after = (clip(g[f"aux.{name}.{side}"]) for side in ("in", "out"))  # B T D h w
        near(module(before.flatten(0, 1), before.shape[1]), after.flatten(0, 1))


@every_golden
def test_pictures_go_through_the_plain_unet(path):
    g, net = read(path)[0], build(path)
    _, weights, about = read(GOLDEN / read(path)[2]["unet_weights_from"])
    config = config_from_shapes({name: tuple(p.shape) for name, p in net.state_dict().items()})
    config.pop("motion_mid")
    plain = UNet(**config, heads=about["config"]["num_heads"], groups=about["config"]["norm_groups"])
    plain.load_state_dict({name.removeprefix(PREFIX): w for name, w in weights.items()})
    x, t, cond = inputs(g)
    pictures = x[:, 0], t, cond
    assert torch.equal(net(*pictures), plain(*pictures))
    near(net(*pictures), g["out.no_motion"][:, :, 0])
    behind, before = (n(*pictures, taps=("down.1",))[0] for n in (net, plain))
    assert behind.shape == before.shape and not torch.equal(behind, before)  # behind the transformer, too


@pytest.mark.parametrize("path", TAPS, ids=lambda p: p.stem)
def test_taps_and_their_gradients_equal_the_original(path):
    g, meta = read_golden(path)
    about = meta["golden"]
    net = build(GOLDEN / about["motion_weights_from"], about["middle_motion_module"])
    seen = {}
    if about["middle_motion_module"]:
        net.mid_block.motion_modules[0].register_forward_hook(lambda _, __, out: seen.update(mid_motion=out))
    x, t, cond = inputs(g)
    near(net(x, t, cond), clip(g["out.eps"]))
    x = x.detach().clone().requires_grad_()
    keys = [key for key in net.tapped if f"tap.{key}" in g]
    assert len(keys) == len(net.widths) + 1  # every level and mid
    maps = dict(zip(keys, net(x, t, cond, taps=tuple(keys))))
    maps |= {key: m.unflatten(0, x.shape[:2]).transpose(1, 2) for key, m in seen.items()}
    assert {f"tap.{key}" for key in maps} == {name for name in g if name.startswith("tap.")}
    for key, m in maps.items():
        near(m, g[f"tap.{key}"], 1e-5)  # the reference's float32 error is 6e-7, the pooled norm's effect 4e-2
        grad, = torch.autograd.grad((m * g[f"in.probe.{key}"]).sum(), x, retain_graph=True)
        expected = clip(g[f"grad.{key}"])
        near(grad, expected, 1e-4 * expected.abs().max().item())  # an eps of 1e-5 changes it by over 5e-3


@pytest.mark.parametrize("path", TAPS, ids=lambda p: p.stem)
def test_the_discriminators_taps_are_three(path):
    g, meta = read_golden(path)
    about = meta["golden"]
    net = build(GOLDEN / about["motion_weights_from"], about["middle_motion_module"])
    x, t, cond = inputs(g)
    shapes = net.tap_shapes(*x.shape[1:])
    assert [f"tap.{key}" for key in shapes] == about["discriminator_taps"]["avdm2"]
    ran = []
    net.middle_block[-1].register_forward_hook(lambda *_: ran.append("mid"))
    net.output_blocks[0][0].register_forward_hook(lambda *_: ran.append("up"))
    maps = net(x, t, cond, taps=tuple(shapes))
    assert [m.shape[1:] for m in maps] == list(shapes.values()) and ran == ["mid"]
    for key, m in zip(shapes, maps):
        alone, = net(x, t, cond, taps=(key,))
        assert torch.equal(alone, m)  # the same operations in the same order


# ---- what motion modules do --------------------------------------------------------------------------------

def test_zero_proj_out_is_the_identity():
    net = build(SMALL)
    x, t, cond = inputs(read(SMALL)[0])
    moving = net(x, t, cond)
    for module in net.modules():
        if isinstance(module, MotionModule):
            for p in module.temporal_transformer.proj_out.parameters():
                p.zero_()
    still = net(x, t, cond)
    repeated = [y.repeat_interleave(x.shape[1], dim=0) for y in (t, *cond)]
    pictures = net(x.flatten(0, 1), repeated[0], tuple(repeated[1:])).unflatten(0, x.shape[:2])
    assert torch.equal(still, pictures) and (moving - still).abs().max() > 1e-2
    fresh = MotionModule(32, 4, 8)
    m = torch.randn(6, 32, 4, 4)
    assert torch.equal(fresh(m, 3), m)  # training starts from the pictures' network


def test_order_of_the_frames_matters_and_clips_do_not_see_each_other():
    net = build(SMALL)
    x, t, (context, vector) = inputs(read(SMALL)[0])
    x, t, context = x[:1].repeat(2, 1, 1, 1, 1), t[:1].repeat(2), context[:1].repeat(2, 1, 1)
    x[1] = torch.randn_like(x[1])
    out = net(x, t, (context, vector))
    backwards = net(x.flip(1), t, (context, vector)).flip(1)
    assert (out - backwards).abs().max() > 1e-2  # without positions: equal
    x[1] = torch.randn_like(x[1])
    near(net(x, t, (context, vector))[0], out[0], 1e-5)  # kernels for another batch may round otherwise


def test_positions_are_the_files():
    tables = [table for name, table in read(SMALL)[1].items() if name.endswith(PE)]
    assert tables
    for table in tables:
        near(positions(*table.shape[1:]), table[0], 1e-5)  # angles up to 31, known to 2e-6
    with pytest.raises(ValueError, match="33 frames.* of 32 at most"):
        build(SMALL)(torch.zeros(1, 33, 4, 8, 8), torch.ones(1), (torch.zeros(1, 1, 1), None))


def test_attention_in_parts(monkeypatch):
    q, k, v = torch.randn(3, 10, 2, 5, 4)
    whole = attend_in_parts(q, k, v)
    assert torch.equal(whole, attend(q, k, v))
    monkeypatch.setattr(models.animatediff, "MAX_BATCH", 4)
    sizes = []
    monkeypatch.setattr(models.animatediff, "attend", lambda q, k, v: sizes.append(len(q)) or attend(q, k, v))
    near(attend_in_parts(q, k, v), whole, 1e-5)
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize("taps", [(), ("down.1", "mid")])
def test_checkpointed_units_give_the_same_gradients(taps):
    grads = []
    for checkpointing in (False, True):
        net = build(SMALL).requires_grad_(True)
        x, t, cond = inputs(read(SMALL)[0])
        x = x[:, :3].requires_grad_()
        if checkpointing:
            for block in net.blocks():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        out = net(x, t, cond, taps=taps)
        sum(m.square().sum() for m in (out if taps else [out])).backward()
        grads.append({"x": x.grad} | {name: p.grad for name, p in net.named_parameters()})
    used = {name for name, grad in grads[0].items() if grad is not None}
    assert any(name.startswith("mid_block.") for name in used) and "x" in used
    assert any(name.startswith("up_blocks.") for name in used) == (not taps)
    for name in used:
        assert torch.equal(grads[0][name], grads[1][name])  # the same operations in the same order


def test_units_hold_all_of_the_motion_modules():
    net = build(SMALL)
    units = [block for block in net.blocks() if isinstance(block, MotionModule)]
    inside = {p for block in units for p in block.parameters()}
    assert inside == {p for name, p in net.named_parameters() if "motion_modules." in name}
    assert len(net.blocks()) == len(units) + len(UNet.blocks(net))


def test_adapters_reach_every_linear_of_the_motion_modules():
    net, (x, t, cond) = build(SMALL), inputs(read(SMALL)[0])
    x = x[:, :2]
    expected = net(x, t, cond)
    for m in net.modules():
        if type(m) is nn.Linear:
            m.__class__ = Recorder
    assert torch.equal(net(x, t, cond), expected)
    assert not any(hasattr(m, "called") for m in net.modules())
    net(x, t, cond, lora=("student",))
    called = {name for name, m in net.named_modules() if getattr(m, "called", None) == "student"}
    assert called == {name for name, m in net.named_modules()
                      if isinstance(m, Recorder) and "emb" not in name}


# ---- the two files -----------------------------------------------------------------------------------------

def published(path: Path) -> Tensors:
    """A manifest of a published file as if it were opened; only the positions have values."""
    entries = json.loads(path.read_text())["tensors"]
    shapes = {name: tuple(shape) for name, (shape, _) in entries.items()}
    return Tensors(Path(path.stem), shapes, lambda name, _: positions(*shapes[name][-2:])[None])


def base_manifest() -> Tensors:
    path, = golden("sd15*.keys.json")
    return published(path)


# Of SD1.5's UNet 686 tensors, of the motion files those that are no positions.
@pytest.mark.parametrize("file, tensors, parameters", [("animatediff_mm_sd_v15_v2", 546, 1_312_730_244),
                                                       ("animatediff_v3_sd15_mm", 520, 1_276_658_564)])
def test_full_size_state_dict_is_both_manifests(file, tensors, parameters):
    base, motion = base_tensors(base_manifest()), motion_tensors(published(GOLDEN / f"{file}.keys.json"))
    assert (len(base), len(motion)) == (686, tensors)
    shapes = merged(base, motion).shapes
    with torch.device("meta"):
        net = AnimateDiff(**config_from_shapes(shapes))
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == shapes
    assert sum(p.numel() for p in net.parameters()) == parameters
    # 512 x 512: the sizes of AVDM2's discriminator.
    assert net.tap_shapes(16, 4, 64, 64) == {
        "down.1": (640, 16, 32, 32), "down.2": (1280, 16, 16, 16), "mid": (1280, 16, 8, 8)}


def motion_file(folder: Path, prefix: str = "", **changed) -> Path:
    """SMALL's motion weights as a file of AnimateDiff's trainer or authors, with tensors changed or added."""
    weights = {prefix + name: w for name, w in read(SMALL)[1].items()} | changed
    torch.save({"epoch": 3, "state_dict": weights}, folder / "motion.ckpt")
    return folder / "motion.ckpt"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_motion_file_is_read_as_its_trainer_wrote_it(tmp_path, prefix):
    others = {f"{prefix}down_blocks.0.resnets.0.norm1.weight": torch.ones(3)}
    tensors = motion_tensors(open_tensors(motion_file(tmp_path, prefix, **others)))
    expected = {name: w for name, w in read(SMALL)[1].items() if not name.endswith(PE)}
    assert set(tensors) == set(expected)
    for name, w in expected.items():
        assert torch.equal(tensors[name], w) and torch.equal(tensors.rows(name, 1, 3), w[1:3])


def test_half_precision_positions_are_accepted(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        path = tmp_path / f"{dtype}.safetensors"
        save_safetensors(path, {name: w.to(dtype) for name, w in read(SMALL)[1].items()})
        assert motion_tensors(open_tensors(path))


V3 = "animatediff_v3_sd15_mm.keys.json"


def test_other_motion_files_are_refused():
    def of(change, read=lambda name, shape: positions(*shape[-2:])[None]):
        """The refusal of v3's file after `change`, of a name and shape to another pair or None."""
        whole = published(GOLDEN / V3)
        shapes = dict(filter(None, (change(name, shape) for name, shape in whole.shapes.items())))
        return refusal(motion_tensors, Tensors(whole.path, shapes, lambda name, _: read(name, shapes[name])))

    v1 = refusal(motion_tensors, published(GOLDEN / "animatediff_mm_sd_v15.keys.json"))
    assert "animatediff_mm_sd_v15.keys: v1's motion modules (24 positions, no mid_block)" in v1
    lcm = of(lambda name, shape: None if name.endswith(PE) else (name, shape))
    assert "without pos_encoder.pe, as AnimateLCM's" in lcm
    longer = of(lambda name, shape: (name, (1, 64, shape[-1]) if name.endswith(PE) else shape))
    assert "motion modules of 64 positions and not of 32" in longer
    learned = of(lambda name, shape: (name, shape), read=lambda name, shape: torch.zeros(shape))
    assert "a pos_encoder.pe that is not the sinusoids" in learned
    lora = of(lambda name, shape: (name.replace("to_q.", "processor.to_q_lora.down."), shape))
    adapter = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight"
    assert "LoRA weights" in lora
    assert "LoRA weights" in refusal(motion_tensors, Tensors(Path("x.ckpt"), {adapter: (320, 64)}, None))
    renamed = of(lambda name, shape: (name.replace(".temporal_transformer", ""), shape))
    assert "as diffusers saves them" in renamed
    sdxl = of(lambda name, shape: None if "_blocks.3." in name else (name, shape))
    assert "motion modules of SDXL" in sdxl
    assert "a base model" in refusal(motion_tensors, base_manifest())
    nothing = refusal(motion_tensors, Tensors(Path("x.ckpt"), {"x": (3,)}, None))
    assert nothing == ("x.ckpt: no motion modules (x); expected a motion file of AnimateDiff v2 or v3, "
                       "such as mm_sd_v15_v2.ckpt or v3_sd15_mm.ckpt")


def test_other_base_models_are_refused():
    def of(name, shape):
        base = base_manifest()
        return refusal(base_tensors, Tensors(base.path, base.shapes | {PREFIX + name: shape}, None))
    inpainting = of("input_blocks.0.0.weight", (320, 9, 3, 3))
    assert "sd15.keys: 9 input channels for 4 output channels, as in inpainting models" in inpainting
    for path in golden("sdxl*.keys.json"):
        assert "an SDXL model; expected SD1.5" in refusal(base_tensors, published(path))
    assert "motion modules; expected SD1.5" in refusal(base_tensors, published(GOLDEN / V3))
    nothing = refusal(base_tensors, Tensors(Path("x.ckpt"), {"x": (3,)}, None))
    assert "expected tensors named model.diffusion_model.*, found x" in nothing
