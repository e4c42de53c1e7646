"""AnimateDiff's two files: which tensors of each are read, which files are refused, and what is written.

    tensors = merged(base_tensors(open_tensors("Realistic_Vision_V5.1.safetensors")),
                     motion_tensors(open_tensors("mm_sd_v15_v2.ckpt")))
"""
from pathlib import Path

from torch import Tensor

from models.animatediff import MAX_FRAMES, positions
from models.checkpoint import InputError, Tensors, some
from models.diffusers_names import denoiser_of

DENOISER = "model.diffusion_model."  # group of a single file
PE = ".pos_encoder.pe"


def motion_tensors(tensors: Tensors) -> Tensors:
    """The tensors of AnimateDiff's motion modules in their original file, or in a whole UNet that its trainer
    saved (`module.*`); the fixed positions are checked and left out. Raises InputError for other files."""
    places = {name.removeprefix("module."): name for name in tensors if "motion_modules." in name}
    shapes = {name: tensors.shapes[place] for name, place in places.items()}
    tables = {name: shape for name, shape in shapes.items() if name.endswith(PE)}
    lengths = {shape[1] if len(shape) == 3 else 0 for shape in tables.values()}
    mid = any(name.startswith("mid_block.") for name in shapes)
    levels = {name.split(".")[1] for name in shapes if name.startswith("down_blocks.")}
    first = shapes.get("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight")

    found = None
    if any("lora" in name for name in tensors):
        found = "LoRA weights"
    elif not places:
        base = any("input_blocks." in name for name in tensors)
        found = "a base model" if base else f"no motion modules ({some(tensors)})"
    elif not any(".temporal_transformer." in name for name in places):
        found = f"motion modules under other names ({some(places, 1)}), as diffusers saves them"
    elif not tables:
        found = f"motion modules without {PE[1:]}, as AnimateLCM's, which have another noise schedule"
    elif lengths == {24} and not mid:
        found = "v1's motion modules (24 positions, no mid_block), which need a UNet with pooled norms"
    elif lengths != {MAX_FRAMES}:
        found = f"motion modules of {some(sorted(lengths))} positions and not of {MAX_FRAMES}"
    elif len(levels) == 3 and first == (320,):
        found = "motion modules of SDXL"
    elif any(shape[0] != 1 or shape[-1] % 2 for shape in tables.values()) or any(
            (tensors[places[name]].float() - positions(*shape[-2:])).abs().max() > 1e-2  # bf16: 4e-3
            for name, shape in tables.items()):
        found = f"a {PE[1:]} that is not the sinusoids"
    if found:
        raise InputError(f"{tensors.path}: {found}; expected a motion file of AnimateDiff v2 or v3, such as "
                         "mm_sd_v15_v2.ckpt or v3_sd15_mm.ckpt")
    return Tensors(tensors.path, {name: shape for name, shape in shapes.items() if name not in tables},
                   lambda name, rows: tensors.read(places[name], rows), tensors.metadata)


def base_tensors(tensors: Tensors) -> Tensors:
    """The UNet's tensors of an SD1.5 file. Raises InputError for another kind of model."""
    found, unet = "motion modules", None
    if not any("motion_modules." in name for name in tensors):
        unet = denoiser_of(tensors, DENOISER)
        convs = [unet.shapes.get(name, ()) for name in ("input_blocks.0.0.weight", "out.2.weight")]
        found = "an SDXL model" if "label_emb.0.0.weight" in unet else None
    if unet and not found and all(len(shape) == 4 for shape in convs) and convs[0][1] != convs[1][0]:
        found = f"{convs[0][1]} input channels for {convs[1][0]} output channels, as in inpainting models"
    if found:
        raise InputError(f"{tensors.path}: {found}; expected SD1.5 or a fine-tune of it in a single file, "
                         "such as Realistic_Vision_V5.1.safetensors")
    return unet


def merged(a: Tensors, b: Tensors) -> Tensors:
    """The tensors of both files. Raises InputError where a name is in both."""
    both = [name for name in a if name in b]
    if both:
        raise InputError(f"{b.path}: {len(both)} of its {len(b)} tensors are in {a.path} too ({some(both)}); "
                         "expected other names")
    return Tensors(Path(f"{a.path} with {b.path}"), a.shapes | b.shapes,
                   lambda name, rows: (a if name in a else b).read(name, rows), b.metadata | a.metadata)


def split_motion(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """AnimateDiff's weights as those of a UNet and of a motion file; the latter has the fixed positions too,
    without which other readers take it for AnimateLCM's."""
    unet = {name: p for name, p in weights.items() if "motion_modules." not in name}
    motion = {name: p for name, p in weights.items() if name not in unet}
    for name, p in list(motion.items()):
        if name.endswith(".to_q.weight"):
            table = positions(MAX_FRAMES, p.shape[0])[None].to(p.dtype)
            motion[name.removesuffix(".to_q.weight") + PE] = table
    return unet, motion
