"""D_tau: heads on every block of the teacher itself; D_tau2: heads on the quarters of SAM or DINOv2."""
import math

import pytest
import torch
from conftest import golden, manifest, says
from huggingface_hub import errors
from safetensors.torch import save_file
from test_mmdit import PREFIX
from torch import nn
from torch.nn.functional import interpolate
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SamVisionConfig,
    SamVisionModel,
)

import adm
from models.checkpoint import Tensors, open_tensors
from models.animatediff import AnimateDiff
from models.cogvideox import CogVideoX
from models.diffusion import Denoiser
from models.discriminator import (
    Discriminator,
    Head3d,
    PixelDiscriminator,
    VideoDiscriminator,
    hinge,
    shrink_count,
)
from models.job import flags, networks
from models.mmdit import MMDiT, config_from_shapes
from models.parallel import init_distributed
from models.presets import PRESETS
from models.vision import dinov2_encoder, load_vision, original_name, sam_encoder

SMALL = dict(depth=3, width=48, heads=3, patch=2, in_channels=4, pos_grid=8, context_dim=20, pooled_dim=10,
             qk_norm=True, attn2=())


def small_discriminator(width=32):
    F_phi = Denoiser(MMDiT(**SMALL).requires_grad_(False))
    nn.init.normal_(F_phi.net.pos_embed, std=0.02)
    taps = F_phi.net.tap_shapes(16, 16)
    return F_phi, Discriminator(F_phi, tuple(taps), list(taps.values()), width)


def batch():
    return torch.randn(2, 4, 16, 16), torch.tensor([0.2, 0.8]), (torch.randn(2, 5, 20), torch.randn(2, 10))


@pytest.mark.parametrize("path", [p for p in golden("sd3*.keys.json") if "mmdit" in manifest(p)[1]],
                         ids=lambda p: p.stem)
def test_a_head_on_every_block_of_the_full_model(path):
    shapes, meta = manifest(path)
    shapes = {k.removeprefix(PREFIX): s for k, s in shapes.items() if k.startswith(PREFIX)}
    with torch.device("meta"):
        net = MMDiT(**config_from_shapes(shapes))
        taps = net.tap_shapes(128, 128)
        D_tau = Discriminator(Denoiser(net), tuple(taps), list(taps.values()))
    assert len(D_tau.heads) == meta["mmdit"]["depth"]  # App. B.1: 24 for SD3-Medium, 38 for SD3.5-Large
    convs = [m for m in D_tau.heads[0].shrink if isinstance(m, nn.Conv2d)]
    norms = [m for m in D_tau.heads[0].shrink if isinstance(m, nn.GroupNorm)]
    assert convs[0].in_channels == meta["mmdit"]["hidden"]
    assert all((c.kernel_size, c.stride, c.out_channels) == ((4, 4), (2, 2), 256) for c in convs)
    assert all(n.num_groups == 32 for n in norms)
    assert len(convs) == len(norms) == 3  # 64 x 64 tokens at 1024 px: 32, 16, 8


def test_heads_shrink_to_8_and_twice_where_2_by_2_are_left():
    # side -> halvings: 64 -> 8 takes 3; 33 -> 16 -> 8, 16 -> 4 and 8 -> 2 take two; 4 -> 2 allows one, 3 and
    # less none.
    assert [shrink_count(side) for side in (128, 64, 33, 16, 8, 4, 3, 2, 1)] == [4, 3, 2, 2, 2, 1, 0, 0, 0]


def test_hinge():
    fake, real = torch.tensor([[-2.0, -1.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [0.0, -1.0]])
    assert hinge(fake, real) == (0 + 0 + 1 + 2) / 4 * 2


def test_backbone_is_the_teacher_and_is_not_registered():
    F_phi, D_tau = small_discriminator()
    assert D_tau.F_phi.net is F_phi.net
    teacher = {p.data_ptr() for p in F_phi.net.parameters()}
    assert all(p.data_ptr() not in teacher for p in D_tau.parameters())
    assert all(name.startswith("heads.") for name in D_tau.state_dict())


def test_float32_beside_networks_in_bf16():
    """Inputs 1 % apart: what is left of their features' difference in bf16, and all of it in --d-precision fp32."""
    device, mesh = init_distributed()
    found = {}
    for precision, given in (("fp32", []), ("bf16", []), ("bf16", ["--d-precision", "fp32"])):
        args = adm.parse_args(["--precision", precision, *given])
        preset = flags.resolve(args)
        teacher = Denoiser(networks.load_network(args, preset, mesh, device), preset.predicts, preset.schedule)
        D_tau = networks.new_discriminator(args, preset, teacher, mesh, device)
        assert (D_tau.F_phi is teacher) == (not given) and not any(p.requires_grad for p in D_tau.F_phi.net.parameters())
        torch.manual_seed(0)
        x, t, c = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5), (torch.randn(4, 16, 128), torch.randn(4, 128))
        with torch.no_grad():
            real, fake = (D_tau.features(y, t, c) for y in (x, x + 0.01 * torch.randn_like(x)))
        found[precision, *given] = torch.cat([(a.float() - b.float()).flatten() for a, b in zip(real, fake)])
        assert D_tau(real).dtype == torch.float32
    expected, coarse, fine = found.values()
    assert torch.equal(fine, expected)
    assert torch.cosine_similarity(coarse, expected, dim=0) < 0.9  # tests/d_precision.py: 0.4 to 0.6


def test_heads_compute_in_float32_beside_networks_in_bf16():
    """Inputs 1 % apart: in bf16 the heads would turn one pair in ten round."""
    device, mesh = init_distributed()
    args = adm.parse_args(["--precision", "bf16"])
    preset = flags.resolve(args)
    teacher = Denoiser(networks.load_network(args, preset, mesh, device), preset.predicts, preset.schedule)
    D_tau = networks.new_discriminator(args, preset, teacher, mesh, device)
    x, t, c = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5), (torch.randn(4, 16, 128), torch.randn(4, 128))
    with torch.no_grad():
        h = D_tau.features(x, t, c)
    assert h[0].dtype == torch.bfloat16
    for logits, head, map_ in zip(D_tau(h), D_tau.heads, h):
        alone = head.logit(head.shrink(map_.float())).mean((1, 2, 3))
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)  # bf16 would be off by 1e-3


def test_gradient_reaches_the_sample_and_the_heads_but_not_the_backbone():
    F_phi, D_tau = small_discriminator()
    x, t, c = batch()
    D_tau(D_tau.features(x.requires_grad_(), t, c)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in D_tau.parameters())
    assert all(p.grad is None for p in F_phi.net.parameters())


def test_one_logit_per_head_and_sample_that_sees_time_and_prompt():
    _, D_tau = small_discriminator()
    x, t, (context, pooled) = batch()
    with torch.no_grad():
        logits = D_tau(D_tau.features(x, t, (context, pooled)))
        other_time = D_tau(D_tau.features(x, 1 - t, (context, pooled)))
        other_prompt = D_tau(D_tau.features(x, t, (context.flip(0), pooled.flip(0))))
        alone = D_tau(D_tau.features(x[:1], t[:1], (context[:1], pooled[:1])))
    assert logits.shape == (3, 2)
    assert (logits != other_time).all() and (logits != other_prompt).all()
    # GroupNorm: a sample does not see its batch.
    torch.testing.assert_close(logits[:, :1], alone, atol=1e-5, rtol=0)


# ---- video -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, heads", [("2b", 10), ("5b", 14)])
def test_a_3d_head_on_every_third_block_of_cogvideox(size, heads):
    row = PRESETS[f"cogvideox-{size}"]
    with torch.device("meta"):
        net = CogVideoX(**row.config)
        taps = net.tap_shapes(13, 16, 60, 90)  # 49 frames of 480 x 720
        D_tau = Discriminator(Denoiser(net), tuple(taps), list(taps.values()))
    assert len(D_tau.heads) == heads and tuple(taps)[:3] == (2, 5, 8)  # App. B.2
    convs = [m for m in D_tau.heads[0].shrink if isinstance(m, nn.Conv3d)]
    assert convs[0].in_channels == net.width and list(taps.values())[0] == (net.width, 13, 30, 45)
    assert [(c.kernel_size, c.stride) for c in convs] == 2 * [((3, 3, 3), (1, 1, 1)), ((1, 3, 3), (1, 2, 2))]
    norms = [m for m in D_tau.heads[0].shrink if isinstance(m, nn.GroupNorm)]
    assert len(norms) == len(convs) and all(n.num_groups == 32 for n in norms)


def test_a_3d_head_shrinks_pictures_and_keeps_frames():
    head = Head3d(6, 16, 32)
    x = torch.randn(2, 6, 3, 16, 20, requires_grad=True)
    assert head.shrink(x).shape == (2, 32, 3, 4, 5) and head(x).shape == (2,)
    head(x)[0].backward()
    assert x.grad[0].abs().amax((0, 2, 3)).min() > 0 and x.grad[1].abs().max() == 0  # every frame; no neighbour


def video_discriminator(name, size, frames, width):
    """AVDM2's, on a teacher of a preset's architecture with random weights."""
    row = PRESETS[name]
    net = AnimateDiff(**row.config).requires_grad_(False)
    taps = net.tap_shapes(frames, row.latent_channels, *size)
    return VideoDiscriminator(Denoiser(net), tuple(taps), list(taps.values()), width), taps


def test_avdm2s_discriminator_at_full_size():
    with torch.device("meta"):
        D_tau, taps = video_discriminator("animatediff", (64, 64), 16, PRESETS["animatediff"].head_width)
        maps = [torch.empty(2, *shape) for shape in taps.values()]
        branches = [branch(m) for branch, m in zip(D_tau.branches, maps)]
        assert D_tau(maps).shape == (1, 2)
    assert list(taps) == ["down.1", "down.2", "mid"]
    assert [tuple(m.shape) for m in branches] == [(2, 256, 16, 8, 8)] * 3
    counts = [sum(p.numel() for p in module.parameters()) for module in D_tau.blocks()]
    assert counts == [7_375_872, 9_438_720, 8_848_128, 20_737]
    assert sum(p.numel() for p in D_tau.parameters()) == sum(counts) == 25_683_457
    convs = [[(m.kernel_size, m.stride) for m in branch.modules() if isinstance(m, nn.Conv3d)]
             for branch in D_tau.branches]
    unit = [((3, 3, 3), (1, 1, 1)), ((1, 3, 3), (1, 2, 2))]
    assert convs == [2 * unit, unit, unit[:1]]


def tiny_video_discriminator():
    """Its motion modules, at the start identities, are made to act."""
    D_tau, _ = video_discriminator("tiny-animatediff", (8, 8), 4, 32)
    for name, p in D_tau.F_phi.net.named_parameters():
        if name.endswith("temporal_transformer.proj_out.weight"):
            nn.init.normal_(p, std=0.1)
    return D_tau


def clips(B):
    """(still, moving) clips of one set of pictures: the moving ones turn by a pixel a frame."""
    x = torch.randn(B, 1, 4, 8, 8)
    return x.repeat(1, 4, 1, 1, 1), torch.cat([x.roll(i, dims=-1) for i in range(4)], dim=1)


def test_every_branch_of_avdm2s_discriminator_is_reached():
    D_tau, t, c = tiny_video_discriminator(), torch.tensor([0.2, 0.4]), (torch.randn(2, 5, 64), torch.zeros(2, 0))
    x = clips(2)[1].requires_grad_()
    logits = D_tau(D_tau.features(x, t, c))
    assert logits.shape == (1, 2) and logits.dtype == torch.float32
    grad, = torch.autograd.grad(logits[0, 1], x, retain_graph=True)
    assert grad[0].abs().max() == 0 and grad[1].abs().amax((1, 2, 3)).min() > 0  # no neighbour; every frame
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in D_tau.parameters())
    assert all(p.grad is None for p in D_tau.F_phi.net.parameters())
    assert {name.split(".")[0] for name in D_tau.state_dict()} == {"branches", "final"}
    with torch.no_grad():
        other_time = D_tau(D_tau.features(x, 1 - t, c))
        other_prompt = D_tau(D_tau.features(x, t, (c[0].flip(0), c[1])))
    assert (logits != other_time).all() and (logits != other_prompt).all()


def test_avdm2s_discriminator_learns_to_tell_still_from_moving_clips():
    """The pictures are the same: it sees time."""
    D_tau, t, c = tiny_video_discriminator(), torch.full((8,), 0.1), (torch.zeros(8, 5, 64), torch.zeros(8, 0))

    def logits():  # of fresh clips
        with torch.no_grad():
            maps = [D_tau.features(x, t, c) for x in clips(8)]
        return [D_tau(h) for h in maps]
    opt = torch.optim.AdamW(D_tau.parameters(), lr=2e-3)
    for _ in range(20):
        still, moving = logits()
        (nn.functional.softplus(still).mean() + nn.functional.softplus(-moving).mean()).backward()
        opt.step(), opt.zero_grad()
    still, moving = logits()
    assert (moving.mean() - still.mean()).item() > 1  # at the start 0.0


# ---- pixels ------------------------------------------------------------------------------------------------

# A grid of 8 that windows of 3 do not divide, and global layers that are no regular pattern.
SAM = dict(hidden_size=32, num_hidden_layers=8, num_attention_heads=2, image_size=64, patch_size=8,
           window_size=3, global_attn_indexes=[1, 4, 5], mlp_dim=80, output_channels=16)
DINO = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=2, image_size=70, patch_size=14,
            mlp_ratio=3)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet's, of [0, 1]
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def sam_names(depth: int) -> dict[str, str]:
    """The names of segment_anything's image_encoder -> those of transformers' SamVisionModel."""
    names = {"pos_embed": "pos_embed", "neck.0.weight": "neck.conv1.weight",
             "neck.2.weight": "neck.conv2.weight"}
    modules = {"patch_embed.proj": "patch_embed.projection", "neck.1": "neck.layer_norm1",
               "neck.3": "neck.layer_norm2"}
    for i in range(depth):
        old, new = f"blocks.{i}", f"layers.{i}"
        names |= {f"{old}.attn.rel_pos_{side}": f"{new}.attn.rel_pos_{side}" for side in "hw"}
        modules |= {f"{old}.norm1": f"{new}.layer_norm1", f"{old}.norm2": f"{new}.layer_norm2"}
        modules |= {f"{old}.{m}": f"{new}.{m}" for m in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")}
    names |= {f"{old}.{p}": f"{new}.{p}" for old, new in modules.items() for p in ("weight", "bias")}
    return {f"image_encoder.{old}": f"vision_encoder.{new}" for old, new in names.items()}


def sam_shapes(width, depth, heads, grid, patch, window, whole, mlp, out) -> dict[str, tuple]:
    """Names and shapes of segment_anything's image_encoder, by its constructor's arguments."""
    shapes = {"pos_embed": (1, grid, grid, width), "patch_embed.proj.weight": (width, 3, patch, patch),
              "patch_embed.proj.bias": (width,), "neck.0.weight": (out, width, 1, 1), "neck.1.weight": (out,),
              "neck.1.bias": (out,), "neck.2.weight": (out, out, 3, 3), "neck.3.weight": (out,),
              "neck.3.bias": (out,)}
    for i in range(depth):
        table = (2 * (grid if i in whole else window) - 1, width // heads)
        block = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width),
                 "attn.proj": (width, width), "mlp.lin1": (mlp, width), "mlp.lin2": (width, mlp)}
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in block.items()}
        shapes |= {f"blocks.{i}.{name}.bias": shape[:1] for name, shape in block.items()}
        shapes |= {f"blocks.{i}.attn.rel_pos_{side}": table for side in "hw"}
    return shapes


def dinov2_names(depth: int) -> dict[str, str | list[str]]:
    """The names of the original DINOv2 -> those of transformers' files; a list for a fused q, k, v."""
    names = {"cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
             "pos_embed": "embeddings.position_embeddings"}
    modules = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for i in range(depth):
        old, new = f"blocks.{i}", f"encoder.layer.{i}"
        names |= {f"{old}.ls{j}.gamma": f"{new}.layer_scale{j}.lambda1" for j in (1, 2)}
        modules |= {f"{old}.{m}": f"{new}.{m}" for m in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
        modules[f"{old}.attn.proj"] = f"{new}.attention.output.dense"
        modules[f"{old}.attn.qkv"] = [f"{new}.attention.attention.{m}" for m in ("query", "key", "value")]
    for old, new in modules.items():
        for p in ("weight", "bias"):
            names[f"{old}.{p}"] = [f"{m}.{p}" for m in new] if isinstance(new, list) else f"{new}.{p}"
    return names


def random_net(net: nn.Module) -> nn.Module:
    """transformers starts tables of positions at 0 and SAM's weights at 1e-10, which would hide an error."""
    for p in net.requires_grad_(False).parameters():
        nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """(transformers' SAM encoder, {layout: file}) with the same weights."""
    torch.manual_seed(0)
    net, folder = random_net(SamVisionModel(SamVisionConfig(**SAM))), tmp_path_factory.mktemp("sam")
    weights = net.state_dict()
    original = {old: weights[new].clone() for old, new in sam_names(8).items()}
    assert len(original) == len(weights)
    rest = {"prompt_encoder.no_mask_embed.weight": torch.ones(1, 4),
            "mask_decoder.iou_token.weight": torch.ones(1, 4)}
    torch.save(original | rest, folder / "sam.pth")
    save_file(original, folder / "sam.safetensors")
    net.save_pretrained(folder / "hub")
    (folder / "old").mkdir()
    torch.save(weights | rest, folder / "old" / "pytorch_model.bin")
    return net, {name: folder / name for name in ("sam.pth", "sam.safetensors", "hub", "old")}


def reference_maps(net: nn.Module, image: torch.Tensor, extra: int) -> list[torch.Tensor]:
    """What transformers itself returns for an image in [-1, 1], at quarters; `extra` tokens come first."""
    pixels = ((image + 1) / 2 - MEAN) / STD
    states = net(pixels, output_hidden_states=True).hidden_states  # the embeddings, then each layer's output
    quarter = (len(states) - 1) // 4
    maps = []
    for h in states[quarter::quarter]:
        h = h.flatten(1, -2)[:, extra:]
        side = math.isqrt(h.shape[1])
        maps.append(torch.stack([h[:, y * side:(y + 1) * side] for y in range(side)], 1).permute(0, 3, 1, 2))
    return maps


def assert_same_maps(maps, expected):
    assert len(maps) == len(expected) == 4
    for found, wanted in zip(maps, expected):
        assert wanted.std() > 0.1  # maps of nothing would agree
        # Float32 sums in another order: 1e-5 on the CPUs tried.
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["sam.pth", "sam.safetensors", "hub", "old"])
def test_sam_of_every_layout_has_the_maps_of_transformers(sam, layout):
    net, files = sam
    encoder, image = load_vision("sam", files[layout]), torch.rand(2, 3, 64, 64) * 2 - 1
    assert encoder.taps == (2, 4, 6, 8) and encoder.map_shapes == [(32, 8, 8)] * 4
    assert_same_maps(encoder.features(image), reference_maps(net, image, 0))


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("layout", ["hub", "dinov2.pth"])
def test_dinov2_of_every_layout_has_the_maps_of_transformers(tmp_path, layout, registers):
    if registers:
        net = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=registers))
    else:
        net = Dinov2Model(Dinov2Config(**DINO))
    random_net(net).save_pretrained(tmp_path / "hub")
    if layout == "dinov2.pth":
        hub = open_tensors(tmp_path / "hub")
        names = dinov2_names(4) | ({"register_tokens": "embeddings.register_tokens"} if registers else {})
        torch.save({old: torch.cat([hub[m] for m in new]) if isinstance(new, list) else hub[new]
                    for old, new in names.items()}, tmp_path / layout)
    encoder, image = load_vision("dinov2", tmp_path / layout), torch.rand(2, 3, 70, 70) * 2 - 1
    assert encoder.taps == (1, 2, 3, 4) and encoder.map_shapes == [(128, 5, 5)] * 4
    assert_same_maps(encoder.features(image), reference_maps(net, image, 1 + registers))


def test_config_json_tells_the_heads_of_dinov2(tmp_path):
    net = random_net(Dinov2Model(Dinov2Config(**DINO | dict(num_attention_heads=8))))
    net.save_pretrained(tmp_path)
    image = torch.rand(1, 3, 70, 70) * 2 - 1
    assert_same_maps(load_vision("dinov2", tmp_path).features(image), reference_maps(net, image, 1))


# segment_anything's own arguments; `whole`: the layers of global attention.
VIT_B = dict(width=768, depth=12, heads=12, grid=64, patch=16, window=14, whole=(2, 5, 8, 11), mlp=3072,
             out=256)
VIT_H = VIT_B | dict(width=1280, depth=32, heads=16, whole=(7, 15, 23, 31), mlp=5120)


@pytest.mark.parametrize("size", [VIT_B, VIT_H], ids=["vit_b", "vit_h"])
def test_published_sizes_of_sam_are_read_from_their_shapes(size):
    shapes = sam_shapes(**size)
    if size is VIT_B:
        # 14 tensors in each of 12 blocks, 3 of the patches, 6 of the neck; its published number of weights.
        assert len(shapes) == 177 and sum(map(math.prod, shapes.values())) == 89_670_912
    with torch.device("meta"):
        net = sam_encoder(shapes)
    config = net.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.mlp_dim) == (
        size["width"], size["depth"], size["heads"], size["mlp"])
    assert (config.image_size, config.patch_size, config.window_size) == (1024, 16, 14)
    assert [i for i, layer in enumerate(net.layers) if layer.window_size == 0] == list(size["whole"])
    found = {original_name("sam", name): tuple(p.shape) for name, p in net.state_dict().items()}
    assert found == {name: shape for name, shape in shapes.items() if not name.startswith("neck.")}


def test_published_size_of_dinov2_is_read_from_its_shapes(tmp_path):
    with torch.device("meta"):
        hub = Dinov2Model(Dinov2Config(image_size=518)).state_dict()  # facebook/dinov2-base
    assert sum(p.numel() for p in hub.values()) == 86_580_480  # its published number of weights
    shapes = {original_name("dinov2", name): tuple(p.shape) for name, p in hub.items()}
    assert shapes["pos_embed"] == (1, 37 * 37 + 1, 768)
    shapes["register_tokens"] = (1, 0, 768)
    with torch.device("meta"):
        net = dinov2_encoder(Tensors(tmp_path / "model.safetensors", shapes, None))
    config = net.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.mlp_ratio,
            config.image_size, config.patch_size) == (768, 12, 12, 4, 518, 14)
    found = {original_name("dinov2", name): tuple(p.shape) for name, p in net.state_dict().items()}
    assert found == {name: shape for name, shape in shapes.items()
                     if name not in ("norm.weight", "norm.bias", "mask_token")}


def test_pixels_are_normalised_as_the_originals_do(sam):
    encoder, seen = load_vision("sam", sam[1]["sam.pth"]), []
    encoder.net.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    gray = torch.tensor([0.0, 128.0, 255.0])  # of 255, in the three channels
    encoder.features((gray / 127.5 - 1).view(1, 3, 1, 1).expand(1, 3, 64, 64))
    expected = torch.tensor([(0 - 123.675) / 58.395, (128 - 116.28) / 57.12, (255 - 103.53) / 57.375])
    torch.testing.assert_close(seen[0][0].amin((1, 2)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0][0].amax((1, 2)), expected, atol=1e-5, rtol=0)


def test_images_of_another_size_are_squeezed_to_the_encoders(sam):
    encoder, image = load_vision("sam", sam[1]["sam.pth"]), torch.rand(1, 3, 96, 128) * 2 - 1
    seen = []
    encoder.net.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    square = interpolate(image, (64, 64), mode="bilinear", antialias=True)
    for found, wanted in zip(encoder.features(image), encoder.features(square)):
        torch.testing.assert_close(found, wanted, atol=0, rtol=0)
    # Without antialiasing three of four pixels of noise would not be averaged: its spread would be larger.
    assert seen[0].std() < 0.8 * ((interpolate(image, (64, 64), mode="bilinear") + 1) / 2 / STD).std()


def pixel_discriminator(sam, dtype=torch.float32) -> PixelDiscriminator:
    return PixelDiscriminator(load_vision("sam", sam[1]["sam.safetensors"], dtype), 32)


def test_four_heads_on_an_encoder_that_is_not_registered(sam):
    D_tau2 = pixel_discriminator(sam)
    assert len(D_tau2.heads) == 4 and D_tau2.blocks() == list(D_tau2.heads)
    assert all(name.startswith("heads.") for name in D_tau2.state_dict())
    assert not any(p.requires_grad for p in D_tau2.encoder.net.parameters())
    with torch.no_grad():
        image = torch.rand(3, 3, 64, 64) * 2 - 1
        logits, alone = D_tau2(D_tau2.features(image)), D_tau2(D_tau2.features(image[1:2]))
    assert logits.shape == (4, 3) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, 1:2], alone, atol=1e-5, rtol=0)  # a sample does not see its batch


@pytest.mark.parametrize("kind", ["sam", "dinov2"])
def test_gradient_reaches_the_image_and_recomputing_changes_nothing(sam, tmp_path, kind):
    if kind == "dinov2":
        random_net(Dinov2Model(Dinov2Config(**DINO))).save_pretrained(tmp_path)
    D_tau2 = PixelDiscriminator(load_vision(kind, tmp_path if kind == "dinov2" else sam[1]["sam.pth"]), 32)
    image, grads, logits, runs = torch.rand(2, 3, 72, 60) * 2 - 1, [], [], []
    layers = D_tau2.encoder.net.layers if kind == "sam" else D_tau2.encoder.net.encoder.layer
    layers[0].register_forward_pre_hook(lambda *_: runs.append(0))
    for checkpoint in (False, True):
        x = image.clone().requires_grad_()
        logits.append(D_tau2(D_tau2.features(x, checkpoint=checkpoint)))
        grads.append(torch.autograd.grad(logits[-1].sum(), [x, *D_tau2.parameters()]))
    assert len(runs) == 1 + 2  # the second run twice
    assert all(g.abs().sum() > 0 for g in grads[0]) and (grads[0][0].abs().sum((1, 2, 3)) > 0).all()
    assert all(p.grad is None for p in D_tau2.encoder.net.parameters())
    for off, on in zip((logits[0], *grads[0]), (logits[1], *grads[1])):
        torch.testing.assert_close(on, off, atol=0, rtol=0)


def test_bfloat16_encoder_has_bfloat16_maps_near_the_float32_ones(sam):
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    half, full = (pixel_discriminator(sam, dtype) for dtype in (torch.bfloat16, torch.float32))
    half.load_state_dict(full.state_dict())
    with torch.no_grad():
        maps, expected = half.features(image), full.features(image)
        assert half(maps).dtype == torch.float32
    for found, wanted in zip(maps, expected):
        assert found.dtype == torch.bfloat16
        # 8 bits of mantissa through up to 8 layers: some percent of a map's spread.
        assert (found.float() - wanted).std() < 0.05 * wanted.std()


# ---- what the user can mend --------------------------------------------------------------------------------

def refusal(kind, path) -> str:
    return says(load_vision, kind, path)


SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"


@pytest.mark.parametrize("kind, sources", [("sam", [SAM_URL, "facebook/sam-vit-base"]),
                                           ("dinov2", ["facebook/dinov2-base"])])
def test_missing_weights_name_the_file_its_source_and_the_flag(tmp_path, monkeypatch, kind, sources):
    def offline(repo, file):
        raise errors.OfflineModeIsEnabled(f"{repo}/{file}")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    local, hub = refusal(kind, tmp_path / "absent.pth"), refusal(kind, None)
    assert local.startswith(f"{tmp_path / 'absent.pth'}: no such file or folder; --pixel-ckpt takes ")
    assert hub.startswith(f"model.safetensors of {sources[-1]}: not downloaded yet, and HF_HUB_OFFLINE is set"
                          "; --pixel-ckpt takes ")
    for message in (local, hub):
        assert all(source in message for source in sources) and "--ckpt" not in message


# What is done to a file, what the sentence says. 115 tensors: 14 in each of 8 layers, 3 of the patches.
LIN1, LIN3 = "image_encoder.blocks.3.mlp.lin1.bias", "image_encoder.blocks.3.mlp.lin3.bias"
DAMAGE = {
    "short": (lambda w: w.pop(LIN1), f"1 of 115 expected tensors are missing ({LIN1})"),
    "long": (lambda w: w.update({LIN3: torch.ones(2)}), f"1 tensors are not expected ({LIN3})"),
    "wide": (lambda w: w.update({LIN1: torch.ones(2)}), f"{LIN1} is (2,), expected (80,)"),
    "shallow": (lambda w: [w.pop(name) for name in list(w) if ".blocks.7." in name],
                "7 layers; expected a multiple of 4"),
    "bare": (lambda w: w.pop("image_encoder.pos_embed"),
             "but no architecture can be read from it (KeyError: 'pos_embed')"),
    "other": (lambda w: [w.pop(name) for name in list(w) if name.startswith("image_encoder.")],
              "expected tensors named image_encoder.*, found prompt_encoder.no_mask_embed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_files_are_refused_in_one_sentence(sam, tmp_path, damage):
    weights, path = torch.load(sam[1]["sam.pth"]), tmp_path / f"{damage}.pth"
    change, reason = DAMAGE[damage]
    change(weights)
    torch.save(weights, path)
    message = refusal("sam", path)
    assert message.startswith(f"{path}: ") and reason in message and "\n" not in message


def test_a_sam_is_no_dinov2(sam):
    expected = "expected a copy of facebook/dinov2-base, but no architecture can be read from it (KeyError: "
    assert expected in refusal("dinov2", sam[1]["sam.pth"])
