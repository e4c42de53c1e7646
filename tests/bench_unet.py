"""Speed of models/sdxl_unet.py against diffusers' UNet2DConditionModel: same weights, input and thread count,
alternating in one run. SDXL at 0.4 of its width, with fewer transformer blocks.

    pip install diffusers && OMP_NUM_THREADS=2 python tests/bench_unet.py

Prints the largest difference of the two outputs and the ratio of the fastest times, ours / theirs.
"""
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.sdxl_unet import UNet  # noqa: E402
from tests.bench import race  # noqa: E402

WIDTHS, DEPTH, LATENT, TEXT, BATCH, ROUNDS = (128, 256, 512), (0, 2, 4), 32, 77, 1, 15

torch.manual_seed(0)
ours = UNet(model_channels=WIDTHS[0], channel_mult=(1, 2, 4), num_res_blocks=2, depth=DEPTH,
            middle_depth=DEPTH[-1], context_dim=512, vector_dim=2816)
theirs = UNet2DConditionModel(
    sample_size=LATENT, block_out_channels=WIDTHS, layers_per_block=2, cross_attention_dim=512,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=[max(d, 1) for d in DEPTH], attention_head_dim=[w // 64 for w in WIDTHS],
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816)
state = {f"model.diffusion_model.{name}": value for name, value in ours.state_dict().items()}
theirs.load_state_dict(convert_ldm_unet_checkpoint(state, theirs.config))

x, t = torch.randn(BATCH, 4, LATENT, LATENT), torch.full((BATCH,), 0.5)
context, pooled, sizes = torch.randn(BATCH, TEXT, 512), torch.randn(BATCH, 1280), torch.rand(BATCH, 6)
vector = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).view(BATCH, -1)], dim=1)
added = {"text_embeds": pooled, "time_ids": sizes}
calls = {"ours": lambda: ours(x, t, (context, vector)),
         "diffusers": lambda: theirs(x, 1000 * t - 1, context, added_cond_kwargs=added, return_dict=False)[0]}
race(calls, ROUNDS)
