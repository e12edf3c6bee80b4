"""The examples of deepseek-ai/DualPipe run on this engine. Needs a checkout: see CONTRIBUTING.md.

Their text is changed where it names the package, the backend and the device, and nowhere else but
in the gradient check of one: it gathers into a tensor [P, n, m], where NCCL takes any shape and gloo
(in torch 2.13) [P * n, m] alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

CHANGES = [
    ("from dualpipe import", "from dualpipe_ext import"),
    ("from dualpipe.utils import", "from dualpipe_ext.utils import"),
    ("backend='nccl'", "backend='gloo'"),
    ("torch.cuda.set_device(rank)", "torch.set_num_threads(1)"),
    ('torch.set_default_device(f"cuda:{rank}")', 'torch.set_default_device("cpu")'),
]
GLOO_CHANGES = [
    (f"all_gather_into_tensor({name}all, {name}.grad)",
     f"all_gather_into_tensor({name}all.flatten(0, 1), {name}.grad)")
    for name in ("p0", "p1")
]  # fmt: skip
DEVICES = "torch.cuda.device_count()"
NUM_DEVICES = 4


def upstream() -> Path:
    folder = os.environ.get("DUALPIPE_UPSTREAM", "")
    if not folder:
        pytest.fail("set DUALPIPE_UPSTREAM to a checkout of deepseek-ai/DualPipe")
    return Path(folder)


@pytest.mark.upstream
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("name", ["example_dualpipe.py", "example_dualpipev.py"])
def test_example(name: str, tmp_path: Path) -> None:
    """Losses equal, gradients within 1e-13: the example's own assertions."""
    text = (upstream() / "examples" / name).read_text()
    changes = [*CHANGES, (DEVICES, str(NUM_DEVICES))]
    if name == "example_dualpipe.py":
        changes += GLOO_CHANGES
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    script = tmp_path / name
    script.write_text(text)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for num_ranks in (NUM_DEVICES, 2):
        assert f"pp_size={num_ranks}," in done.stdout
