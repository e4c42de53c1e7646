"""The flags of the scripts: headings, defaults, and that each of them does something."""
import argparse
import re
import subprocess
import sys

import adm
import adp
import avdm2
import collect_odes
import dmd
import pytest
import sample
from conftest import ROOT

from models.job.flags import resolve
from models.parallel import init_distributed

SCRIPTS = {module.__name__: module for module in (adm, adp, avdm2, collect_odes, dmd, sample)}
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py") if path.name != "test_flags.py")


def flags_of(name):
    """The flags of a script, as argparse keeps them: `dest` is not always the flag's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, argv: parser)
        parser = SCRIPTS[name].parse_args([])
    return [action for action in parser._actions if action.dest not in ("help", "version")]


def help_of(name, capsys):
    with pytest.raises(SystemExit):
        SCRIPTS[name].parse_args(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_has_a_test_that_sets_it(name):
    """Read as args.NAME by the script or by what surrounds it, beyond the line that fills in its default."""
    sources = "".join(path.read_text() for path in [ROOT / f"{name}.py", *(ROOT / "models" / "job").glob("*.py")])
    used = set(re.findall(r"\bargs\.(\w+)\b(?! = )", sources)) | set(re.findall(r'trained\["(\w+)"\]', sources))
    for flag in flags_of(name):
        assert flag.dest in used, flag.dest
        assert re.search(rf"""["' ]{flag.option_strings[0]}["' ]""", TESTS), flag.option_strings


VIDEO = dict(steps=8, cfg=(5, 7), lr_theta=1e-7, lr_psi=1e-6, lr_tau=5e-6, batch_size=8, frames=49, size=(480, 720))


@pytest.mark.parametrize("script, model, settings", [  # Secs. 4.2, 5, Apps. B.3-B.5; of AVDM2 Sec. 5.1
    (adm, "sdxl", dict(steps=1, cfg=(6, 8), lr_theta=1e-7, lr_psi=1e-6, lr_tau=5e-6, batch_size=128, max_iter=8000)),
    (adp, "sdxl", dict(lr_theta=1e-6, lr_tau=5e-6, batch_size=128, max_iter=8000, lambdas=(0.85, 0.15))),
    (adm, "sd3-medium", dict(steps=4, cfg=(6, 8), lr_theta=1e-6, lr_psi=1e-6, lr_tau=5e-6, lora_rank=64)),
    (adm, "sd3.5-large", dict(steps=4, cfg=(3, 4), lr_theta=1e-8, lr_psi=1e-6, lr_tau=5e-6, lora_rank=0, ttur=1)),
    (adm, "cogvideox-2b", VIDEO), (adm, "cogvideox-5b", VIDEO),
    (avdm2, "animatediff", dict(steps=4, lr_theta=4e-6, lr_motion=2e-5, lr_psi=2e-5, lr_tau=2e-5, warmup=500, ttur=2,
                                frames=16, stride=4, size=(512, 512), batch_size=16, micro_batch=2)),
], ids=lambda value: getattr(value, "__name__", value) if not isinstance(value, dict) else "")
def test_without_flags_the_settings_are_the_papers(script, model, settings):
    init_distributed()
    args = script.parse_args(["--model", model])
    resolve(args, adp=script is adp)
    assert {name: getattr(args, name) for name in settings} == settings


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_headings_and_defaults(name, capsys):
    text = help_of(name, capsys)
    assert "model files:" in text and "memory and ranks:" in text and "(default: 0)" in text  # --seed
    if name in ("adm", "adp", "avdm2", "dmd"):
        headings = re.findall(r"^(\w[\w ]*):$", text, re.M)
        assert headings == ["options", "model files", "memory and ranks", "algorithm", "run", "evaluation",
                            "profiling", *["real clips"] * (name == "avdm2")]
        assert re.search(r"--lr-theta LR_THETA\s+learning rate of the generator \(default: the\s+preset's\)", text)
        assert re.search(r"--save-every N\s+generator updates \(default: 500\)", text)


@pytest.mark.parametrize("name", [*SCRIPTS, "evaluate", "models.job.latents"])
def test_help_does_not_wait_for_pytorch(name):
    """`None` in sys.modules makes any import of it fail; and so do a wrong flag's sentence and --version."""
    code = ("import runpy, sys; sys.modules.update(torch=None, numpy=None); sys.argv[1:] = {!r}.split();"
            f"runpy.run_module({name!r}, run_name='__main__')")
    for flag, said in (("--help", "usage: "), ("--version", "PyTorch "), ("--batch x", "error: ")):
        done = subprocess.run([sys.executable, "-c", code.format(flag)], cwd=ROOT, capture_output=True, text=True)
        assert said in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
