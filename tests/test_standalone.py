"""Each of these files, copied alone into another project, works with torch and einops."""
import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# File -> what its user may write, and the shape of the result.
USES = {
    "diffusion": ("""
teacher = Denoiser(lambda x, t, c, lora: x, "v", "cogvideox-2b")
result = solve(teacher, torch.randn(1, 2), teacher_times(4, 1.0, "cogvideox-2b"), ())
""", [1, 2]),
    "mmdit": ("""
net = MMDiT(depth=2, width=8, heads=2, patch=2, in_channels=3, pos_grid=4, context_dim=5, pooled_dim=6,
            qk_norm=True, attn2=(0,))
result = net(torch.randn(1, 3, 4, 8), torch.ones(1), (torch.randn(1, 7, 5), torch.randn(1, 6)))
""", [1, 3, 4, 8]),
    "sdxl_unet": ("""
net = UNet(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, depth=(0, 1), middle_depth=1,
           context_dim=5, vector_dim=6, head_dim=4, groups=4)
result = net(torch.randn(1, 4, 4, 8), torch.ones(1), (torch.randn(1, 7, 5), torch.randn(1, 6)))
""", [1, 4, 4, 8]),
    "cogvideox": ("""
net = CogVideoX(depth=1, heads=2, head_dim=16, in_channels=3, text_dim=5, time_dim=6, rotary=True)
result = net(torch.randn(1, 2, 3, 4, 8), torch.ones(1), (torch.randn(1, 7, 5), None))
""", [1, 2, 3, 4, 8]),
    "wan": ("""
net = Wan(depth=2, width=24, heads=2, ffn_dim=8, freq_dim=6, text_dim=5, in_channels=3, text_len=9)
result = net(torch.randn(1, 2, 3, 4, 8), torch.ones(1), (torch.randn(1, 7, 5), None))
""", [1, 2, 3, 4, 8]),
    "vae": ("""
vae = AutoencoderKL(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=2, shift=0.1, scale=2.0, groups=4)
result = vae.decode(vae.encode(torch.randn(1, 3, 4, 8)), checkpoint=True)
""", [1, 3, 4, 8]),
    "cogvideox_vae": ("""
vae = CogVideoXVAE(ch=(4, 4, 8), num_res_blocks=1, z_channels=2, scale=0.7, groups=2)
result = vae.decode(vae.encode(torch.randn(1, 17, 3, 4, 8)), checkpoint=True)
""", [1, 17, 3, 4, 8]),
    "wan_vae": ("""
vae = WanVAE(ch=(4, 4, 8), num_res_blocks=1, z_channels=16, time=(True, True))
result = vae.decode(vae.encode(torch.randn(1, 17, 3, 4, 8)))
""", [1, 17, 3, 4, 8]),
    "discriminator": ("""
class Teacher:  # whose maps are its input itself and a video of two frames
    def net(self, x, t, c, taps):
        return [x, torch.stack([x, -x], dim=2)]
D_tau = Discriminator(Teacher(), taps=(0, 1), map_shapes=[(3, 8, 9), (3, 2, 8, 9)], width=32)
logits = D_tau(D_tau.features(torch.randn(4, 3, 8, 9), None, None))
result = torch.stack([logits.mean(), hinge(logits, logits)])
""", [2]),
}
# Run in a folder that has a folder for each file: imports each where nothing else can be found.
PROGRAM = """
import importlib, json, sys
for name, use in json.load(sys.stdin).items():
    sys.path.insert(0, name)
    module = importlib.import_module(name)
    scope = dict(vars(module))
    exec(use, scope)
    result = scope["result"]
    found = dict(file=module.__file__, shape=result.shape, finite=result.isfinite().all().item())
    print(json.dumps([name, found | dict(loaded=sorted(sys.modules))]))
    sys.path.pop(0)
    del sys.modules[name]  # nor can the next file find this one
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """(folder of the copies, file -> what its copy gave). One interpreter, which takes a second to start."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in USES:
        (folder / name).mkdir()
        shutil.copy(ROOT / "models" / f"{name}.py", folder / name)
    # -I: it searches neither its working folder nor PYTHONPATH.
    run = subprocess.run([sys.executable, "-I", "-c", PROGRAM], cwd=folder, text=True, capture_output=True,
                         input=json.dumps({name: use for name, (use, _) in USES.items()}),
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert run.returncode == 0, run.stderr
    return folder, dict(map(json.loads, run.stdout.splitlines()))


@pytest.mark.parametrize("name", USES)
def test_a_copy_of_one_file_works_alone(elsewhere, name):
    folder, found = elsewhere[0], elsewhere[1][name]
    assert found["file"] == str(folder / name / f"{name}.py")
    assert found["shape"] == USES[name][1] and found["finite"]
    packages = {module.partition(".")[0] for module in found["loaded"]}
    assert "torch" in packages and not packages & {"models", "transformers", "safetensors", "av", "PIL"}


@pytest.mark.parametrize("name", USES)
def test_none_of_its_lines_imports_more_than_torch_and_einops(name):
    """Also inside functions that the copies above do not call."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "models" / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
    assert {module.partition(".")[0] for module in imported} <= {"torch", "einops"} | sys.stdlib_module_names
