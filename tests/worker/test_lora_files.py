"""Files that are no LoRA adapter, or none for this model: refused with our error, and the worker serves on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_worker import (
    ConfigError,
    LlamaWorker,
    LoraLoadError,
    ModelConfig,
    ModelLoadError,
    UnsupportedFeatureError,
    inspect_model,
)
from tests import synth_lora
from tests.synth_lora import Pair
from tests.worker.test_fuzz_headers import outcomes

pytestmark = pytest.mark.engine

Q = "blk.0.attn_q.weight"


@pytest.fixture(scope="module")
def worker(tiny_llama: Path) -> Iterator[LlamaWorker]:
    with LlamaWorker(ModelConfig(model=str(tiny_llama), n_ctx=512, n_threads=1)) as worker:
        yield worker


def put(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> Callable[[dict[str, Pair]], None]:
    """Another pair of these shapes, as numpy counts them."""

    def change(pairs: dict[str, Pair]) -> None:
        pairs[name] = np.ones(a, np.float32), np.ones(b, np.float32)

    return change


def halve(which: int) -> Callable[[dict[str, Any]], None]:
    def change(pairs: dict[str, Any]) -> None:
        pairs[Q] = tuple(None if i == which else part for i, part in enumerate(pairs[Q]))

    return change


def integers(pairs: dict[str, Any]) -> None:
    pairs[Q] = tuple(np.ones(part.shape, np.int32) for part in pairs[Q])


def doubles(pairs: dict[str, Any]) -> None:
    pairs[Q] = tuple(part.astype(np.float64) for part in pairs[Q])


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(pairs: dict[str, Any]) -> None:
        pairs[new] = pairs.pop(old)

    return change


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "of another architecture": ({"general__architecture": "qwen2"}, "it is for qwen2 models, this one is llama"),
    "no adapter": ({"general__type": "model"}, "general.type is not 'adapter'"),
    "no type": ({"general__type": None}, "no text general.type"),
    "a type that is a number": ({"general__type": 3}, "no text general.type"),
    "another kind of adapter": ({"adapter__type": "dora"}, "adapter.type is not 'lora'"),
    "a kind that is a list": ({"adapter__type": ["lora"]}, "no text adapter.type"),
    "an alpha that is an integer": ({"adapter__lora__alpha": 4}, "alpha is no number"),
    "an alpha of 64 bits": ({"adapter__lora__alpha": 4.0}, "alpha is no number"),
    "an alpha that is a text": ({"adapter__lora__alpha": "4"}, "alpha is no number"),
    "an alpha that is not finite": ({"adapter__lora__alpha": np.float32("nan")}, "alpha is no number"),
    "an activated one": ({"adapter__alora__invocation_tokens": [1, 2]}, "aLoRA"),
    "half a pair": ({"change": halve(0)}, "one is missing"),
    "the other half": ({"change": halve(1)}, "one is missing"),
    "nothing": ({"matrices": ()}, "changes no matrix"),
    "a matrix that is not there": ({"change": put("blk.99.attn_q.weight", (4, 128), (128, 4))}, "does not have"),
    "too wide": ({"change": put(Q, (4, 256), (128, 4))}, "4x256|256x4.*do not fit"),
    "too high": ({"change": put(Q, (4, 128), (64, 4))}, "do not fit"),
    "two ranks": ({"change": put(Q, (4, 128), (128, 8))}, "do not fit"),
    "not transposed": ({"change": put("blk.0.ffn_up.weight", (128, 4), (4, 256))}, "do not fit"),
    "three dimensions": ({"change": put(Q, (2, 4, 128), (2, 128, 4))}, "do not fit"),
    "four dimensions": ({"change": put(Q, (2, 1, 4, 128), (2, 1, 128, 4))}, "do not fit"),
    "a vector": ({"change": put("blk.0.attn_norm.weight", (4, 128), (128, 4))}, "do not fit"),
    "norms alone": ({"matrices": (), "change": put("blk.0.attn_norm.weight", (4, 128), (1, 4))}, "applies no adapter"),
    "embeddings of another rank": ({"change": put("token_embd.weight", (512, 4), (128, 8))}, "do not fit"),
    "embeddings the other way round": ({"change": put("token_embd.weight", (4, 128), (512, 4))}, "do not fit"),
    "integers": ({"change": integers}, "neither F32"),
    "doubles": ({"change": doubles}, "neither F32"),
    "two suffixes": ({"change": renamed(Q, Q + ".lora_a")}, "neither a lora_a nor"),
    "a name with a hole": ({"change": renamed(Q, "blk.0.attn\0_q.weight")}, "is not one"),
    "a key with a hole": ({"adapter__lora__alpha\0more": 3}, "is not one"),
}


@pytest.mark.parametrize("damage", WRONG, ids=WRONG.keys())
def test_what_is_no_adapter_for_this_model_is_refused(
    damage: str, worker: LlamaWorker, tiny_llama: Path, tmp_path: Path
):
    given, reason = WRONG[damage]
    path = synth_lora.lora(tmp_path / "wrong.gguf", tiny_llama, **given)
    with pytest.raises(LoraLoadError, match=rf"wrong\.gguf.*({reason})"):
        worker.add_lora("wrong", path)
    assert not worker.loras
    assert worker.generate("hello", max_tokens=2).usage.completion_tokens


def test_what_is_not_applied_beside_what_is_warns(
    worker: LlamaWorker, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    change = put("blk.0.attn_norm.weight", (4, 128), (1, 4))
    worker.add_lora("beside", synth_lora.lora(tmp_path / "beside.gguf", tiny_llama, change=change))
    assert "1 norms or others that llama.cpp does not apply" in caplog.text
    assert worker.generate("hello", max_tokens=2, loras="beside").usage.completion_tokens
    worker.remove_lora("beside")


def test_a_model_is_no_adapter(worker: LlamaWorker, tiny_llama: Path, minilm_path: Path):
    for path in (tiny_llama, minilm_path):
        with pytest.raises(LoraLoadError, match="it is no LoRA adapter"):
            worker.add_lora("wrong", path)


def test_an_adapter_is_no_model(tiny_llama: Path, tmp_path: Path):
    path = synth_lora.lora(tmp_path / "style.gguf", tiny_llama)
    with pytest.raises(ModelLoadError, match=r"style\.gguf is an adapter.*lora_paths"):
        inspect_model(str(path))


def test_embeddings_that_are_the_output_matrix_too_are_not_changed(tiny_swa: Path, tmp_path: Path):
    """llama.cpp would multiply with the adapter's matrices in both places, and they fit only one."""
    path = synth_lora.lora(tmp_path / "wrong.gguf", tiny_swa, change=put("token_embd.weight", (512, 4), (128, 4)))
    with (
        LlamaWorker(ModelConfig(model=str(tiny_swa), n_ctx=512, n_threads=1)) as worker,
        pytest.raises(LoraLoadError, match="no matrix of embeddings alone"),
    ):
        worker.add_lora("wrong", path)


def test_embeddings_alone_may_be_changed(worker: LlamaWorker, tiny_llama: Path, tmp_path: Path):
    path = synth_lora.lora(tmp_path / "right.gguf", tiny_llama, change=put("token_embd.weight", (512, 4), (128, 4)))
    worker.add_lora("right", path)
    assert worker.generate("hello", max_tokens=2, loras="right").usage.completion_tokens
    worker.remove_lora("right")


@pytest.mark.parametrize("n_bytes", [0, 3, 24, 200, 5000, -1])
def test_a_file_that_was_cut_off_is_refused(n_bytes: int, worker: LlamaWorker, tiny_llama: Path, tmp_path: Path):
    whole = synth_lora.lora(tmp_path / "whole.gguf", tiny_llama).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:n_bytes])
    with pytest.raises(LoraLoadError, match=r"cut\.gguf"):
        worker.add_lora("wrong", tmp_path / "cut.gguf")


def test_what_is_no_file_is_refused(worker: LlamaWorker, tmp_path: Path):
    (tmp_path / "text.gguf").write_text("This is not it.")
    for path in (tmp_path, tmp_path / "absent.gguf", tmp_path / "text.gguf"):
        with pytest.raises(LoraLoadError, match=r"no such file|no GGUF file"):
            worker.add_lora("wrong", path)
    with pytest.raises(ConfigError, match="lora_paths"):
        worker.add_lora("wrong", "")
    assert not worker.loras


def test_a_model_that_only_embeds_takes_none(tiny_bert: Path, tiny_llama: Path, tmp_path: Path):
    path = synth_lora.lora(tmp_path / "style.gguf", tiny_llama)
    with LlamaWorker(ModelConfig(model=str(tiny_bert), n_threads=1)) as worker:
        with pytest.raises(UnsupportedFeatureError, match="embed"):
            worker.add_lora("style", path)
        assert len(worker.embed(["hello"])) == 1
    with pytest.raises(ConfigError, match=r"lora_paths.*only embeds"):
        LlamaWorker(ModelConfig(model=str(tiny_bert), n_threads=1, lora_paths={"style": path}))


def run_alone(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


RAW = """
import sys
from llama_worker._engine import loras
from llama_worker import LlamaWorker, ModelConfig
model, path = sys.argv[1:]
read = loras.read_lora
loras.require_fit = lambda *_: None
with LlamaWorker(ModelConfig(model=model, n_ctx=512, n_threads=1)) as worker:
    worker.add_lora("wrong", path)
    worker.generate("hello", max_tokens=2, loras="wrong")
"""


def test_unchecked_it_would_end_the_process(tiny_llama: Path, tmp_path: Path):
    """The checks are not for nothing: these matrices llama.cpp takes, and aborts when it multiplies with them."""
    path = synth_lora.lora(tmp_path / "wrong.gguf", tiny_llama, change=WRONG["three dimensions"][0]["change"])
    assert run_alone(RAW, tiny_llama, path).returncode < 0


# --- at random


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("first", "last"), [(0, 60), pytest.param(60, 600, marks=pytest.mark.proof)], ids=["a tenth", "the rest"]
)
def test_no_damaged_adapter_ends_the_process(first: int, last: int, tiny_llama: Path, tmp_path: Path):
    adapter = synth_lora.lora(tmp_path / "style.gguf", tiny_llama)
    seen, deaths = outcomes(first, last, [tiny_llama, adapter], Path(__file__).with_name("fuzzed_loras.py"))
    assert not deaths, "\n".join(deaths)
    assert seen.total() == last - first
    assert set(seen) == {"refused", "served"}, seen
