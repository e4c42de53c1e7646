"""Exports sampled by diffusers and by this project, and how far the two are apart: `python tests/round_trip.py`.

Beside requirements.txt it needs `pip install diffusers==0.42.1 peft==0.21.2`; the test suite does without them.
Trains every tiny model for two updates, all weights and a LoRA, opens the exports in diffusers and samples with its
networks and its schedulers as the README's "The student elsewhere" says, from the same noise and conditions.
Prints a table of the final latents: largest and root mean square difference in float32, the largest in float64, the
deviation of the latents, their root mean square distance to the teacher's. Ends with 1 if a row is further apart than
BOUNDS, unless a note says that diffusers differs by design. Finished run folders are not trained again.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
from diffusers.loaders import lora_pipeline
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.checkpoint import open_tensors  # noqa: E402
from models.diffusion import Denoiser, generator_times, solve  # noqa: E402
from models.job.families import FAMILIES, MOTION  # noqa: E402
from models.job.networks import latent_shape, load_network, load_text  # noqa: E402
from models.job.notes import export_notes  # noqa: E402
from models.lora import add_lora, load_lora  # noqa: E402
from models.presets import PRESETS  # noqa: E402
from models.text import Cond  # noqa: E402
from models.tiny.training import open_part  # noqa: E402
from table4 import run  # noqa: E402

STEPS, SIGMAS, RANK = 4, [1.0, 0.75, 0.5, 0.25], 4  # diffusers shifts SD3's sigmas itself
# Four steps multiply a rounding: noise changed by 1e-7 changes our latents by up to 7e-5 (AnimateDiff, where the first
# x_0 is 25 times eps). What float64 leaves comes of diffusers' tables of alphas, which are float32.
BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-4}
# Two updates at these rates move the latents by 0.07 to 1.7 (column "from the teacher").
FULL, LORA = ["--lr-theta", 3e-4], ["--lr-theta", 5e-2, "--lora-rank", RANK, "--fake-lora", RANK]
RUNS = {  # (model, all weights or an adapter) -> script and its flags
    **{(model, kind): ("adm.py", flags) for model in ("tiny-sd3", "tiny-sdxl", "tiny-sd15", "tiny-cogvideox")
       for kind, flags in (("full", FULL), ("lora", LORA))},
    ("tiny-animatediff", "full"): ("avdm2.py", [*FULL, "--lr-motion", 1e-3, "--warmup", 1]),
    ("tiny-animatediff", "lora"): ("adm.py", LORA),
}
LORA_LOADERS = {"tiny-sd3": "SD3", "tiny-sdxl": "StableDiffusionXL", "tiny-cogvideox": "CogVideoX"}
UNET = dict(_class_name="UNet2DConditionModel", block_out_channels=[32, 64, 64], layers_per_block=1, norm_num_groups=8)
SD15 = UNET | dict(cross_attention_dim=64, attention_head_dim=4,  # diffusers' name for the number of heads
                   down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                   up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"])
CONFIGS = {  # model -> settings of the network; of CogVideoX they are beside the weights
    "tiny-sd3": dict(_class_name="SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, out_channels=4,
                     num_layers=6, attention_head_dim=16, num_attention_heads=6, caption_projection_dim=96,
                     joint_attention_dim=128, pooled_projection_dim=128, pos_embed_max_size=8, qk_norm="rms_norm"),
    "tiny-sdxl": UNET | dict(
        cross_attention_dim=128, attention_head_dim=[1, 2, 2], transformer_layers_per_block=[1, 1, 2],
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=1600,
        use_linear_projection=True, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]),
    "tiny-sd15": SD15, "tiny-animatediff": SD15,
    "motion": dict(_class_name="MotionAdapter", block_out_channels=[32, 64, 64], motion_layers_per_block=1,
                   motion_norm_num_groups=8, motion_mid_block_layers_per_block=1, motion_num_attention_heads=4,
                   motion_max_seq_length=32, use_motion_mid_block=True),
}


def their_network(model: str, ckpt: Path, motion: Path | None, configs: Path) -> nn.Module:
    """The weights of an export, or of the teacher, in diffusers."""
    if model == "tiny-cogvideox":
        kind = diffusers.CogVideoXTransformer3DModel
        net = kind.from_config(kind.load_config(PRESETS[model].ckpt / "transformer"))
        net.load_state_dict(load_file(ckpt))
        return net
    kind = getattr(diffusers, CONFIGS[model]["_class_name"])
    net = kind.from_single_file(str(ckpt), config=str(configs / model))
    if motion:
        adapter = diffusers.MotionAdapter.from_single_file(str(motion), config=str(configs / "motion"))
        net = diffusers.UNetMotionModel.from_unet2d(net, adapter)
    return net


def add_their_lora(model: str, net: nn.Module, file: Path) -> None:
    """As the `load_lora_weights` of the model's pipeline. Ends the script where a tensor has found no module."""
    loader = getattr(lora_pipeline, f"{LORA_LOADERS.get(model, 'StableDiffusion')}LoraLoaderMixin")
    found = loader.lora_state_dict(str(file), **dict(unet_config=net.config) if model == "tiny-sdxl" else {})
    state, alphas = found if isinstance(found, tuple) else (found, None)
    net.load_lora_adapter(state, prefix=FAMILIES[PRESETS[model].family].names.prefix[:-1], network_alphas=alphas)
    if (taken := sum(".lora_" in name for name, _ in net.named_parameters())) != len(state):
        raise SystemExit(f"{file}: diffusers has taken {taken} of {len(state)} tensors")


def their_scheduler(model: str, renoise: bool):
    """diffusers' scheduler at the student's times."""
    betas = dict(beta_start=0.00085, beta_end=0.012,
                 beta_schedule="linear" if model == "tiny-animatediff" else "scaled_linear")
    if model == "tiny-cogvideox":
        settings = diffusers.CogVideoXDDIMScheduler.load_config(PRESETS[model].ckpt / "scheduler")
        scheduler = diffusers.CogVideoXDDIMScheduler.from_config(settings, timestep_spacing="trailing")
    elif model == "tiny-sd3":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=PRESETS[model].shift)
    elif renoise:
        scheduler = diffusers.LCMScheduler(**betas, original_inference_steps=STEPS)
    else:  # the defaults would clip x_0
        scheduler = diffusers.DDIMScheduler(**betas, timestep_spacing="trailing", clip_sample=False,
                                            set_alpha_to_one=True)
    scheduler.set_timesteps(**dict(sigmas=SIGMAS) if model == "tiny-sd3" else dict(num_inference_steps=STEPS))
    return scheduler


def turned(model: str, x: Tensor) -> Tensor:
    """Between our B T C H W and the B C T H W that diffusers has of AnimateDiff; others are alike."""
    return x.transpose(1, 2) if model == "tiny-animatediff" else x


def their_latents(model: str, net: nn.Module, x: Tensor, c: Cond, renoise: bool) -> Tensor:
    """From the noise x for the conditions c; `renoise`: with noise of seed 1, in the dtype of x, between the steps."""
    more = dict(encoder_hidden_states=c.context)
    if model == "tiny-sd3":
        more["pooled_projections"] = c.pooled
    elif model == "tiny-sdxl":
        sizes = torch.tensor([[*PRESETS[model].size, 0, 0, *PRESETS[model].size]] * len(x))
        # The last columns of our vector are these six numbers, which diffusers embeds itself.
        more["added_cond_kwargs"] = dict(text_embeds=c.pooled[:, :-6 * 256], time_ids=sizes)
    elif model == "tiny-animatediff":
        more["encoder_hidden_states"] = c.context.repeat_interleave(x.shape[1], 0)
    scheduler, draws, x = their_scheduler(model, renoise), torch.Generator().manual_seed(1), turned(model, x)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, timestep=t.expand(len(x)), **more).sample, t, x, generator=draws).prev_sample
    return turned(model, x)


def our_latents(model: str, F: Denoiser, x: Tensor, c: Cond) -> Tensor:
    shape, draws = turned(model, x).shape, torch.Generator().manual_seed(1)  # noises are drawn as diffusers does
    renoise = (lambda n: turned(model, torch.randn(shape, generator=draws, dtype=x.dtype))) if F.renoise else None
    return solve(F, x, generator_times(STEPS, PRESETS[model].shift, F.schedule), c, renoise=renoise)


def norm_each_frame(net: nn.Module) -> None:
    """Let diffusers' motion modules take their first norm of each frame, as the original does."""
    for module in net.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            pooled = module.norm.forward
            module.norm.forward = lambda h, pooled=pooled: torch.stack([pooled(frame) for frame in h.unbind(2)], 2)


def row(label: str, model: str, ours: Denoiser, net: nn.Module, x: Tensor, c: Cond, teacher: Tensor, note: str) -> bool:
    """Print a row; False if it is above its bounds. A note stands where diffusers differs by design."""
    off = []
    for dtype in BOUNDS:  # float32 last, as both networks came
        ours.net.to(dtype), net.to(dtype)
        start, cond = x.to(dtype), Cond(*(y.to(dtype) for y in c))
        # Our UNets end in float32, whatever they compute in.
        with patch.object(Tensor, "float", lambda y: y if y.dtype == torch.float64 else y.to(torch.float32)):
            expected = our_latents(model, ours, start, cond)
            off.append(their_latents(model, net, start, cond, ours.renoise) - expected)
    double, single = (difference.abs().max().item() for difference in off)
    fits = bool(note) or double <= BOUNDS[torch.float64] and single <= BOUNDS[torch.float32]
    rms, moved = (difference.square().mean().sqrt() for difference in (off[1], teacher - expected))
    print(f"| {label} | {single:.1e} | {rms:.1e} | {double:.1e} | {expected.std():.3f} | {moved:.3f} | "
          f"{note or 'yes' if fits else '**no**'} |", flush=True)
    return fits


@torch.no_grad()
def compare(model: str, kind: str, out: Path) -> bool:
    """Print the rows of one run; False if one of them is above its bound."""
    preset, weights = PRESETS[model], out / "generator.safetensors"
    ckpt, motion = preset.ckpt, preset.motion_ckpt
    teacher, ours = (Denoiser(open_part(model, load_network, file), preset.predicts, preset.schedule)
                     for file in (None, weights if kind == "full" else None))
    if kind == "full":
        ckpt, motion, files = weights, motion and out / MOTION, {"all weights": weights}
    else:
        ckpt = ckpt / "transformer/diffusion_pytorch_model.safetensors" if ckpt.is_dir() else ckpt
        files = {"LoRA": out / "generator_lora.safetensors"}
        if model in ("tiny-sdxl", "tiny-sd15"):  # the other families' kohya files are not for diffusers
            files["LoRA, kohya's layout"] = out / "generator_lora_kohya.safetensors"
        add_lora(ours.net, FAMILIES[preset.family].names, "generator", RANK)  # not merged, which would round
        load_lora(ours.net, FAMILIES[preset.family].names, "generator", open_tensors(files["LoRA"]))
        ours = replace(ours, lora=("generator",))
    renoise = export_notes(open_tensors(next(iter(files.values())))).get("dmdx.rollout") == "renoise"
    c = open_part(model, load_text).encode(list(preset.sample_prompts[:2]))
    x = torch.randn(2, *latent_shape(preset, preset), generator=torch.Generator().manual_seed(0))
    ours, start = replace(ours, renoise=renoise), our_latents(model, replace(teacher, renoise=renoise), x, c)
    fits = []
    for label, file in files.items():
        net, label = their_network(model, ckpt, motion, out.parent / "configs").eval(), f"{model} | {label}"
        if kind == "lora":
            add_their_lora(model, net, file)
        if motion:
            fits.append(row(label, model, ours, net, x, c, start, "by design: a norm pooled over the frames"))
            norm_each_frame(net)
            label += ", norm of each frame"
        fits.append(row(label, model, ours, net, x, c, start, ""))
    return all(fits)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/round_trip"))
    out = parser.parse_args().out.resolve()
    diffusers.utils.logging.set_verbosity_error()
    for name, settings in CONFIGS.items():
        (out / "configs" / name).mkdir(parents=True, exist_ok=True)
        (out / "configs" / name / "config.json").write_text(json.dumps(settings))
    for (model, kind), (script, flags) in RUNS.items():
        flags = ["--max-iter", 2, "--batch-size", 2, "--evaluate", 0, "--steps", STEPS, *flags]
        if not any((out / f"{model}-{kind}").glob("generator*.safetensors")):
            run(script, out / f"{model}-{kind}", *flags, model=model)
    print("\n| model | export | largest | rms | float64 | deviation | from the teacher | close |\n" + "|---" * 8 + "|")
    sys.exit(not all([compare(model, kind, out / f"{model}-{kind}") for model, kind in RUNS]))


if __name__ == "__main__":
    main()
