"""One row per model: what the checkpoint is, and the paper's hyper-parameters (Sec. 4.1, App. B.5).

What the paper does not state is marked [choice]. A flag left out on the command line takes the row's value.
"""
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
# Name -> what it is for, where its file is; read by models/eval/prompt_sets.py.
PROMPT_SETS = {
    "coco10k": "Tables 1, 2, 4: 10,000 captions of COCO 2014's validation set, as DMD2 drew them",
    "parti": "Table 6: Google's 1,632 PartiPrompts",
    "vbench": "Tables 3, 8, 9: VBench's 946 prompts; VBench_full_info.json, or all_dimension.txt",
    "webvid": "AVDM2: the captions of WebVid-10M's validation set; results_10M_val.csv",
    "shapes": "the 512 prompts of the tiny image models' exact evaluation",
    "moving-shapes": "the 256 prompts of the tiny video model's exact evaluation",
}


class Preset(NamedTuple):
    # the checkpoint
    family: str                         # row of models/job/families.py: network, text encoders, VAE, files
    config: dict                        # architecture of the denoiser, checked against the file
    ckpt: Path | None                   # local file; None: `file` of the Hugging Face repository `repo`
    repo: str
    file: str                           # "transformer/": a folder, with vae/ and text_encoder/ beside it
    text_files: tuple[str, ...]         # CLIP-L, CLIP-G, T5 in that repository; empty: inside the single file
    tokenizers: str                     # repository or folder with tokenizer/ and, for T5, tokenizer_3/
    predicts: str                       # what the network outputs
    schedule: str                       # and on which times
    latent_channels: int
    vae_factor: int                     # pixels per latent
    vae: dict                           # arguments of the VAE, checked against the file
    clip_length: int                    # tokens of CLIP-L and CLIP-G
    t5_length: int                      # [choice] T5 tokens: 256 as in diffusers; original 77 or more; 0 none
    # sampling
    size: tuple[int, int]               # height, width in pixels
    shift: float                        # timestep shift of the teacher's and of the generator's schedule
    teacher_steps: int
    teacher_cfg: float
    # distillation
    steps: int                          # N
    cfg: tuple[float, float]            # guidance of the real score and of ODE pairs, uniform per sample
    lora_rank: int                      # [choice] 64 where the generator is an adapter; 0: all weights
    lr_theta: float
    lr_psi: float
    lr_tau: float
    batch_size: int
    micro_batch: int                    # [choice] except SDXL's 4 (Table 7)
    no_checkpointing: bool              # True keeps activations instead of computing them twice
    max_iter: int
    head_width: int                     # [choice] channels of the discriminator's heads
    # pre-training with ODE pairs (ADP)
    adp_lr_theta: float
    adp_lr_tau: float
    adp_max_iter: int
    sam_ckpt: Path | None               # of the pixel discriminator; None: the hub
    pair_count: int                     # [choice] ODE pairs that collect_odes.py makes
    decode_batch: int                   # [choice] pictures decoded at once: each costs gigabytes at 1024 px
    # the job
    prompts: Path | None                # default prompt file
    sample_prompts: tuple[str, ...]
    evaluate: int                       # samples in the closing comparison of teacher and student
    data: str = ""                      # module of models/eval that draws the data and reads it exactly
    frames: int = 0                     # of a video; 0: images
    # AnimateDiff and AVDM2 (Sec. 5.1 of that paper)
    motion_ckpt: Path | None = None     # local motion file; None: `motion_file` of the repository `motion_repo`
    motion_repo: str = ""
    motion_file: str = ""
    base_2d: str = ""                   # row of the model that its single frames are of
    lr_motion: float = 0.0              # of the generator's motion modules; lr_theta is its UNet's
    lambdas: tuple[float, float] = (1.0, 5e-3)  # [choice] weights of score matching and of the GAN, Eq. (9)
    warmup: int = 0                     # [choice] passes over which the learning rates rise from 0
    lr_decay: float = 0.0               # [choice] last share of the updates, over which all rates fall to 0
    ema: float = 0.0                    # [choice] decay of the generator's moving average, which is exported; 0: none


PROMPTS = (
    "a lighthouse on a basalt cliff at dusk, long exposure, sea mist",
    "an old watchmaker at his bench, warm lamp light, shallow depth of field",
    "a red fox asleep in fresh snow, soft morning light",
    "a bowl of ramen on a wooden counter, steam rising, overhead view",
    "a paper-cut landscape of mountains and a river in five shades of blue",
    "an astronaut tending tomatoes in a glass greenhouse on Mars",
    "a street in Lisbon after rain, yellow tram, reflections on cobblestones",
    "portrait of a woman with freckles and silver earrings, window light",
    "a cutaway drawing of a steam locomotive, ink on parchment",
    "three glass bottles, one green, one amber, one clear, on a white shelf",
    "a sign above a bakery door that reads \"OPEN AT SIX\"",
    "a corgi in a knitted yellow sweater riding a skateboard",
)

TINY_PROMPTS = (
    "a small red circle on white", "a large blue square on black", "a small yellow triangle on gray",
    "a large green cross on pink", "a small purple ring on white", "a large orange circle on gray",
    "a red triangle", "a square on pink", "a large ring", "a blue shape on white", "a small cross",
    "a shape on black",
)

TINY_VIDEO_PROMPTS = (
    "a small red circle on white moving left", "a large blue square on black moving up",
    "a yellow triangle moving right", "a large green cross on pink", "a purple ring on white moving down",
    "a shape moving left",
)

SD3 = Preset(
    family="mmdit",
    config=dict(depth=24, width=1536, heads=24, patch=2, in_channels=16, pos_grid=192, context_dim=4096,
                pooled_dim=2048, qk_norm=False, attn2=()),
    ckpt=None, repo="stabilityai/stable-diffusion-3-medium", file="sd3_medium.safetensors",
    text_files=("text_encoders/clip_l.safetensors", "text_encoders/clip_g.safetensors",
                "text_encoders/t5xxl_fp16.safetensors"),
    tokenizers="stabilityai/stable-diffusion-3-medium-diffusers",
    predicts="velocity", schedule="flow",
    latent_channels=16, vae_factor=8,
    vae=dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16, quant=False, shift=0.0609,
             scale=1.5305, groups=32),
    clip_length=77, t5_length=256,
    size=(1024, 1024), shift=3.0, teacher_steps=28, teacher_cfg=7.0,
    steps=4, cfg=(6.0, 8.0), lora_rank=64, lr_theta=1e-6, lr_psi=1e-6, lr_tau=5e-6,
    batch_size=128, micro_batch=4, no_checkpointing=False, max_iter=8000, head_width=256,
    adp_lr_theta=1e-6, adp_lr_tau=5e-6, adp_max_iter=8000, sam_ckpt=None,
    pair_count=50_000, decode_batch=1,
    prompts=None, sample_prompts=PROMPTS, evaluate=12)

SD35 = SD3._replace(
    config=SD3.config | dict(depth=38, width=2432, heads=38, qk_norm=True),
    repo="stabilityai/stable-diffusion-3.5-large", file="sd3.5_large.safetensors",
    tokenizers="stabilityai/stable-diffusion-3.5-large",
    teacher_cfg=3.5, cfg=(3.0, 4.0), lora_rank=0, lr_theta=1e-8)

SDXL = SD3._replace(
    family="unet",
    config=dict(model_channels=320, channel_mult=(1, 2, 4), num_res_blocks=2, depth=(0, 2, 10),
                middle_depth=10, context_dim=2048, vector_dim=2816, in_channels=4, linear=True, head_dim=64,
                groups=32),
    repo="stabilityai/stable-diffusion-xl-base-1.0", file="sd_xl_base_1.0.safetensors", text_files=(),
    tokenizers="stabilityai/stable-diffusion-xl-base-1.0", predicts="epsilon", schedule="sdxl",
    latent_channels=4, vae=SD3.vae | dict(z_channels=4, quant=True, shift=0.0, scale=0.13025), t5_length=0,
    shift=1.0, teacher_steps=25, steps=1, lora_rank=0, lr_theta=1e-7)

SD15 = SDXL._replace(
    family="sd15",
    config=dict(model_channels=320, channel_mult=(1, 2, 4, 4), num_res_blocks=2, depth=(1, 1, 1, 0),
                middle_depth=1, context_dim=768, vector_dim=None, in_channels=4, linear=False, heads=8,
                groups=32),
    repo="SG161222/Realistic_Vision_V5.1_noVAE", file="Realistic_Vision_V5.1.safetensors",
    tokenizers="SG161222/Realistic_Vision_V5.1_noVAE", vae=SDXL.vae | dict(scale=0.18215),
    size=(512, 512), teacher_cfg=7.5, steps=4, cfg=(7.5, 7.5))

VIDEO_PROMPTS = (
    "A potter's hands shape a tall vase of wet clay on a spinning wheel, close-up, warm window light.",
    "A red fox trots through a snowy birch forest at dawn, the camera gliding beside it.",
    "Waves roll onto a black sand beach below cliffs, slow aerial shot, overcast sky.",
    "A street musician plays the cello under a stone arch while people with umbrellas walk past.",
)

COGVIDEOX_2B = SD3._replace(
    family="cogvideox",
    config=dict(depth=30, heads=30, head_dim=64, in_channels=16, text_dim=4096, time_dim=512, patch=2,
                rotary=False),
    repo="zai-org/CogVideoX-2b", file="transformer/", text_files=(), tokenizers="zai-org/CogVideoX-2b",
    predicts="v", schedule="cogvideox-2b",
    vae=dict(ch=(128, 256, 256, 512), num_res_blocks=3, z_channels=16, scale=1.15258426, groups=32,
             time_levels=2),
    clip_length=0, t5_length=226, size=(480, 720), shift=1.0, teacher_steps=50, teacher_cfg=6.0,
    steps=8, cfg=(5.0, 7.0), lora_rank=0, lr_theta=1e-7, batch_size=8, micro_batch=1,
    sample_prompts=VIDEO_PROMPTS, evaluate=4, frames=49)

# Not in the papers: CogVideoX's learning rates; guidance of 4 to 6, for originals of 6 (1.3B) and 5 (14B).  # [choice]
WAN_1_3B = COGVIDEOX_2B._replace(
    family="wan",
    config=dict(depth=30, width=1536, heads=12, ffn_dim=8960, freq_dim=256, text_dim=4096, in_channels=16, patch=2),
    repo="Wan-AI/Wan2.1-T2V-1.3B", file="diffusion_pytorch_model.safetensors", tokenizers="Wan-AI/Wan2.1-T2V-1.3B",
    predicts="velocity", schedule="wan",
    vae=dict(ch=(96, 192, 384, 384), num_res_blocks=2, z_channels=16, time=(False, True, True)),
    t5_length=512, size=(480, 832), frames=81, shift=5.0, steps=4, cfg=(4.0, 6.0))

ANIMATEDIFF = SD15._replace(
    family="animatediff", config=SD15.config | dict(motion_mid=True), schedule="animatediff",
    motion_repo="guoyww/animatediff", motion_file="mm_sd_v15_v2.ckpt", base_2d="sd1.5",
    lr_theta=4e-6, lr_motion=2e-5, lr_psi=2e-5, lr_tau=2e-5, warmup=500, batch_size=16, micro_batch=2,
    max_iter=5000, sample_prompts=VIDEO_PROMPTS, evaluate=4, frames=16)

PRESETS = {
    "sdxl": SDXL,
    "sd3-medium": SD3,
    "sd3.5-large": SD35,
    "cogvideox-2b": COGVIDEOX_2B,
    "cogvideox-5b": COGVIDEOX_2B._replace(
        config=COGVIDEOX_2B.config | dict(depth=42, heads=48, rotary=True),
        repo="zai-org/CogVideoX-5b", tokenizers="zai-org/CogVideoX-5b", schedule="cogvideox-5b",
        vae=COGVIDEOX_2B.vae | dict(scale=0.7)),
    "wan2.1-1.3b": WAN_1_3B,
    "wan2.1-14b": WAN_1_3B._replace(
        config=WAN_1_3B.config | dict(depth=40, width=5120, heads=40, ffn_dim=13824),
        repo="Wan-AI/Wan2.1-T2V-14B", file="diffusion_pytorch_model.safetensors.index.json",
        tokenizers="Wan-AI/Wan2.1-T2V-14B", teacher_cfg=5.0, lora_rank=64),
    "sd1.5": SD15,
    "animatediff": ANIMATEDIFF,
    "animatediff-v3": ANIMATEDIFF._replace(
        config=ANIMATEDIFF.config | dict(motion_mid=False), motion_file="v3_sd15_mm.ckpt"),
    # This model is not in the paper: guidance of SD3.5-Large, LoRA and learning rate of SD3-Medium.  # [choice]
    "sd3.5-medium": SD35._replace(
        config=SD3.config | dict(pos_grid=384, qk_norm=True, attn2=tuple(range(13))),
        repo="stabilityai/stable-diffusion-3.5-medium", file="sd3.5_medium.safetensors",
        tokenizers="stabilityai/stable-diffusion-3.5-medium", teacher_cfg=4.5, lora_rank=64, lr_theta=1e-6),
    # Learning rates of its own, in the paper's order: D fastest, then fake, then generator.
    "tiny-sd3": SD3._replace(
        sample_prompts=TINY_PROMPTS,
        config=dict(depth=6, width=96, heads=6, patch=2, in_channels=4, pos_grid=8, context_dim=128,
                    pooled_dim=128, qk_norm=True, attn2=()),
        ckpt=HERE / "tiny" / "tiny_sd3.safetensors", repo="", file="tiny_sd3.safetensors", text_files=(),
        tokenizers=str(HERE / "tiny"),
        latent_channels=4, vae_factor=4,
        vae=dict(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4, quant=False, shift=0.0, scale=1.0,
                 groups=8),
        clip_length=8, t5_length=8, size=(32, 32), lora_rank=0, steps=8, cfg=(1.5, 2.5), teacher_cfg=3.0,
        lr_theta=5e-5, lr_psi=3e-4, lr_tau=5e-4, ema=0.99, batch_size=64, micro_batch=32, no_checkpointing=True,
        max_iter=350, head_width=128, decode_batch=16,
        prompts=HERE / "tiny" / "prompts.txt", evaluate=512, data="shapes"),
}

TINY = PRESETS["tiny-sd3"]
PRESETS["tiny-sdxl"] = SDXL._replace(
    config=dict(model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, depth=(0, 1, 2), middle_depth=2,
                context_dim=128, vector_dim=1600, in_channels=4, linear=True, head_dim=32, groups=8),
    ckpt=HERE / "tiny" / "tiny_sdxl.safetensors", repo="", file="tiny_sdxl.safetensors",
    tokenizers=TINY.tokenizers, vae_factor=4, vae=TINY.vae | dict(quant=True),
    clip_length=8, size=(32, 32), cfg=TINY.cfg, teacher_cfg=3.0,
    lr_theta=1e-4, lr_psi=4e-4, lr_tau=8e-4, lr_decay=1.0, batch_size=16, micro_batch=16, no_checkpointing=True,
    max_iter=1200, head_width=128,
    adp_lr_theta=5e-5, adp_lr_tau=4e-3, adp_max_iter=400, sam_ckpt=HERE / "tiny" / "tiny_sam.safetensors",
    pair_count=1024, decode_batch=16,
    prompts=TINY.prompts, sample_prompts=TINY_PROMPTS, evaluate=512, data="shapes")

# z, text and clips as models/tiny/video.py makes them: 9 frames are 3 latent frames, one published chunk.
PRESETS["tiny-cogvideox"] = COGVIDEOX_2B._replace(
    config=dict(depth=6, heads=6, head_dim=16, in_channels=4, text_dim=128, time_dim=96, patch=2,
                rotary=False, interpolation=0.625),  # 1.875 would set these 4 columns too close
    ckpt=HERE / "tiny" / "cogvideox", repo="", tokenizers=str(HERE / "tiny" / "cogvideox"),
    latent_channels=4, vae_factor=4,
    vae=dict(ch=(16, 32, 32), num_res_blocks=1, z_channels=4, scale=1.0, groups=4, time_levels=2),
    t5_length=12, size=(32, 32), frames=9, teacher_cfg=3.0, cfg=(2.0, 4.0), steps=2,
    lr_theta=3e-5, lr_psi=3e-4, lr_tau=5e-4, batch_size=16, micro_batch=16, no_checkpointing=True,
    max_iter=300, head_width=64, decode_batch=16,
    prompts=HERE / "tiny" / "cogvideox" / "prompts.txt", sample_prompts=TINY_VIDEO_PROMPTS, evaluate=512,
    data="moving_shapes")

# 9 frames of 32 x 32 as models/tiny/animatediff.py makes them: the frames' model, and with motion modules.
PRESETS["tiny-sd15"] = SD15._replace(
    config=dict(model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, depth=(1, 1, 0), middle_depth=1,
                context_dim=64, vector_dim=None, in_channels=4, linear=False, heads=4, groups=8),
    ckpt=HERE / "tiny" / "animatediff" / "tiny_sd15.safetensors", repo="", file="tiny_sd15.safetensors",
    tokenizers=str(HERE / "tiny" / "animatediff"), vae_factor=4, vae=TINY.vae | dict(quant=True),
    clip_length=12, size=(32, 32), teacher_cfg=3.0, cfg=(3.0, 3.0),
    lr_theta=5e-5, lr_psi=5e-4, lr_tau=1e-3, batch_size=16, micro_batch=16, no_checkpointing=True,
    max_iter=150, head_width=64, decode_batch=16,
    prompts=HERE / "tiny" / "animatediff" / "prompts.txt", sample_prompts=TINY_VIDEO_PROMPTS, evaluate=256)
PRESETS["tiny-animatediff"] = PRESETS["tiny-sd15"]._replace(
    family="animatediff", config=PRESETS["tiny-sd15"].config | dict(motion_mid=True, motion_heads=4),
    schedule="animatediff", motion_ckpt=HERE / "tiny" / "animatediff" / "tiny_mm.safetensors",
    motion_file="tiny_mm.safetensors", base_2d="tiny-sd15", lr_theta=2e-5, lr_motion=1e-4, lr_tau=2e-3, cfg=(2.0, 2.0),
    lambdas=(1.0, 0.1), warmup=20, lr_decay=0.7, max_iter=150, batch_size=8, micro_batch=8, frames=9,
    data="moving_shapes")
