"""What a reload costs: memory at its peak, by the kernel's count, and the pause of who asks meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

MOST_MEMORY = 1.15  # of one model

# Weights are read, not mapped, and what is done once in a process is no part of a model.
_RELOADS = """
import sys
from pathlib import Path
from benchmarks.reload import _memory
from llama_worker import LlamaWorker, ModelConfig

configs = [ModelConfig(model=name, load_mode="none", n_ctx=2048, n_threads=1) for name in sys.argv[2:]]
LlamaWorker(configs[0]).close()
before = _memory("VmRSS")
with LlamaWorker(configs[0]) as worker:
    worker.generate("hello", max_tokens=2)
    one = _memory("VmRSS") - before
    for config in configs[1:]:
        Path("/proc/self/clear_refs").write_text("5")
        worker.reload(config, overlap=sys.argv[1] == "overlap")
        print((_memory("VmHWM") - before) / one)
"""


def peaks(how: str, *models: Path) -> list[float]:
    """The peak of each reload from the first model on, in sizes of the first, in a process of its own."""
    command = [sys.executable, "-c", _RELOADS, how, *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return [float(line) for line in done.stdout.splitlines()]


@pytest.fixture
def other_words(smollm2_path: Path, tmp_path: Path) -> Path:
    """The demo model with another vocabulary, so that nothing of the first one serves the second."""
    old, new = "Ġelephant".encode(), "Ġelephanx".encode()
    length, data = len(old).to_bytes(8, "little"), smollm2_path.read_bytes()
    assert length + old in data
    path = tmp_path / "other-words.gguf"
    path.write_bytes(data.replace(length + old, length + new, 1))
    return path


def test_the_peak_of_a_reload_is_that_of_one_model(smollm2_path: Path, other_words: Path):
    """Also when the vocabulary changes, and that of the old model is shown to callers until the new one serves."""
    found = peaks("after", smollm2_path, other_words, smollm2_path)
    print(found)
    assert max(found) <= MOST_MEMORY


def test_the_measure_sees_two_models_in_memory(smollm2_path: Path, other_words: Path):
    assert min(peaks("overlap", smollm2_path, other_words)) > 1.5


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_with_overlap_nobody_waits_a_quarter_of_the_time_that_loading_takes():
    """On a model that takes seconds. Its figures are printed."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.reload", "--large"], stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0
