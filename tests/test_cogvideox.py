"""CogVideoX's DiT against the public implementations' outputs and the full checkpoints' names and shapes."""
import json

import pytest
import torch
from conftest import check_every_third_block_is_tapped, golden, near, read_golden

from models.cogvideox import CogVideoX, config_from_shapes, fitted_grid, rotary_table, sincos_table, timestep_embedding

SMALL = [p for p in golden("cogvideox_dit_*.safetensors") if "sat_weights" not in p.name]
MANIFESTS = [p for p in golden("cogvideox_*.keys.json") if "diffusers" in json.loads(p.read_text())]
every = pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)


def read_case(path):
    """(tensors, config, weights by published name) of a golden."""
    tensors, meta = read_golden(path)
    weights = {name.removeprefix("w/"): t for name, t in tensors.items() if name.startswith("w/")}
    return tensors, meta["meta"]["config"], weights


def build(config, shapes):
    """A network of a golden's config; the other sizes come from the weights."""
    grid = (config["lat_h"] // 2, config["lat_w"] // 2)  # that of the inputs: positions are plain indices
    return CogVideoX(**config_from_shapes(shapes), rotary=config["kind"] == "rope", grid=grid,
                     interpolation=config["interp"])


def load_case(path):
    """(network, tensors, inputs)"""
    tensors, config, weights = read_case(path)
    net = build(config, {name: tuple(t.shape) for name, t in weights.items()})
    net.load_state_dict(weights, strict=True)
    t = (tensors["in/timesteps"] + 1) / 1000  # index i of the DDPM is t = (i + 1)/1000
    context = tensors["in/context"]
    return net.eval(), tensors, (tensors["in/latents"], t, (context, context.new_zeros(len(context), 0)))


# ---- network -----------------------------------------------------------------------------------------------

@every
def test_v_taps_and_inner_values_equal_the_original(path):
    net, tensors, inputs = load_case(path)
    seen = {}

    def keep(name, index=None):
        return lambda _, __, out: seen.update({name: out if index is None else out[index]})

    def attend(q, k, v, total, original=net.transformer_blocks[0].attend):
        o = original(q, k, v, total)
        seen.update({f"mid/block0.attn.{name}": x for name, x in zip("qkvo", (q, k, v, o))})
        return o
    net.transformer_blocks[0].attend = attend
    net.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args: seen.update({"mid/embeds": torch.cat([args[1], args[0]], dim=1)}))
    net.time_embedding.register_forward_hook(keep("mid/temb"))
    net.norm_final.register_forward_hook(keep("mid/norm_final.video"))
    net.norm_out.register_forward_hook(keep("mid/norm_out.video"))
    for i, block in enumerate(net.blocks()):
        block.register_forward_hook(keep(f"mid/block{i}.video", 0))
        block.register_forward_hook(keep(f"mid/block{i}.text", 1))
    with torch.no_grad():
        seen["out/v"] = net(*inputs)
        maps = net(*inputs, taps=tuple(range(net.depth)))
    for i, m in enumerate(maps):
        seen[f"tap {i}"] = m
        assert torch.equal(m.flatten(2).mT, seen[f"mid/block{i}.video"])
    compared = [name for name in seen if name in tensors]  # some files leave some of them out
    for name in compared:
        near(seen[name], tensors[name])
    taps = net.tap_shapes(*inputs[0].shape[1:])
    assert "out/v" in compared and any(f"mid/block{i}.video" in compared for i in taps)


@pytest.mark.parametrize("path", [p for p in SMALL if "grad/probe" in read_golden(p)[0]], ids=lambda p: p.stem)
def test_gradients_equal_the_original(path):
    net, tensors, (x, t, (context, pooled)) = load_case(path)
    x, context = x.requires_grad_(), context.requires_grad_()
    (net(x, t, (context, pooled)) * tensors["grad/probe"]).sum().backward()
    near(x.grad, tensors["grad/in.latents"], atol=1e-3)  # COGVIDEOX.md; a sum over all outputs
    near(context.grad, tensors["grad/in.context"], atol=1e-3)
    names = [name for name in tensors if name.startswith("grad/w/")]
    for name in names:
        near(net.get_parameter(name.removeprefix("grad/w/")).grad, tensors[name], atol=1e-3)
    assert names


@every
def test_taps_stop_after_the_last_one(path):
    net, _, batch = load_case(path)
    check_every_third_block_is_tapped(net, *batch)


# Not the probe, whose inputs are as small as the eps.
@pytest.mark.parametrize("path", [p for p in SMALL if "eps" not in p.stem], ids=lambda p: p.stem)
def test_bf16_is_the_same_network(path):
    net, tensors, inputs = load_case(path)
    with torch.no_grad():
        v = net.bfloat16()(*inputs)
    # bf16 has 3 digits; another function than the original's would be off by about the deviation itself.
    error = (v.float() - tensors["out/v"]).std() / tensors["out/v"].std()
    assert v.dtype == torch.bfloat16 and error < 0.05


def test_time_is_rounded_to_the_ddpm_index():
    net, _, (x, _, cond) = load_case(SMALL[0])
    at = lambda t: net(x[:1], torch.tensor([t]), (cond[0][:1], cond[1][:1]))  # noqa: E731
    with torch.no_grad():
        assert torch.equal(at(0.0), at(0.001))  # 0, which no DDPM trains on, is the smallest index
        assert torch.equal(at(0.5), at(0.5003)) and not torch.equal(at(0.5), at(0.501))


def test_what_it_cannot_take_is_named():
    net, _, (x, t, cond) = load_case(SMALL[0])
    with pytest.raises(ValueError, match="no multiple of the patch size 2"):
        net(x[..., :-1], t, cond)


# ---- positions ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", golden("cogvideox_pos.safetensors"), ids=lambda p: p.stem)
def test_position_tables_of_the_real_sizes(path):
    tensors, meta = read_golden(path)
    alt = meta["meta"]["alt"]
    sizes = {"base": (13, 30, 45), "alt": (alt["lat_T"], alt["lat_h"] // 2, alt["lat_w"] // 2)}
    width = next(t.shape[-1] for name, t in tensors.items() if name.endswith((".rows", "/base.sum64")))
    head_dim = next(t.shape[-1] for name, t in tensors.items() if name.endswith(".cos"))
    seen = {}
    for name, size in sizes.items():
        table = sincos_table(*size, width, 1.875, torch.float32)
        assert table.shape == (size[0] * size[1] * size[2], width)
        seen[f"sincos/{name}.sum64"] = table.sum(0, dtype=torch.float64)
        if f"sincos/{name}.idx" in tensors:
            rows = table[tensors[f"sincos/{name}.idx"]].double()
            seen |= {f"sincos/{name}.rows": rows, f"sincos/{name}.abssum64": rows.abs().sum(1)}
        rotary = rotary_table(5, *size, head_dim, (30, 45))
        assert (rotary[:5] == 1).all()  # text
        if f"rope/{name}.idx" in tensors:
            rotary = rotary[5:][tensors[f"rope/{name}.idx"]].repeat_interleave(2, dim=-1)
            seen |= {f"rope/{name}.cos": rotary.real, f"rope/{name}.sin": rotary.imag}
    compared = [name for name in seen if name in tensors]  # some files leave some of them out
    for name in compared:
        # Sums of up to 17,550 terms; 1e-5: float32 knows an angle of 45 to 4e-6.
        near(seen[name], tensors[name], atol=2e-3 if "sum64" in name else 1e-5)
    assert {name.split("/")[0] for name in compared} == {"sincos", "rope"}
    for name, expected in tensors.items():
        if name.startswith("time/emb"):
            # 3e-4: float32 knows an angle near 999 to 6e-5, and exp differs in the last bit between CPUs.
            near(timestep_embedding(tensors["time/timesteps"], expected.shape[1]), expected, atol=3e-4)


@every
def test_another_size_gets_positions_of_its_own(path):
    net, _, (x, t, cond) = load_case(path)
    H, W = x.shape[-2:]
    with torch.no_grad():
        v, wide = net(x, t, cond), net(x.repeat(1, 2, 1, 1, 1)[..., :H - 2, :], t, cond)
    assert wide.shape == (len(x), 2 * x.shape[1], x.shape[2], H - 2, W) and wide.std() > 0.5 * v.std()


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_full_size_state_dict_is_the_manifest(path):
    data = json.loads(path.read_text())
    expected = {name: tuple(shape) for name, shape in data["diffusers"]["transformer"]["keys"].items()}
    config = config_from_shapes(expected)
    with torch.device("meta"):
        net = CogVideoX(**config)
    assert {name: tuple(t.shape) for name, t in net.state_dict().items()} == expected
    published = data["diffusers"]["transformer"]["config"]
    assert (net.depth, net.heads, net.head_dim) == tuple(
        published[key] for key in ("num_layers", "num_attention_heads", "attention_head_dim"))
    assert net.rotary == published["use_rotary_positional_embeddings"]
    assert net.grid == (published["sample_height"] // 2, published["sample_width"] // 2)
    assert net.interpolation == published["spatial_interpolation_scale"]
    assert len(net.tap_shapes(13, 16, 60, 90)) == net.depth // 3  # 10 and 14


def test_a_grid_whose_fitted_width_is_half_way_between_two():
    """44 x 11 patches in 30 x 45: diffusers divides first, 30 / 44 * 11 = 7.4999, so the width is 7 and not 8."""
    rows, columns = fitted_grid(44, 11, (30, 45))
    assert rows[0] == 0 and rows[-1] == pytest.approx(30 * 43 / 44)
    assert columns[0] == 19 and columns[-1] == pytest.approx((19 + 7) * 10 / 11)  # diffusers' end; 27 * 10 / 11 for 8
