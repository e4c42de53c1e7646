"""A CLIP of images and text as transformers' network, from a file in whatever layout it was published.

    net = load_clip(open_tensors("open_clip_pytorch_model.safetensors"), "gelu")
    cosine_similarity(image_vector(net, pixels), text_vector(net, ids))

Letters: B images or prompts, L tokens of text, S of an image, P width of what both are projected to.
"""
import math
import re

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from models.checkpoint import InputError, Tensors, check_names, load, respelled
from models.parse import read_object
from models.text_encoders import at_end, shapes_of

HEADS = {1280: 16, 1408: 16}  # width -> heads of the H and g image encoders; all others are 64 wide
IGNORED = ("*position_ids",)  # a buffer in files of older transformers
# transformers' names -> open_clip's, which are OpenAI's.
RULES = (
    (r"^vision_model\.(embeddings\.)?", "visual."), (r"^text_model\.(embeddings\.)?", ""),
    (r"patch_embedding", "conv1"), (r"position_embedding\.weight", "positional_embedding"),
    (r"pre_layrnorm", "ln_pre"), (r"post_layernorm", "ln_post"), (r"final_layer_norm", "ln_final"),
    (r"encoder\.layers", "transformer.resblocks"), (r"layer_norm([12])", r"ln_\1"),
    (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"), (r"self_attn", "attn"),
    (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
    (r"^visual_projection\.weight", "visual.proj"), (r"^text_projection\.weight", "text_projection"),
)


# ---- files -------------------------------------------------------------------------------------------------

def open_clip_name(name: str) -> str:
    return respelled(name, RULES)


def open_clip_shapes(shapes: dict[str, tuple]) -> dict[str, tuple]:
    """Names and shapes of a transformers CLIP -> of the open_clip file: q, k and v are one tensor, what
    projects is transposed."""
    found = {}
    for name, shape in shapes.items():
        new = open_clip_name(name)
        wide = (3 * shape[0], *shape[1:]) if ".in_proj_" in new else shape
        found[new] = shape[::-1] if name.endswith("projection.weight") else wide
    return found


def from_open_clip(tensors: Tensors, shapes: dict[str, tuple]) -> Tensors:
    """An open_clip file as if it had the names and shapes of transformers. Raises InputError for another
    architecture, in the file's own names."""
    check_names(tensors, open_clip_shapes(shapes))

    def read(name: str, _) -> Tensor:
        new = open_clip_name(name)
        if ".in_proj_" in new:
            width, part = shapes[name][0], "qkv".index(re.search("([qkv])_proj", name)[1])
            return tensors.rows(new, part * width, (part + 1) * width)
        return tensors[new].T.contiguous() if name.endswith("projection.weight") else tensors[new]

    return Tensors(tensors.path, shapes, read, tensors.metadata, tensors.prefix)


def clip_model(tensors: Tensors, activation: str) -> CLIPModel:
    """The CLIP of a file in transformers', open_clip's or OpenAI's names, on `meta`. Sizes come from the
    shapes, heads and activation from a config.json beside the file or as published. Raises InputError."""
    name_in_file = open_clip_name if "visual.conv1.weight" in tensors else str
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    names = [f"{vision}.patch_embedding", f"{vision}.position_embedding", f"{text}.token_embedding",
             f"{text}.position_embedding", "text_projection", *(
                 f"{part}_model.encoder.layers.0.mlp.fc1" for part in ("vision", "text"))]
    (*_, patch), (places, _), (vocabulary, _), (window, _), projection, *fc1 = shapes_of(
        tensors, "a CLIP of images and text", [name_in_file(f"{name}.weight") for name in names], first=4)
    beside, sizes = tensors.path.with_name("config.json"), {}
    towers = read_object(beside, "the JSON of a transformers CLIP") if beside.is_file() else {}
    towers = {part: settings for part, settings in towers.items() if isinstance(settings, dict)}
    for part, (hidden, width) in zip(("vision_config", "text_config"), fc1):
        first = name_in_file(part.replace("config", "model.encoder.layers."))
        last, given = name_in_file(".layer_norm1.weight"), towers.get(part, {})
        sizes[part] = dict(
            hidden_size=width, intermediate_size=hidden, hidden_act=given.get("hidden_act", activation),
            num_attention_heads=given.get("num_attention_heads", HEADS.get(width, max(1, width // 64))),
            num_hidden_layers=sum(name.startswith(first) and name.endswith(last) for name in tensors))
    sizes["vision_config"] |= dict(patch_size=patch, image_size=patch * math.isqrt(places - 1))
    sizes["text_config"] |= dict(vocab_size=vocabulary, max_position_embeddings=window,
                                 bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1)
    try:
        with torch.device("meta"):
            return CLIPModel(CLIPConfig(projection_dim=projection[0 if name_in_file is str else 1], **sizes))
    except Exception as error:  # transformers refuses sizes in many ways
        reason = " ".join(str(error).split())
        raise InputError(f"{tensors.path}: no CLIP of these shapes and {beside.name} ({reason})") from error


def load_clip(tensors: Tensors, activation: str) -> CLIPModel:
    """`clip_model`, filled. Raises InputError unless the file holds exactly its tensors."""
    net = clip_model(tensors, activation)
    if "visual.conv1.weight" in tensors:
        tensors = from_open_clip(tensors, {name: tuple(p.shape) for name, p in net.state_dict().items()})
    load(net, tensors, ignore=IGNORED)
    return frozen(net)


def frozen(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if hasattr(module, "position_ids"):  # a buffer that no file fills
            module.position_ids = torch.arange(module.position_embedding.num_embeddings)[None]
    return net.requires_grad_(False).eval()


# ---- vectors -----------------------------------------------------------------------------------------------

def text_tokens(net: CLIPModel, ids: Tensor) -> Tensor:
    """Ids (B L) -> projected tokens (B L P). Padding after the end token changes none of those before it."""
    return net.text_projection(net.text_model(input_ids=ids).last_hidden_state)


def text_vector(net: CLIPModel, ids: Tensor) -> Tensor:
    """Ids (B L) -> (B P), the token that ends the prompt."""
    return at_end(text_tokens(net, ids), ids)


def image_vector(net: CLIPModel, pixels: Tensor) -> Tensor:
    """Pixels (B 3 H W) -> (B P), the class token."""
    return net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output)


def image_tokens(net: CLIPModel, pixels: Tensor) -> Tensor:
    """Pixels (B 3 H W) -> projected tokens (B S P); as in MPS, without the norm that the class token gets."""
    return net.visual_projection(net.vision_model(pixel_values=pixels).last_hidden_state)
