"""Models for every test: the two demo models, and tiny synthesised ones of each kind of memory."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from llama_worker._models import resolve
from tests import synth


def pytest_sessionstart() -> None:
    """Sync methods of LlamaIndex open an event loop in the main thread, and leave it open, unless told of none."""
    asyncio.set_event_loop(None)
    # A shell's background jobs ignore Ctrl-C, and whoever they start does too: some tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish() -> None:
    """llama_cpp opens two files at import and never closes them; Python would say so after the summary."""
    utils = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        if utils is not None:
            getattr(utils, name).close()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return resolve("demo://smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2_f32(smollm2_path: Path, synth_folder: Path) -> Path:
    """Its weights as F32: 540 MB, written once."""
    return synth.dequantized(smollm2_path, synth_folder / "smollm2-f32.gguf")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    return resolve("demo://all-minilm-l6-v2")


@pytest.fixture(scope="session")
def synth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("synth")


@pytest.fixture(scope="session")
def tiny_llama(synth_folder: Path) -> Path:
    """Plain attention, F32."""
    return synth.llama(synth_folder / "tiny-llama.gguf")


@pytest.fixture(scope="session")
def tiny_llama_q8(synth_folder: Path) -> Path:
    """Plain attention, Q8_0."""
    return synth.llama(synth_folder / "tiny-llama-q8.gguf", weights="q8_0")


@pytest.fixture(scope="session")
def tiny_swa(synth_folder: Path) -> Path:
    """Every other layer sees a sliding window of 64 tokens."""
    return synth.swa(synth_folder / "tiny-swa.gguf")


@pytest.fixture(scope="session")
def tiny_mamba(synth_folder: Path) -> Path:
    """Recurrent: no attention."""
    return synth.mamba(synth_folder / "tiny-mamba.gguf")


@pytest.fixture(scope="session")
def tiny_lfm2(synth_folder: Path) -> Path:
    """Hybrid: short convolutions and attention."""
    return synth.lfm2(synth_folder / "tiny-lfm2.gguf")


@pytest.fixture(scope="session")
def tiny_bert(synth_folder: Path) -> Path:
    """An embedding model."""
    return synth.bert(synth_folder / "tiny-bert.gguf")
