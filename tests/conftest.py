"""Shared by every test: the repository root on sys.path, golden files, one thread per process."""
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
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


def manifest(path: Path) -> tuple[dict, dict]:
    """(name -> shape, _meta) of a full-size checkpoint."""
    data = json.loads(path.read_text())
    return {name: tuple(shape) for name, shape in data["tensors"].items()}, data["_meta"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
