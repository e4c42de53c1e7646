"""D_tau: trainable heads on the features of a frozen backbone (Secs. 4.1, 4.2, Apps. B.1, B.2).

The latent discriminator's backbone is the teacher's module itself, never a copy; that of ADP's pixel
discriminator D_tau2 is the vision encoder of SAM, or of DINOv2. They are held as the Denoiser F_phi and the
VisionEncoder, which are no nn.Module: parameters(), state_dict() and FSDP see the heads alone. One logit per
head and sample: the spatial mean of the head's map.

    D_tau2 = PixelDiscriminator(load_vision("sam", "sam_vit_b_01ec64.pth", torch.bfloat16, device))
    logits = D_tau2(D_tau2.features(vae.decode(x_hat_0)))

Shapes: B batch, D width of a map, T its frames, h w its size, H W an image's.
"""
import json
import math
import re
from functools import reduce
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint as recompute
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SamVisionConfig, SamVisionModel

from models.checkpoint import InputError, Tensors, check_names, find, open_tensors
from models.diffusion import Denoiser

# Of the original SAM, on 0..255; ImageNet's, which DINOv2 takes, are these on 0..1.
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
REPOS = {"sam": "facebook/sam-vit-base", "dinov2": "facebook/dinov2-base"}
SOURCES = {kind: f"a copy of {repo}" for kind, repo in REPOS.items()}
SOURCES["sam"] += " or https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"
# transformers' names, of its files and of its modules in any version 5, -> the original's.
RULES = {
    "sam": ((r"^layers\.", "blocks."), (r"\.layer_norm", ".norm"), (r"\.projection\.", ".proj.")),
    "dinov2": (
        (r"^embeddings\.", ""), (r"^patch_embeddings\.projection", "patch_embed.proj"),
        (r"^position_embeddings", "pos_embed"), (r"^encoder\.layer\.", "blocks."), (r"^layernorm\.", "norm."),
        (r"layer_scale([12])\.lambda1", r"ls\1.gamma"), (r"attention\.(output\.dense|o_proj)", "attn.proj"),
        (r"attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)", r"attn.\2"),
    ),
}
UNUSED = {"sam": ("neck.*",), "dinov2": ("norm.*", "mask_token")}  # after the last tap; nothing is masked


def shrink_count(side: int) -> int:
    """How many halvings a 2D head makes: until the short side is <= 8, and two at least where 2 x 2 are left.

    A last map of 1 x 1 would leave GroupNorm a few channels of one pixel, whose differences it erases.
    """  # [choice]
    count = 0
    while side > 8 or (count < 2 and side >= 4):
        side, count = side // 2, count + 1
    return count


class Head2d(nn.Module):
    """n x [4x4 conv stride 2, GroupNorm 32, SiLU], 1x1 conv to one channel (App. B.1): (B D h w) -> (B,), the
    mean in float32, as real and fake logits differ by less than bf16's steps."""

    def __init__(self, channels: int, short_side: int, width: int):
        super().__init__()
        layers = []
        for i in range(shrink_count(short_side)):
            layers += [nn.Conv2d(width if i else channels, width, 4, stride=2, padding=1),
                       nn.GroupNorm(32, width), nn.SiLU()]
        self.shrink = nn.Sequential(*layers)
        self.logit = nn.Conv2d(width if layers else channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logit(self.shrink(x.to(self.logit.weight.dtype))).float().mean((1, 2, 3))


class Head3d(nn.Module):
    """n x [3x3x3 conv, GroupNorm 32, SiLU, 3x3 conv stride 2 in each frame, GroupNorm 32, SiLU], 1x1x1 conv
    to one channel (App. B.2): (B D T h w) -> (B,). The frames stay as many as they are."""

    def __init__(self, channels: int, short_side: int, width: int):
        super().__init__()
        layers = []
        for i in range(shrink_count(short_side)):
            layers += [nn.Conv3d(width if i else channels, width, 3, padding=1),
                       nn.GroupNorm(32, width), nn.SiLU(),
                       nn.Conv3d(width, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
                       nn.GroupNorm(32, width), nn.SiLU()]
        self.shrink = nn.Sequential(*layers)
        self.logit = nn.Conv3d(width if layers else channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logit(self.shrink(x.to(self.logit.weight.dtype))).float().mean((1, 2, 3, 4))


class Discriminator(nn.Module):
    """Latent discriminator: a head on each tapped block of F_phi. `map_shapes`: (D, h, w) of each tap, or
    (D, T, h, w) of a video's; width: of the heads."""

    def __init__(self, F_phi: Denoiser, taps: tuple[int, ...], map_shapes: list[tuple[int, ...]],
                 width: int = 256):
        super().__init__()
        self.F_phi = F_phi
        self.taps = taps
        self.heads = nn.ModuleList((Head3d if len(shape) == 4 else Head2d)(shape[0], min(shape[-2:]), width)
                                   for shape in map_shapes)

    def blocks(self) -> list[nn.Module]:
        return list(self.heads)

    def features(self, x: Tensor, t: Tensor, c: tuple) -> list[Tensor]:
        """F_phi's maps (B D h w), of a video (B D T h w), at the taps, no adapter on; gradients reach x."""
        return self.F_phi.net(x, t, c, taps=self.taps)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (heads B), float32."""
        return torch.stack([head(h) for head, h in zip(self.heads, features)])


# ---- pixels ------------------------------------------------------------------------------------------------

class VisionEncoder:
    """SAM's or DINOv2's frozen transformer, without what follows its last layer. Like the Denoiser it is no
    nn.Module. `taps`: how many layers have run at the quarters of its depth, 3, 6, 9, 12 of 12 (App. B.1)."""

    def __init__(self, net: nn.Module, kind: str):
        config, self.net, self.kind = net.config, net, kind
        self.size, self.grid = config.image_size, config.image_size // config.patch_size
        self.taps = tuple(config.num_hidden_layers * k // 4 for k in (1, 2, 3, 4))
        self.map_shapes = [(config.hidden_size, self.grid, self.grid)] * 4

    def features(self, image: Tensor, checkpoint: bool = False) -> list[Tensor]:
        """Image (B 3 H W) in [-1, 1] -> the maps (B D h w) after the tapped layers, in the encoder's dtype.
        Gradients reach the image; `checkpoint` recomputes each layer's activations in backward."""
        x = image.float()
        if x.shape[-2:] != (self.size, self.size):  # another aspect is squeezed to the square  # [choice]
            x = interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (x.new_tensor(c).view(3, 1, 1) for c in (PIXEL_MEAN, PIXEL_STD))
        x = ((127.5 * (x + 1) - mean) / std).to(next(self.net.parameters()).dtype)
        if self.kind == "sam":
            h, layers = self.net.patch_embed(x) + self.net.pos_embed, self.net.layers  # B h w D
        else:
            h, layers = self.net.embeddings(x), self.net.encoder.layer  # B (class, registers, h w) D
        maps = []
        for i, layer in enumerate(layers, 1):
            h = recompute(layer, h, use_reentrant=False) if checkpoint else layer(h)
            if i in self.taps:
                maps.append(h.flatten(1, -2)[:, -self.grid ** 2:])
        return [rearrange(h, "B (h w) D -> B D h w", h=self.grid) for h in maps]


class PixelDiscriminator(nn.Module):
    """D_tau2 of ADP (Eqs. 9, 10): a head on each map of a vision encoder, which sees no time, no prompt."""

    def __init__(self, encoder: VisionEncoder, width: int = 256):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(Head2d(D, min(h, w), width) for D, h, w in encoder.map_shapes)

    def features(self, image: Tensor, checkpoint: bool = False) -> list[Tensor]:
        """The encoder's maps (B D h w) of images (B 3 H W) in [-1, 1]; gradients reach the image."""
        return self.encoder.features(image, checkpoint)

    blocks, forward = Discriminator.blocks, Discriminator.forward


# ---- files of vision encoders ------------------------------------------------------------------------------

def load_vision(kind: str, path: str | Path | None = None, dtype: torch.dtype = torch.float32,
                device: torch.device | str = "cpu") -> VisionEncoder:
    """The "sam" or "dinov2" encoder of any size: from its original file, a .safetensors file with the same
    names, a transformers-layout folder, or (None) the hub. Raises InputError."""
    tensors = original_tensors(kind, path)
    try:
        with torch.device("meta"):
            net = sam_encoder(tensors.shapes) if kind == "sam" else dinov2_encoder(tensors)
    except Exception as error:  # transformers refuses sizes in many ways
        raise InputError(f"{tensors.path}: expected {SOURCES[kind]}, but no architecture can be read from it "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from error
    if net.config.num_hidden_layers % 4:
        raise InputError(f"{tensors.path}: {net.config.num_hidden_layers} layers; expected a multiple of 4")
    own = {original_name(kind, name): name for name in net.state_dict()}
    check_names(tensors, {name: net.state_dict()[inside].shape for name, inside in own.items()}, UNUSED[kind])
    net.load_state_dict({own[name]: tensors[name].to(device, dtype) for name in own}, assign=True)
    return VisionEncoder(net.requires_grad_(False).eval(), kind)


def random_vision(kind: str, dtype: torch.dtype, device: torch.device | str) -> VisionEncoder:
    """ViT-B as published, with random weights, for --random-weights."""
    if kind == "sam":
        net = SamVisionModel(SamVisionConfig(initializer_range=0.02)).vision_encoder  # not its 1e-10
    else:
        net = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=518, num_register_tokens=0))
    return VisionEncoder(net.to(device, dtype).requires_grad_(False).eval(), kind)


def original_name(kind: str, name: str) -> str:
    return reduce(lambda new, rule: re.sub(*rule, new), RULES[kind], name)


def original_tensors(kind: str, path: str | Path | None) -> Tensors:
    """The encoder under the original's names, but DINOv2's fused attn.qkv as attn.q, attn.k, attn.v."""
    try:
        file = find("model.safetensors", path, REPOS[kind])
    except InputError as error:
        advice = f"; --pixel-ckpt takes {SOURCES[kind]}"  # instead of the denoiser's
        raise InputError(str(error).rpartition("; ")[0] + advice) from error
    tensors, weights = open_tensors(file), {}
    if kind == "sam":  # of its prompts and masks nothing is read
        hub = any(name.startswith("vision_encoder.") for name in tensors)
        tensors = tensors.group("vision_encoder." if hub else "image_encoder.")
    for name in tensors:
        new, value = original_name(kind, name), tensors[name]
        if kind == "dinov2" and ".attn.qkv." in new:
            weights |= {new.replace(".qkv.", f".{part}."): w for part, w in zip("qkv", value.chunk(3))}
        else:
            weights[new] = value
    if "cls_token" in weights:  # DINOv2 without registers is the model with none of them
        weights.setdefault("register_tokens", weights["cls_token"][:, :0])
    return Tensors(tensors.path, {name: tuple(w.shape) for name, w in weights.items()},
                   lambda name, _: weights[name], prefix=tensors.prefix)


def sam_encoder(shapes: dict[str, tuple]) -> nn.Module:
    """A layer attends to the whole grid where its table of relative positions is as long as that needs."""
    (width, _, patch, _), (_, grid, _, _) = shapes["patch_embed.proj.weight"], shapes["pos_embed"]
    depth = sum(name.endswith(".attn.qkv.weight") for name in shapes)
    spans = [(shapes[f"blocks.{i}.attn.rel_pos_h"][0] + 1) // 2 for i in range(depth)]
    net = SamVisionModel(SamVisionConfig(
        hidden_size=width, num_hidden_layers=depth, mlp_dim=shapes["blocks.0.mlp.lin1.weight"][0],
        num_attention_heads=width // shapes["blocks.0.attn.rel_pos_h"][1], image_size=grid * patch,
        patch_size=patch, window_size=next((span for span in spans if span != grid), 0),
        global_attn_indexes=[i for i, span in enumerate(spans) if span == grid])).vision_encoder
    net.neck = nn.Identity()
    return net


def dinov2_encoder(tensors: Tensors) -> nn.Module:
    """No shape tells the heads: a config.json beside the file does, else they are the original's, 64 wide."""
    shapes, beside = tensors.shapes, tensors.path.with_name("config.json")
    (width, _, patch, _), (_, tokens, _) = shapes["patch_embed.proj.weight"], shapes["pos_embed"]
    config = json.loads(beside.read_bytes()) if beside.is_file() else {}
    net = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
        hidden_size=width, num_hidden_layers=sum(name.endswith(".norm1.weight") for name in shapes),
        num_attention_heads=config.get("num_attention_heads", width // 64), patch_size=patch,
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] // width, image_size=math.isqrt(tokens - 1) * patch,
        num_register_tokens=shapes["register_tokens"][1]))
    net.embeddings.mask_token, net.layernorm = None, nn.Identity()
    return net
