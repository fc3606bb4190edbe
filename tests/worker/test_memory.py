"""The memory plan against what llama.cpp then really allocates, and the refusal of what cannot fit."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import psutil
import pytest

from llama_worker import InsufficientMemoryError, LlamaWorker, ModelConfig, inspect_model
from llama_worker._memory import MemoryPlan, available_bytes, check_fits, plan

MIB = 2**20


def planned(path: Path, **options: object) -> MemoryPlan:
    return plan(inspect_model(str(path)), ModelConfig(model=str(path), **options))


def allocated(caplog: pytest.LogCaptureFixture, kind: str) -> float:
    """MiB that llama.cpp reported for buffers of one kind."""
    found = (re.search(rf"{kind} buffer size = +([\d.]+) MiB", record.getMessage()) for record in caplog.records)
    return sum(float(match[1]) for match in found if match)


@pytest.mark.engine
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_swa", "tiny_mamba", "tiny_lfm2", "smollm2_path"])
@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": 1000},
        {"n_ctx": 512, "n_kv_cells": 2048, "n_parallel": 2, "n_ubatch": 64},
        {"n_ctx": 1024, "type_k": "q8_0", "type_v": "q8_0", "flash_attn": "on"},
        {"n_ctx": 4096, "flash_attn": "off"},
    ],
    ids=["default", "cells", "q8_0", "no-flash"],
)
def test_the_plan_is_what_llama_cpp_allocates(
    model: str, options: dict[str, object], caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """Weights and KV to the rounding of the log; compute buffers never less than what is taken."""
    path: Path = request.getfixturevalue(model)
    if model == "tiny_lfm2" and "type_k" in options:
        options = {**options, "type_k": "f32", "type_v": "bf16"}  # its heads are narrower than a q8_0 block
    memory = planned(path, n_threads=1, **options)
    with caplog.at_level(logging.DEBUG, "llama_worker.llama_cpp"):
        LlamaWorker(ModelConfig(model=str(path), n_threads=1, **options)).close()
    assert memory.kv / MIB == pytest.approx(allocated(caplog, "KV") + allocated(caplog, "RS"), abs=0.011)
    assert memory.weights / MIB == pytest.approx(allocated(caplog, "model"), abs=0.05)
    assert 0 < allocated(caplog, "compute") <= memory.compute / MIB


def test_sliding_windows_take_less_where_the_file_says_which_layers(tiny_swa: Path) -> None:
    """gemma2's file does not, so its plan stays on the high side."""
    assert planned(tiny_swa, n_ctx=4096, swa_full=False).kv == planned(tiny_swa, n_ctx=4096).kv


def test_an_embedding_model_keeps_no_cache(minilm_path: Path) -> None:
    memory = planned(minilm_path)
    assert (memory.kv, memory.n_cells) == (0, 0)
    assert memory.compute > 0


def test_n_ctx_0_means_the_trained_context(tiny_llama: Path) -> None:
    assert planned(tiny_llama, n_ctx=0).n_cells == 4096


def test_mapped_weights_need_not_be_free(smollm2_path: Path) -> None:
    mapped, resident = planned(smollm2_path), planned(smollm2_path, load_mode="none")
    assert mapped.total == resident.total == resident.needed == mapped.needed + mapped.weights


class TestRefusal:
    def test_it_carries_the_arithmetic_and_the_way_out(self, smollm2_path: Path) -> None:
        config = ModelConfig(model=str(smollm2_path), n_ctx=2**24)
        with pytest.raises(InsufficientMemoryError) as refused:
            check_fits(inspect_model(str(smollm2_path)), config)
        text = str(refused.value)
        assert "360.0 GiB KV cache for 16777216 tokens (f16 K, f16 V)" in text
        assert "smaller n_ctx" in text
        assert "type_k='q8_0'" in text
        assert refused.value.needed > refused.value.available > 0

    def test_nothing_is_allocated_first(self, smollm2_path: Path) -> None:
        """The worker refuses at once; the process does not grow by a hundredth of what was asked for."""
        before = psutil.Process().memory_info().rss
        with pytest.raises(InsufficientMemoryError):
            LlamaWorker(ModelConfig(model=str(smollm2_path), n_ctx=2**24))
        assert psutil.Process().memory_info().rss - before < 100 * MIB

    def test_what_will_be_freed_counts(self, smollm2_path: Path) -> None:
        """A reload may use what the present model gives back."""
        info, config = inspect_model(str(smollm2_path)), ModelConfig(model=str(smollm2_path), n_ctx=2**24)
        needed = plan(info, config).needed
        assert check_fits(info, config, freed=needed).needed == needed

    def test_weights_count_where_they_must_be_resident(self, smollm2_path: Path) -> None:
        config = ModelConfig(model=str(smollm2_path), n_ctx=2**24, load_mode="mlock")
        with pytest.raises(InsufficientMemoryError, match=r"92\.1 MiB weights \+ .*load_mode='mmap'"):
            check_fits(inspect_model(str(smollm2_path)), config)


class TestAvailable:
    def write(self, folder: Path, **files: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(f"{content}\n")

    def test_without_a_control_group_it_is_the_machines(self, tmp_path: Path) -> None:
        free = available_bytes(tmp_path, tmp_path / "none")
        assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)

    def test_a_version_2_limit_holds_also_from_above(self, tmp_path: Path) -> None:
        """File cache that can be dropped counts as free, and an outer group's limit binds the inner."""
        membership = tmp_path / "membership"
        membership.write_text("0::/outer/inner\n")
        self.write(tmp_path / "outer", memory__max=300 * MIB, memory__current=250 * MIB)
        self.write(tmp_path / "outer", memory__stat=f"anon 5\ninactive_file {50 * MIB}")
        self.write(tmp_path / "outer" / "inner", memory__max="max", memory__current=MIB)
        assert available_bytes(tmp_path, membership) == 100 * MIB

    def test_a_version_1_limit(self, tmp_path: Path) -> None:
        membership = tmp_path / "membership"
        membership.write_text("9:name=systemd:/\n4:cpu,memory:/job\n0::/\n")
        self.write(
            tmp_path / "memory" / "job",
            memory__limit_in_bytes=64 * MIB,
            memory__usage_in_bytes=60 * MIB,
            memory__stat=f"inactive_file 1\ntotal_inactive_file {20 * MIB}",
        )
        assert available_bytes(tmp_path, membership) == 64 * MIB - 60 * MIB + 1

    def test_a_limit_that_is_overdrawn_leaves_nothing(self, tmp_path: Path) -> None:
        membership = tmp_path / "membership"
        membership.write_text("0::/\n")
        self.write(tmp_path, memory__max=MIB, memory__current=2 * MIB)
        assert available_bytes(tmp_path, membership) == 0
