"""Models whose header and tensor list are damaged at random: read, loaded and served, or refused with our error."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from llama_worker import LlamaWorker, ModelConfig, ModelLoadError

pytestmark = pytest.mark.engine

PROGRAM = Path(__file__).with_name("fuzzed_models.py")


def outcomes(first: int, last: int, files: list[Path], program: Path = PROGRAM) -> tuple[Counter[str], list[str]]:
    """How the seeds end, and those at which the process ended or hung: it is started again behind each."""
    seen: Counter[str] = Counter()
    deaths: list[str] = []
    while first < last:
        command = [sys.executable, "-X", "faulthandler", str(program), str(first), str(last), *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
        seen += Counter(line[1] for line in lines if len(line) == 2 and line[1])
        if done.returncode == 0:
            return seen, deaths
        assert lines, done.stderr[-2000:]
        died = int(lines[-1][0])
        deaths.append(f"seed {died}: exit status {done.returncode}: {done.stderr[:1500]}")
        first = died + 1
    return seen, deaths


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("first", "last"), [(0, 50), pytest.param(50, 500, marks=pytest.mark.proof)], ids=["a tenth", "the rest"]
)
def test_no_damaged_model_ends_the_process(
    first: int, last: int, tiny_llama: Path, tiny_swa: Path, tiny_mamba: Path, tiny_lfm2: Path, tiny_bert: Path
):
    seen, deaths = outcomes(first, last, [tiny_llama, tiny_swa, tiny_mamba, tiny_lfm2, tiny_bert])
    assert not deaths, "\n".join(deaths)
    assert seen.total() == last - first
    assert {kind.partition(":")[0] for kind in seen} == {"inspect", "load", "served"}, seen


def test_two_tokens_that_are_the_same_are_refused(tiny_llama: Path, tmp_path: Path):
    """llama.cpp asserts that there are none."""
    check_refused(tiny_llama, b"<0x41>", b"<0x42>", tmp_path, match="tokens are there twice")


def test_a_vocabulary_that_cannot_spell_every_byte_is_refused(tiny_llama: Path, tmp_path: Path):
    """llama.cpp throws through its C interface at a text that needs that byte."""
    check_refused(tiny_llama, b"<0x0A>", b"<0x0a>", tmp_path, match="no token for 1 of the 256 bytes")


def test_a_norm_that_is_not_f32_is_refused(tiny_bert: Path, tmp_path: Path):
    """The CPU aborts when it multiplies with it. The last tensor may shrink without contradicting the others."""
    name = b"blk.1.layer_output_norm.bias"
    one_dimension = name + struct.pack("<IQ", 1, 64)
    check_refused(
        tiny_bert, one_dimension + bytes(4), one_dimension + struct.pack("<I", 1), tmp_path, match="not of type F32"
    )


def check_refused(whole: Path, old: bytes, new: bytes, folder: Path, match: str) -> None:
    data = whole.read_bytes()
    assert old in data
    (folder / "damaged.gguf").write_bytes(data.replace(old, new, 1))
    with pytest.raises(ModelLoadError, match=match):
        LlamaWorker(ModelConfig(model=str(folder / "damaged.gguf"), n_ctx=256, n_threads=1))
