"""Shared by every test: the repository root on sys.path, golden files, one thread per process."""
import hashlib
import io
import json
import math
import os
import re
import runpy
import sys
import zlib
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

# Before torch reads it, and for every process that a test starts: sums have one order, and workers (`-n 2`)
# and ranks do not wait for one another's threads.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # a plugin may have imported torch before
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))


def golden(pattern: str) -> list[Path]:
    """Golden files in GOLDEN_DIR that match a glob; at least one, so that no parametrised test is silently empty."""
    files = sorted(GOLDEN.glob(pattern))
    assert files, f"no file matches {pattern} in {GOLDEN}"
    return files


def read_golden(path: Path) -> tuple[dict, dict]:
    """(tensors, metadata); metadata values are decoded from JSON where they are JSON."""
    with safe_open(path, "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
        meta = dict(f.metadata() or {})
    for key, value in meta.items():
        try:
            meta[key] = json.loads(value)
        except ValueError:
            pass
    return tensors, meta


def near(value, expected, atol: float = 1e-4) -> None:
    """Of golden values in float32. Where it was measured, references differ by 2e-5 at most from one another and from
    their own float64 runs, the smallest wrong formula (GELU's other form, another eps) by 3e-4."""
    torch.testing.assert_close(value, expected, atol=atol, rtol=0)


def from_recipe(about: dict) -> dict:
    """Weights of a golden file that stores only how they were drawn (SDXL.md, "Weight recipe")."""
    weights, sha256 = {}, hashlib.sha256()
    for key, shape in sorted(about["recipe_keys"].items()):
        z = numpy.random.RandomState(zlib.crc32(f"{about['seed']}:{key}".encode())).standard_normal(shape)
        w, b = next((rule[1:] for rule in about["rules"] if re.search(rule[0], key)), (1.0, 0.05))
        if len(shape) == 1:
            z = 1 + 0.2 * z if key.endswith("weight") else b * z
        elif shape:
            z = w * z / numpy.sqrt(numpy.prod(shape[1:]))
        weights[key] = torch.from_numpy(numpy.asarray(z, dtype=numpy.float32))
        sha256.update(key.encode() + weights[key].numpy().tobytes())
    assert sha256.hexdigest() == about["weights_sha256"]
    return weights


def wan_golden(path: Path) -> tuple[dict, dict, dict]:
    """(tensors, weights by original name, meta) of one of Wan's golden files. Those here hold in place of the
    weights how they were drawn: from torch's generator, one after the other, sorted by name."""
    tensors, meta = read_golden(path)
    meta, generator = meta["meta"], torch.Generator()
    weights = {name.removeprefix("w/"): t for name, t in tensors.items() if name.startswith("w/")}
    about = meta.get("weights")
    for name, shape in sorted(about["shapes"].items()) if about else ():
        generator = generator if weights else generator.manual_seed(about["seed"])
        mean, deviation, per_input = next(rule[1:] for rule in about["rules"] if re.search(rule[0], name))
        deviation /= math.sqrt(math.prod(shape[1:])) if per_input else 1
        weights[name] = mean + deviation * torch.randn(shape, generator=generator)
    if about:  # 1e-6: vector units of other widths round otherwise
        total = sum(w.double().abs().sum().item() for w in weights.values())
        assert math.isclose(total, about["sum_abs"], rel_tol=1e-6)
    return {name: t for name, t in tensors.items() if not name.startswith("w/")}, weights, meta


def check_every_third_block_is_tapped(net, x, t, cond) -> None:
    """The maps of a video network have the shapes of `tap_shapes`, and no block after the last one has run."""
    ran = []
    for i, block in enumerate(net.blocks()):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    shapes = net.tap_shapes(*x.shape[1:])
    maps = net(x, t, cond, taps=tuple(shapes))
    assert list(shapes) == [i for i in range(net.depth) if i % 3 == 2] and ran == list(range(max(shapes) + 1))
    assert [tuple(m.shape) for m in maps] == [(len(x), *shape) for shape in shapes.values()]


def manifest(path: Path) -> tuple[dict, dict]:
    """(name -> shape, _meta) of a full-size checkpoint."""
    data = json.loads(path.read_text())
    return {name: tuple(shape) for name, shape in data["tensors"].items()}, data["_meta"]


def refusal_of(script: str, *flags, printed: str = "") -> str:
    """What `python SCRIPT FLAGS`, which is refused with exit code 2, would print to stderr: here, without the
    seconds that a process of its own takes to import. `printed`: the pattern of its stdout."""
    from models.progress import end_bars
    end_bars()  # of runs that other tests have stopped in this process
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        patch.setattr(os, "_exit", sys.exit)
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert caught.value.code == 2 and re.fullmatch(printed, output.getvalue(), re.S)
    return errors.getvalue()


def run(script, *flags) -> None:
    """A script's main in this process."""
    script.main(script.parse_args(list(map(str, flags))))


def rows(out) -> list[dict]:
    """Of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def says(call, *args, **named) -> str:
    """The one sentence of the InputError that a call must raise."""
    from models.checkpoint import InputError
    with pytest.raises(InputError) as caught:
        call(*args, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextmanager
def states_saved(*iterations):
    """Scripts save their states after these iterations alone: saving takes half of a short run's time."""
    from models.job import job
    save = job.save_state

    def save_state(folder, iteration, *rest):
        if iteration in iterations:
            save(folder, iteration, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "save_state", save_state)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def spy(monkeypatch):
    """spy(on_update): in place of every update on_update(role, roles, step) is called; roles: name -> parameters."""
    from models.job import log
    from models.job.job import Job
    started, start, update = {}, Job.start, log.update

    def starting(job, **roles):
        started.clear()  # of another run in the same test
        started.update(roles)
        start(job, **roles)

    def spy(on_update):
        def updating(opt, loss, rate):
            role = next(name for name, (_, other) in started.items() if other is opt)
            roles = {name: params for name, (params, _) in started.items()}
            return on_update(role, roles, lambda: update(opt, loss, rate))
        monkeypatch.setattr(Job, "start", starting)
        monkeypatch.setattr(log, "update", updating)
    return spy
