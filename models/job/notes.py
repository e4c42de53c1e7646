"""What checkpoints and run folders say of themselves: checked, and never read as something else.

A network trained on another prediction or noise schedule has the same tensors as its base. Only a marker, the
metadata or a scheduler's settings tell them apart.
"""
import re
from pathlib import Path

from models.checkpoint import InputError, Tensors
from models.diffusion import FLOWS, SNR_SHIFT, alphas_cumprod
from models.parallel import print0
from models.parse import read_object, short
from models.presets import PRESETS, Preset
from models.shards import fingerprint
from models.text_encoders import FOLDERS

# How others write what a network predicts. "velocity" beside a DDPM schedule is v.
SPELLINGS = {"epsilon": ("epsilon", "eps"), "v": ("v", "v_prediction", "v-prediction", "velocity")}
# Family -> how `modelspec.architecture` begins.
ARCHITECTURES = {"unet": "stable-diffusion-xl", "sd15": "stable-diffusion-v1",
                 "animatediff": "stable-diffusion-v1", "mmdit": ("stable-diffusion-3", "stable-diffusion-v3"),
                 "cogvideox": "cogvideo", "wan": "wan"}
KNOWN = ("stable-diffusion", "cogvideo", "wan")  # with which the architectures begin that are told apart
OTHERS = re.compile(r"wan.*(2[._]2|i2v|flf|vace|s2v|fun|animate)")  # of Wan's names, those not of 2.1's text-to-video
# Schedule -> entries of diffusers' scheduler_config.json.
DDPM = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            trained_betas=None)
SCHEDULERS = {"sdxl": DDPM | dict(rescale_betas_zero_snr=False)} | {
    name: DDPM | dict(rescale_betas_zero_snr=True, snr_shift_scale=scale) for name, scale in SNR_SHIFT.items()}

# What `networks.export` writes: key -> the allowed texts, or the smallest and largest number.
CHOICES = {"dmdx.model": PRESETS, "dmdx.predicts": ("epsilon", "v", "velocity"),
           "dmdx.schedule": (*FLOWS, "sdxl", "animatediff", *SNR_SHIFT), "dmdx.rollout": ("renoise", "ode"),
           "dmdx.null_prompt": ("zeros", "empty", "negative")}
RANGES = {"dmdx.steps": (1, 1000), "dmdx.shift": (0.01, 100), "dmdx.cfg": (-1000, 1000)}


def check_announced(tensors: Tensors, preset: Preset) -> None:
    """Raises InputError for a file that says it is of another prediction, noise schedule or architecture than
    the preset's. `tensors`: all of the file."""
    notes = tensors.metadata
    zero_snr = preset.schedule in SNR_SHIFT
    found = []
    if "v_pred" in tensors and preset.predicts != "v":
        found.append("a v-prediction checkpoint (it has a tensor v_pred)")
    if "ztsnr" in tensors and not zero_snr:
        found.append("trained with zero terminal SNR (it has a tensor ztsnr)")
    edm = [name for name in tensors if name.startswith("edm_")]
    if edm:
        found.append(f"trained on an EDM schedule (it has a tensor {short(edm[0])})")
    found += other_prediction(notes, preset)
    architecture = notes.get("modelspec.architecture", "").lower()
    foreign = architecture.endswith("lora") and not architecture.startswith(ARCHITECTURES[preset.family])
    if foreign or other_architecture(architecture, preset) or architecture.endswith("/lora"):
        found.append(f"another model (modelspec.architecture {short(architecture, 60)})")
    if "alphas_cumprod" in tensors and preset.schedule == "sdxl":
        table, expected = tensors["alphas_cumprod"], alphas_cumprod("sdxl")
        if table.shape != expected.shape or not table.is_floating_point() or \
                not (table.double() - expected).abs().max() < 2e-3:  # float16: 5e-4
            found.append("trained on another noise schedule (its alphas_cumprod)")
    exported = export_notes(tensors)
    for key, value in (("dmdx.predicts", preset.predicts), ("dmdx.schedule", preset.schedule)):
        if exported.get(key, value) != value:
            found.append(f"a generator of another parametrisation ({key} {exported[key]})")
    found += other_scheduler(tensors.path, preset) + other_network(tensors.path, preset)
    if found:
        raise InputError(f"{tensors.path}: is {found[0]}; expected a network that predicts {preset.predicts} "
                         f"on the schedule {preset.schedule}")


def check_teacher(tensors: Tensors) -> None:
    """Raises InputError for a distilled generator: its network is a teacher's, and it is none."""
    if steps := export_notes(tensors).get("dmdx.steps"):
        raise InputError(f"{tensors.path}: a generator of {steps} step{'s' * (steps != '1')}; expected the teacher "
                         "(training goes on from a generator with --init)")


def other_architecture(architecture: str, preset: Preset) -> bool:
    return architecture.startswith(KNOWN) and bool(
        OTHERS.match(architecture) or not architecture.startswith(ARCHITECTURES[preset.family]))


def other_prediction(notes: dict[str, str], preset: Preset) -> list[str]:
    """What the metadata of a checkpoint or an adapter say otherwise than the preset."""
    found, flow = [], preset.schedule in FLOWS
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        # Tools write epsilon there for flow models too, which no file of SD3 is.
        if key in notes and not flow and notes[key].lower() not in SPELLINGS[preset.predicts]:
            found.append(f"of another prediction ({key} {short(notes[key], 40)})")
    for key, other in (("ss_v_parameterization", preset.predicts == "v"),  # kohya's, of an adapter
                       ("ss_zero_terminal_snr", preset.schedule in SNR_SHIFT)):
        if notes.get(key, "").lower() == "true" and not other:
            found.append(f"of another prediction or noise schedule ({key} {notes[key]})")
    return found


def check_adapter(tensors: Tensors, preset: Preset) -> None:
    """Raises InputError for an adapter that says it was trained on another prediction, schedule or architecture:
    its tensors may fit all the same."""
    architecture = tensors.metadata.get("modelspec.architecture", "").lower()
    found = other_prediction(tensors.metadata, preset)
    size = re.match(r"stable-diffusion-(?:v?3[.-]5|v?3-m)", architecture)  # SD3 and SD3.5 Medium have the same shapes
    sized = preset.family == "mmdit" and size and ("5" in size[0]) != preset.config["qk_norm"]
    if sized or other_architecture(architecture, preset):
        found.append(f"of another model (modelspec.architecture {short(architecture, 60)})")
    if found:
        raise InputError(f"{tensors.path}: an adapter {found[0]}; expected one of a network that predicts "
                         f"{preset.predicts} on the schedule {preset.schedule}")


def other_scheduler(weights: Path, preset: Preset) -> list[str]:
    """What scheduler/ beside the folder of these weights says otherwise than the preset."""
    weights = weights.absolute()
    path = weights.parent.parent / "scheduler" / "scheduler_config.json"
    if weights.parent.name not in ("unet", "transformer") or not path.is_file():
        return []
    settings = read_object(path, "a scheduler's settings")
    kind, flow = str(settings.get("_class_name", "")), preset.schedule in FLOWS
    expected = dict(SCHEDULERS.get(preset.schedule, {}))
    if not flow:
        expected["prediction_type"] = {"v": "v_prediction"}.get(preset.predicts, preset.predicts)
    wrong = [f"{key} {short(settings[key], 40)}" for key, value in expected.items()
             if settings.get(key, value) != value]
    flows = "Flow" in kind or settings.get("prediction_type") == "flow_prediction"  # as Wan's UniPC
    if kind.startswith("EDM") or kind and flows != flow:
        wrong.append(f"_class_name {short(kind, 60)}")
    return [f"trained otherwise ({path} has {', '.join(wrong)})"] if wrong else []


def other_network(weights: Path, preset: Preset) -> list[str]:
    """What no shape tells: other heads or another epsilon, by config.json beside these weights, and Wan2.2. Its two
    denoisers have 2.1's shapes, each for a part of the times."""
    weights = weights.absolute()
    path = weights.parent / "config.json"
    settings = read_object(path, "a network's settings") if path.is_file() else {}
    settings = {} if "architectures" in settings else settings  # transformers', of a text encoder
    heads = preset.config.get("heads")
    expected = dict(num_heads=heads, num_attention_heads=heads)
    if preset.family == "wan":
        expected |= dict(eps=1e-6, model_type="t2v")
        if found := re.search(r"(high|low)_noise|wan2[._]2", f"{weights.parent.name} {weights.name}".lower()):
            return [f"one of Wan2.2's two denoisers, by its name ({found[0]})"]
        if weights.parent.name == "transformer" and weights.parent.with_name("transformer_2").exists():
            return ["one of Wan2.2's two denoisers (transformer_2/ is beside it)"]
    wrong = [f"{key} {short(settings[key], 40)}" for key, value in expected.items()
             if settings.get(key) not in (None, value)]
    return [f"another network ({path} has {', '.join(wrong)})"] if wrong else []


def check_scale(weights: Path, vae: dict) -> None:
    """Raises InputError where config.json beside a VAE's weights has another scale or shift of its latents."""
    path = weights.parent / "config.json"
    settings = read_object(path, "a VAE's settings") if path.is_file() else {}
    if "Autoencoder" not in str(settings.get("_class_name")):
        return
    # Where the file says none, diffusers takes that of Stable Diffusion 1, or CogVideoX-2b's.
    usual = {"AutoencoderKL": 0.18215, "AutoencoderKLWan": None}.get(str(settings["_class_name"]), 1.15258426)
    statistics = {key: list(vae[key]) if key in vae else None for key in ("mean", "std")}
    for key, value, absent in (
            ("scaling_factor", vae.get("scale"), usual), ("shift_factor", vae.get("shift", 0.0), 0.0),
            *((f"latents_{key}", value, value) for key, value in statistics.items())):
        found = absent if settings.get(key) is None else settings[key]
        if found != value:
            raise InputError(f"{path}: {key} {short(found, 40)}; expected {short(value, 40)}, with which this model's "
                             "denoiser was trained")


def export_notes(tensors: Tensors) -> dict[str, str]:
    """What an exported generator or adapter says of itself, its dmdx.* metadata; of other files nothing.
    Raises InputError for values that no export writes."""
    notes = {key: value for key, value in tensors.metadata.items() if key.startswith("dmdx.")}
    for key, choices in CHOICES.items():
        if key in notes and notes[key] not in choices:
            raise InputError(f"{tensors.path}: its metadata say {key} {short(notes[key], 60)}; "
                             f"expected one of {', '.join(choices)}")
    for key, (low, high) in RANGES.items():
        if key in notes:
            try:
                fits = low <= (int if key == "dmdx.steps" else float)(notes[key]) <= high
            except ValueError:
                fits = False
            if not fits:
                raise InputError(f"{tensors.path}: its metadata say {key} {short(notes[key], 60)}; "
                                 f"expected a number from {low} to {high}")
    return notes


def parametrisation(notes: dict[str, str]) -> dict[str, str]:
    """What an export's notes say of `predicts` and `schedule`, for a preset or a role to take over."""
    return {key: notes[f"dmdx.{key}"] for key in ("predicts", "schedule") if f"dmdx.{key}" in notes}


def read_of(folder: Path, flag: str) -> str:
    """Fingerprint of what --text-ckpt or --tokenizers reads of a folder: of a pipeline's not the other networks."""
    names = {"text_ckpt": FOLDERS.values(), "tokenizers": ("tokenizer", "tokenizer_3")}.get(flag, ())
    return " ".join(map(fingerprint, [folder / name for name in names if (folder / name).is_dir()] or [folder]))


def tell_other_base(adapter: Tensors, base: Path) -> None:
    """A note where an adapter of ours was trained on another checkpoint than `base`."""
    if adapter.metadata.get("dmdx.base") not in (None, fingerprint(base)):
        print0(f"note: {adapter.path} was trained on another checkpoint than {base}")


def run_settings(folder: Path) -> dict:
    """The flags with which a run was last started, from its config.json; none where there is no such file, or
    that of another program. Raises InputError for a damaged one."""
    path, what = folder / "config.json", "the settings of a run"
    args = read_object(path, what).get("args") if path.exists() else None
    if args is None:
        return {}
    kinds = dict(model=str, ckpt=str | None, text_ckpt=str | None, tokenizers=str, size=list, no_t5=bool)
    if not isinstance(args, dict):
        raise InputError(f"{path}: holds args {short(args, 40)}; expected {what}")
    later = dict(frames=int | None, vae_ckpt=str | None, motion_ckpt=str | None, teacher_files=dict, files=dict)
    kinds |= {name: kind for name, kind in later.items() if name in args}  # not every run has them
    wrong = [f"{name} {short(args.get(name, 'missing'), 40)}" for name, kind in kinds.items()
             if name not in args or not isinstance(args[name], kind)]
    if not wrong and [type(side) for side in args["size"]] != [int, int]:
        wrong = [f"size {short(args['size'], 40)}"]
    if wrong or args["model"] not in PRESETS:
        raise InputError(f"{path}: has {', '.join(wrong) or 'model ' + short(args['model'], 40)}; "
                         f"expected {what}")
    return args
