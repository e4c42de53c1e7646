"""Frozen vision encoders, SAM's and DINOv2's, for ADP's pixel discriminator (Sec. 4.2, App. B.1).

    encoder = load_vision("sam", "sam_vit_b_01ec64.pth", torch.bfloat16, device)
    D_tau2 = PixelDiscriminator(encoder)
    logits = D_tau2(D_tau2.features(vae.decode(x_hat_0)))

The modules are those of transformers. Files of the originals and of transformers are read, by the original's
tensor names. Shapes: B batch, H W an image's size, h w the grid of its patches, D width.
"""
import math
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint as recompute

from models.checkpoint import InputError, Tensors, check_names, check_values, find, open_tensors, respelled
from models.parse import read_object, short

# SAM's, for pixels of 0..255. DINOv2's are ImageNet's for pixels of 0..1, which are these divided by 255.
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
REPOS = {"sam": "facebook/sam-vit-base", "dinov2": "facebook/dinov2-base"}
SOURCES = {kind: f"a copy of {repo}" for kind, repo in REPOS.items()}
SOURCES["sam"] += " or https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"
# From transformers' names, in its files and in the modules of any version 5, to the original's.
RULES = {
    "sam": ((r"^layers\.", "blocks."), (r"\.layer_norm", ".norm"), (r"\.projection\.", ".proj.")),
    "dinov2": (
        (r"^embeddings\.", ""), (r"^patch_embeddings\.projection", "patch_embed.proj"),
        (r"^position_embeddings", "pos_embed"), (r"^encoder\.layer\.", "blocks."), (r"^layernorm\.", "norm."),
        (r"layer_scale([12])\.lambda1", r"ls\1.gamma"), (r"attention\.(output\.dense|o_proj)", "attn.proj"),
        (r"attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)", r"attn.\2"),
    ),
}
# What follows the last layer, and the token that stands for masked patches: no patch is masked here.
UNUSED = {"sam": ("neck.*",), "dinov2": ("norm.*", "mask_token")}


class VisionEncoder:
    """SAM's or DINOv2's transformer up to its last layer. No nn.Module, so that a discriminator that holds it
    does not register its weights. `taps`: how many layers have run at the quarters of its depth: 3, 6, 9, 12
    of 12 (App. B.1). `map_shapes`: (D, h, w) of the map after each."""

    def __init__(self, net: nn.Module, kind: str):
        config, self.net, self.kind = net.config, net, kind
        self.size, self.grid = config.image_size, config.image_size // config.patch_size
        self.taps = tuple(config.num_hidden_layers * k // 4 for k in (1, 2, 3, 4))
        self.map_shapes = [(config.hidden_size, self.grid, self.grid)] * 4

    def features(self, image: Tensor, checkpoint: bool = False) -> list[Tensor]:
        """Images (B 3 H W) in [-1, 1] -> the maps (B D h w) after the tapped layers, in the encoder's dtype.
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


# ---- files -------------------------------------------------------------------------------------------------

def load_vision(kind: str, path: str | Path | None = None, dtype: torch.dtype = torch.float32,
                device: torch.device | str = "cpu") -> VisionEncoder:
    """The "sam" or "dinov2" encoder of any size. `path`: its original file, a .safetensors file with the same
    names, or a folder as transformers saves it; None: the hub. Raises InputError."""
    tensors = original_tensors(kind, path)
    try:
        with torch.device("meta"):
            net = sam_encoder(tensors.shapes) if kind == "sam" else dinov2_encoder(tensors)
    except Exception as error:  # transformers refuses sizes in many ways
        raise InputError(f"{tensors.path}: expected {SOURCES[kind]}, but no architecture can be read from it "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from error
    if net.config.num_hidden_layers % 4:
        raise InputError(f"{tensors.path}: {net.config.num_hidden_layers} layers; expected a multiple of 4")
    names = {name: original_name(kind, name) for name in net.state_dict()}
    check_names(tensors, {names[name]: p.shape for name, p in net.state_dict().items()}, UNUSED[kind])
    state = {}
    for name, original in names.items():
        weight = tensors[original]
        check_values(tensors, original, weight, floating=True)
        state[name] = weight.to(device, dtype)
    net.load_state_dict(state, assign=True)
    return VisionEncoder(net.requires_grad_(False).eval(), kind)


def random_vision(kind: str, dtype: torch.dtype, device: torch.device | str) -> VisionEncoder:
    """ViT-B as published, with random weights, for --random-weights."""
    import transformers  # slow to import, and seldom needed
    if kind == "sam":
        # With transformers' default of 1e-10 the features would hardly depend on the picture.
        config = transformers.SamVisionConfig(initializer_range=0.02)
        net = transformers.SamVisionModel(config).vision_encoder
    else:
        config = transformers.Dinov2WithRegistersConfig(image_size=518, num_register_tokens=0)
        net = transformers.Dinov2WithRegistersModel(config)
    return VisionEncoder(net.to(device, dtype).requires_grad_(False).eval(), kind)


def original_name(kind: str, name: str) -> str:
    return respelled(name, RULES[kind])


def original_tensors(kind: str, path: str | Path | None) -> Tensors:
    """The encoder's tensors under the original's names, but for DINOv2's fused attn.qkv: it is split into
    attn.q, attn.k and attn.v, as transformers has them. Raises InputError."""
    file = find("model.safetensors", path, REPOS[kind], f"--pixel-ckpt takes {SOURCES[kind]}")
    tensors, weights = open_tensors(file), {}
    if kind == "sam":  # the file also holds SAM's prompt encoder and mask decoder
        hub = any(name.startswith("vision_encoder.") for name in tensors)
        tensors = tensors.group("vision_encoder." if hub else "image_encoder.")
    for name in tensors:
        new, value = original_name(kind, name), tensors[name]
        if kind == "dinov2" and ".attn.qkv." in new and value.ndim:
            weights |= {new.replace(".qkv.", f".{part}."): w for part, w in zip("qkv", value.chunk(3))}
        else:
            weights[new] = value
    if "cls_token" in weights and weights["cls_token"].ndim == 3:  # without register tokens it has 0 of them
        weights.setdefault("register_tokens", weights["cls_token"][:, :0])
    return Tensors(tensors.path, {name: tuple(w.shape) for name, w in weights.items()},
                   lambda name, _: weights[name], prefix=tensors.prefix)


def sam_encoder(shapes: dict[str, tuple]) -> nn.Module:
    """SAM's encoder with the sizes of its tensors. A layer's table of relative positions tells whether it
    attends to the whole grid or within windows."""
    from transformers import SamVisionConfig, SamVisionModel
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
    """DINOv2 with the sizes of its tensors. No shape tells the number of heads: a config.json beside the file
    does; else each head is 64 wide, as in the originals."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    shapes, beside = tensors.shapes, tensors.path.with_name("config.json")
    (width, _, patch, _), (_, tokens, _) = shapes["patch_embed.proj.weight"], shapes["pos_embed"]
    config = read_object(beside, "a DINOv2's settings") if beside.is_file() else {}
    heads = config.get("num_attention_heads", max(1, width // 64))
    if type(heads) is not int or heads < 1 or width % heads:
        raise InputError(f"{beside}: num_attention_heads {short(heads, 40)}; expected a divisor of {width}")
    net = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
        hidden_size=width, num_hidden_layers=sum(name.endswith(".norm1.weight") for name in shapes),
        num_attention_heads=heads, patch_size=patch,
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] // width, image_size=math.isqrt(tokens - 1) * patch,
        num_register_tokens=shapes["register_tokens"][1]))
    net.embeddings.mask_token, net.layernorm = None, nn.Identity()
    return net
