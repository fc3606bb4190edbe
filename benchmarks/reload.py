"""What a reload costs: memory at its peak, and the longest pause of a client that keeps asking.

    python -m benchmarks.reload [MODEL ...]
    python -m benchmarks.reload --large      a synthesised model of 1.8 GB, which takes seconds to load

The weights are read, not mapped, so that memory is the process's own. One model is what the process takes
with a model loaded, less what it took before: weights, KV cache, compute buffers, vocabulary and template.
The peak is the kernel's high-water mark, reset just before the reload. A client asks for one token after
another; its longest wait during the reload is compared with the time that loading takes.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from llama_worker import LlamaWorker, ModelConfig, inspect_model

DEFAULT_MODEL: Final = "demo://smollm2-135m-instruct"
MOST_MEMORY: Final = 1.15
LONGEST_PAUSE: Final = 0.25
_MIB: Final = 1024  # KiB, which /proc counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Memory in MiB, times in seconds."""

    model: float
    peak: float
    load: float
    pause: float
    pause_overlapped: float


def measure(model: str) -> Figures:
    config = ModelConfig(model=model, load_mode="none", n_ctx=2048, n_threads=1)
    LlamaWorker(config).close()  # what is done once in a process is no part of a model
    before = _memory("VmRSS")
    with LlamaWorker(config) as worker:
        worker.generate("hello", max_tokens=2)
        one = _memory("VmRSS") - before
        Path("/proc/self/clear_refs").write_text("5")
        worker.reload(n_threads_batch=1)
        peak = _memory("VmHWM") - before
        begun = time.perf_counter()
        worker.reload(config)
        load = time.perf_counter() - begun
        pauses = [_longest_pause(worker, config, overlap=overlap) for overlap in (False, True)]
    return Figures(model=one, peak=peak, load=load, pause=pauses[0], pause_overlapped=pauses[1])


def _memory(name: str) -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / _MIB for line in lines if line.startswith(name))


def _longest_pause(worker: LlamaWorker, config: ModelConfig, *, overlap: bool) -> float:
    waits: list[float] = []
    asking, done = threading.Event(), threading.Event()

    def ask() -> None:
        while not done.is_set():
            begun = time.perf_counter()
            worker.generate("hello", max_tokens=1)
            waits.append(time.perf_counter() - begun)
            asking.set()

    client = threading.Thread(target=ask)
    client.start()
    asking.wait()
    try:
        worker.reload(config, overlap=overlap)
    finally:
        done.set()
        client.join()
    return max(waits)


def shown(model: str, figures: Figures) -> str:
    memory, pause = figures.peak / figures.model, figures.pause_overlapped / figures.load
    return "\n".join(
        [
            f"{inspect_model(model).name}: {figures.model:.1f} MiB, loaded in {figures.load:.2f} s",
            f"  peak of a reload      {figures.peak:8.1f} MiB  {memory:5.2f} × the model (at most {MOST_MEMORY})",
            f"  longest pause         {figures.pause:8.3f} s    {figures.pause / figures.load:5.2f} × the load",
            f"  ... with overlap=True {figures.pause_overlapped:8.3f} s    {pause:5.2f} × the load"
            f" (at most {LONGEST_PAUSE})",
        ]
    )


def main(models: list[str]) -> int:
    """1 when a target is missed."""
    missed = False
    for model in models:
        figures = measure(model)
        print(shown(model, figures))
        missed |= figures.peak > MOST_MEMORY * figures.model
        missed |= figures.pause_overlapped > LONGEST_PAUSE * figures.load
    return int(missed)


def main_large() -> int:
    from tests import synth

    with TemporaryDirectory() as folder:
        return main([str(synth.large_llama(Path(folder) / "large.gguf"))])


if __name__ == "__main__":
    sys.exit(main_large() if sys.argv[1:] == ["--large"] else main(sys.argv[1:] or [DEFAULT_MODEL]))
