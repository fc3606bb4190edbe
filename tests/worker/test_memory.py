"""The memory plan against what llama.cpp then really takes, and what becomes of a model that does not fit."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from llama_worker import (
    ContextOverflowError,
    InsufficientMemoryError,
    LlamaWorker,
    LoraLoadError,
    MemoryPlan,
    ModelConfig,
    ModelInfo,
    ModelLoadError,
    ModelNotFoundError,
    inspect_model,
    plan_memory,
)
from llama_worker._engine.base import LoadedModel
from llama_worker._engine.header import Header
from llama_worker._fitting import fit_to_memory, fitted, plan_of_serving, require_fit
from llama_worker._free_memory import FreeMemory, free_memory, free_ram_bytes
from llama_worker._memory import cells_asked, offloaded_layers, planned
from llama_worker._models import ModelFile, read_model
from llama_worker._snapshots import kept_bytes_of
from llama_worker.testing import fake_loader, fake_worker
from tests import synth_lora
from tests.worker.waiting import in_thread, wait_until

KIB, MIB, GIB = 2**10, 2**20, 2**30
PLENTY = FreeMemory(ram=2**60)


def plan_of(path: Path, **options: Any) -> MemoryPlan:
    return plan_memory(ModelConfig(model=str(path), **options))


# --- a model as its header describes it


def file_of(architecture: str = "llama", *, n_bytes: int = 900 * MIB, **values: Any) -> ModelFile:
    """Eight layers of attention, 1024 wide, 8 heads: 4 KiB of F16 a layer and token. `values`: more keys."""
    sizes = {"n_vocab": 1000, "n_ctx_train": 32768, "n_embd": 1024, "n_layer": 8, "n_head": 8, "n_head_kv": 8}
    info: dict[str, Any] = {"architecture": architecture, "size": n_bytes} | sizes
    info |= {name: values.pop(name) for name in list(values) if name in ModelInfo.__dataclass_fields__}
    flags = {"is_recurrent": False, "is_hybrid": False, "is_embedding": False, "n_swa": 0, "pooling": None}
    shown = {"name": "model", "path": "model.gguf", "n_params": 1, "chat_template": None, "digest": ""}
    keys = {f"{architecture}.{key.replace('__', '.')}": value for key, value in values.items()}
    n_layer: int = info["n_layer"]
    tensors = {f"blk.{layer}.ffn.weight": n_bytes // (n_layer + 1) for layer in range(n_layer)}
    tensors["output.weight"] = n_bytes - sum(tensors.values())
    header = Header(values=keys, lengths={}, n_params=1, n_bytes=n_bytes, tensors=tensors, start=0, end=n_bytes)
    return ModelFile(info=ModelInfo(**(shown | flags | info)), headers=(header,))


def config_of(**options: Any) -> ModelConfig:
    return ModelConfig(model="model.gguf", **({"load_mode": "none"} | options))


def needed(file: ModelFile, config: ModelConfig, **changes: Any) -> MemoryPlan:
    """What `config` with `changes` needs of a machine with one device and room for everything."""
    return planned(file, config.model_copy(update=changes), FreeMemory(ram=2**60, devices=(2**60,)))


class TestTheCache:
    """KV bytes, worked out by hand."""

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"n_ctx": 4096}, 4096 * 32 * KIB),
            ({"n_ctx": 4000}, 4096 * 32 * KIB),
            ({"n_ctx": 4096, "n_kv_cells": 512}, 512 * 32 * KIB),
            ({"n_ctx": 0}, 32768 * 32 * KIB),
            ({"n_ctx": 256, "type_k": "f32", "type_v": "bf16"}, 256 * 48 * KIB),
            ({"n_ctx": 256, "type_k": "q8_0", "type_v": "q8_0"}, 256 * 8 * 2 * 1024 * 34 // 32),
            ({"n_ctx": 256, "type_k": "q4_0", "type_v": "q5_1"}, 256 * 8 * 1024 * (18 + 24) // 32),
        ],
    )
    def test_of_attention(self, options: dict[str, Any], expected: int) -> None:
        assert planned(file_of(), config_of(**options), PLENTY).kv == expected

    def test_of_grouped_heads_and_their_own_widths(self) -> None:
        file = file_of(n_head_kv=2, attention__key_length=64, attention__value_length=32)
        assert planned(file, config_of(n_ctx=256), PLENTY).kv == 256 * 8 * 2 * (64 + 32) * 2

    def test_of_latent_attention_is_one_vector(self) -> None:
        file = file_of(n_head_kv=1, attention__key_length=576, attention__key_length_mla=192)
        assert planned(file, config_of(n_ctx=256), PLENTY).kv == 256 * 8 * 576 * 2

    def test_of_layers_that_borrow_anothers(self) -> None:
        file = file_of(attention__shared_kv_layers=3)
        assert planned(file, config_of(n_ctx=256), PLENTY).kv == 256 * 5 * 4 * KIB

    def test_of_a_sliding_window(self) -> None:
        """Three of four layers keep the window of each sequence and a micro-batch, unless all is kept."""
        file = file_of("gemma3", n_swa=512, attention__sliding_window_pattern=4)
        sparing, whole = (
            planned(file, config_of(n_ctx=8192, n_parallel=2, swa_full=full), PLENTY) for full in (False, True)
        )
        assert sparing.kv == (2 * 8192 + 6 * (2 * 512 + 512)) * 4 * KIB
        assert whole.kv == 8192 * 32 * KIB

    def test_of_a_window_whose_layers_are_listed(self) -> None:
        file = file_of("exaone4", n_swa=256, attention__sliding_window_pattern=(True,) * 7 + (False,))
        memory = planned(file, config_of(n_ctx=8192, n_parallel=1, swa_full=False), PLENTY)
        assert memory.kv == (8192 + 7 * (256 + 512)) * 4 * KIB

    def test_of_a_recurrent_model_are_states_and_no_tokens(self) -> None:
        keys = {"ssm__conv_kernel": 4, "ssm__inner_size": 2048, "ssm__state_size": 16}
        file = file_of("mamba", n_head=0, n_head_kv=0, is_recurrent=True, **keys)
        short, long = (planned(file, config_of(n_ctx=n, n_parallel=3), PLENTY) for n in (256, 65536))
        assert short.kv == long.kv == 3 * 8 * 4 * (3 * 2048 + 16 * 2048)
        assert short.compute == long.compute

    def test_of_a_hybrid_is_both(self) -> None:
        heads = (0, 8, 0, 8, 0, 8, 0, 8)
        file = file_of("lfm2", is_hybrid=True, attention__head_count_kv=heads, shortconv__l_cache=3)
        assert planned(file, config_of(n_ctx=256, n_parallel=4), PLENTY).kv == 256 * 4 * 4 * KIB + 4 * 4 * 2 * 1024 * 4

    def test_without_flash_attention_the_scores_are_buffers_too(self) -> None:
        with_, without = (planned(file_of(), config_of(flash_attn=how), PLENTY).compute for how in ("on", "off"))
        assert without - with_ == 512 * 4096 * (8 * 4 + 2)


class TestEmbedding:
    def test_a_chat_model_shows_it_but_does_not_require_it(self) -> None:
        """A batch of 2048 tokens has 2048 rows of logits in the graph, and 2048 more are returned."""
        memory = planned(file_of(n_vocab=100_000), config_of(), PLENTY)
        assert memory.embedding > 2 * 2048 * 100_000 * 4
        assert memory.needed_ram == memory.weights + memory.kv + memory.compute
        assert memory.total == memory.needed_ram + memory.embedding + memory.saved

    def test_it_says_when_there_is_no_room_for_it(self) -> None:
        file, config = file_of(n_vocab=100_000), config_of()
        tight = planned(file, config, FreeMemory(ram=needed(file, config, n_gpu_layers=0).needed_ram))
        assert tight.fits
        assert "embedding texts would take" in tight.verdict
        assert "embedding" not in planned(file, config, PLENTY).verdict

    def test_a_model_that_only_embeds_requires_it(self) -> None:
        file = file_of("bert", is_embedding=True)
        memory = planned(file, config_of(), PLENTY)
        assert (memory.kv, memory.n_cells) == (0, 0)
        assert memory.needed_ram == memory.total == memory.weights + memory.compute + memory.embedding

    def test_an_encoder_takes_less_than_a_decoder_that_embeds(self) -> None:
        encoder, decoder = (
            planned(file_of(kind, is_embedding=True), config_of(), PLENTY) for kind in ("bert", "qwen3")
        )
        assert encoder.embedding < decoder.embedding

    def test_a_reranker_has_no_such_context(self) -> None:
        file = file_of("bert", is_embedding=True, pooling="rank")
        assert planned(file, config_of(), PLENTY).embedding == 0
        assert planned(file, config_of(pooling="mean"), PLENTY).embedding > 0


class TestAdapters:
    """LoRA adapters are read into memory with the model, so they are part of what must be free."""

    def adapted(self, *sizes: int) -> ModelFile:
        """Adapters that change the same in every layer, and the embedding by as much."""
        names = [*(f"blk.{layer}.ffn.weight.lora_a" for layer in range(8)), "token_embd.weight.lora_a"]
        loras = [
            Header(values={}, lengths={}, n_params=1, n_bytes=9 * n, tensors=dict.fromkeys(names, n), start=0, end=n)
            for n in sizes
        ]
        return replace(file_of(), loras=tuple(loras))

    def test_all_of_them_must_be_free(self) -> None:
        plain, config = needed(file_of(), config_of(), n_gpu_layers=0), config_of(n_gpu_layers=0)
        memory = planned(self.adapted(MIB, 2 * MIB), config, PLENTY)
        assert (plain.loras, memory.loras) == (0, 27 * MIB)
        assert memory.needed_ram - plain.needed_ram == 27 * MIB
        assert memory.total - plain.total == 27 * MIB

    def test_they_go_where_the_layers_go_that_they_change(self) -> None:
        """Of the nine parts (the output is one) the last four go: three layers. The embedding stays."""
        plain, memory = (needed(file, config_of(), n_gpu_layers=4) for file in (file_of(), self.adapted(MIB)))
        assert memory.needed_ram - plain.needed_ram == 6 * MIB
        assert memory.needed_device - plain.needed_device == 3 * MIB

    def test_the_refusal_counts_them(self) -> None:
        file, config = self.adapted(MIB), config_of(n_gpu_layers=0)
        enough = planned(file, config, PLENTY).needed_ram
        assert planned(file, config, FreeMemory(ram=enough)).fits
        memory = planned(file, config, FreeMemory(ram=enough - 1))
        assert not memory.fits
        assert "+ 9.0 MiB LoRA adapters = " in memory.verdict
        assert "fewer lora_paths" in memory.verdict

    def test_the_cache_shrinks_to_make_room_for_them(self) -> None:
        config, file = config_of(), self.adapted(MIB)
        free = FreeMemory(ram=room(file, config, n_ctx=2048))
        assert fitted(file, config, free).n_ctx == 2048
        assert fitted(file_of(), config, free).n_ctx > 2048


class TestSavedStates:
    def test_they_are_shown_but_not_required(self) -> None:
        """They come one by one, up to cache_ram; a model that only embeds saves none."""
        memory, without = (planned(file_of(), config_of(cache_ram=n), PLENTY) for n in (300, 0))
        assert (memory.saved, without.saved) == (300 * MIB, 0)
        assert memory.needed_ram == without.needed_ram
        assert memory.total - without.total == 300 * MIB
        assert planned(file_of("bert", is_embedding=True), config_of(), PLENTY).saved == 0

    def test_it_says_when_there_is_no_room_for_them(self) -> None:
        config = config_of(cache_ram=300, n_gpu_layers=0)
        enough = planned(file_of(), config, PLENTY).needed_ram + 300 * MIB
        exact, tight = (planned(file_of(), config, FreeMemory(ram=n)) for n in (enough, enough - 100 * MIB))
        assert "saved states" not in exact.verdict
        assert "saved states may come to 300.0 MiB, 200.0 MiB are left; lower cache_ram" in tight.verdict
        assert tight.fits


class TestDevices:
    def test_what_goes_to_a_device_is_not_needed_in_ram(self) -> None:
        """Four of the nine parts (the output counts as one): the last three layers keep their cache there."""
        ram = needed(file_of(), config_of(n_ctx=1024), n_gpu_layers=0)
        both = needed(file_of(), config_of(n_ctx=1024), n_gpu_layers=4)
        moved = 400 * MIB + 3 * 1024 * 4 * KIB
        assert ram.needed_ram - both.needed_ram == moved
        assert both.needed_device == moved + both.compute
        assert (ram.needed_device, ram.free_device) == (0, None)

    def test_everything_on_a_device_leaves_buffers(self) -> None:
        memory = needed(file_of(), config_of(), n_gpu_layers=-1)
        assert memory.needed_ram == memory.compute
        assert memory.needed_device == memory.weights + memory.kv + memory.compute

    def test_the_embedding_stays_and_an_output_that_is_tied_to_it_is_a_copy(self) -> None:
        file, config = file_of(), config_of(n_ctx=256)
        [header] = file.headers
        layers = {f"blk.{layer}.ffn.weight": 50 * MIB for layer in range(8)}
        tensors = {"token_embd.weight": 499 * MIB, "output_norm.weight": MIB} | layers
        tied = ModelFile(info=file.info, headers=(replace(header, tensors=tensors),))
        ram, all_off, some_off = (needed(tied, config, n_gpu_layers=n) for n in (0, -1, 3))
        assert all_off.needed_ram == 499 * MIB + all_off.compute
        assert all_off.needed_device == 900 * MIB + all_off.kv + all_off.compute
        assert some_off.needed_device == (500 + 2 * 50) * MIB + 2 * 256 * 4 * KIB + some_off.compute
        assert ram.needed_ram - some_off.needed_ram == (1 + 2 * 50) * MIB + 2 * 256 * 4 * KIB

    def test_the_layers_of_a_real_file(self, smollm2_path: Path) -> None:
        """Its output is tied: one layer more each time, all of one size but for two kinds of quantisation."""
        file = read_model(smollm2_path)
        on_device = [needed(file, config_of(n_ctx=256), n_gpu_layers=n).needed_device for n in range(32)]
        steps = [after - before for before, after in pairwise(on_device)]
        assert steps[0] - needed(file, config_of(n_ctx=256)).compute == pytest.approx(
            file.header.tensors["token_embd.weight"], rel=0.001
        )
        assert max(steps[1:]) < 1.3 * min(steps[1:])
        assert sum(file.header.tensors.values()) == file.header.n_bytes

    def test_the_cache_can_stay(self) -> None:
        memory = needed(file_of(), config_of(offload_kqv=False))
        assert memory.needed_ram == memory.kv + memory.compute
        assert memory.needed_device == memory.weights + memory.compute

    def test_without_devices_no_layer_leaves(self) -> None:
        assert planned(file_of(), config_of(), PLENTY).free_device is None

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, (3, 70)),
            ({"split_mode": "none"}, (1, 40)),
            ({"split_mode": "none", "main_gpu": 2}, (1, 10)),
            ({"split_mode": "none", "main_gpu": 9}, (1, 10)),
            ({"tensor_split": (1.0, 1.0)}, (2, 40)),  # the second has 20, and half of it goes there
            ({"tensor_split": (3.0, 1.0, 0.0)}, (2, 53)),
            ({"tensor_split": (0.0, 0.0)}, (3, 70)),
            ({"tensor_split": (1e308, 1e308, 5e-324)}, (2, 40)),
            ({"n_gpu_layers": 0}, (0, 0)),
        ],
    )
    def test_the_first_device_that_is_full_is_the_limit(
        self, options: dict[str, Any], expected: tuple[int, int]
    ) -> None:
        assert FreeMemory(ram=0, devices=(40, 20, 10)).spread(config_of(**options)) == expected

    def test_every_device_has_buffers_of_its_own(self) -> None:
        one, two = (planned(file_of(), config_of(), FreeMemory(ram=2**60, devices=d)) for d in ((GIB,), (GIB, GIB)))
        assert two.needed_device - one.needed_device == one.compute

    def test_what_another_model_gives_back(self) -> None:
        free = FreeMemory(ram=5, devices=(10, 20)).with_returned(ram=7, device=8)
        assert free == FreeMemory(ram=12, devices=(14, 24))
        assert FreeMemory(ram=5).with_returned(ram=7, device=0) == FreeMemory(ram=12)

    def test_the_verdict_is_about_what_is_short(self) -> None:
        memory = planned(file_of(), config_of(), FreeMemory(ram=2**60, devices=(500 * MIB,)))
        assert not memory.fits
        assert "needed on devices, 500.0 MiB free there" in memory.verdict
        assert "n_gpu_layers" in memory.verdict


def room(file: ModelFile, config: ModelConfig, **changes: Any) -> int:
    """RAM in which `config` with `changes` just fits."""
    return needed(file, config, n_gpu_layers=0, **changes).needed_ram


def device_room(file: ModelFile, config: ModelConfig, **changes: Any) -> int:
    return needed(file, config, **changes).needed_device


class TestFitting:
    """Each free memory is what one known configuration just fits into."""

    @pytest.mark.parametrize(
        ("asked", "room_for", "spare", "given"),
        [
            ({}, {}, 0, {}),
            ({}, {"n_ctx": 2048}, 0, {"n_ctx": 2048}),
            ({}, {"n_ctx": 2048}, -1, {"n_ctx": 1792}),
            ({}, {"n_ctx": 2048}, 3 * MIB, {"n_ctx": 2048}),
            ({"n_ctx": 0}, {"n_ctx": 1024}, 0, {"n_ctx": 1024}),
            ({"n_ctx": 4000}, {"n_ctx": 3840}, 0, {"n_ctx": 3840}),
            ({"n_kv_cells": 8192}, {"n_kv_cells": 6144}, 0, {"n_kv_cells": 6144}),
            ({"n_kv_cells": 8192}, {"n_kv_cells": 2048}, 0, {"n_kv_cells": 2048, "n_ctx": 2048}),
            ({"n_kv_cells": 8192, "n_ctx": 600, "n_ctx_min": 1024}, {"n_kv_cells": 768}, 0, {"n_kv_cells": 768}),
            ({}, {"n_ctx": 512}, 0, {"n_ctx": 512}),
            ({"n_ctx_min": 256}, {"n_ctx": 256}, 0, {"n_ctx": 256}),
            ({"type_k": "q8_0", "type_v": "q8_0"}, {"n_ctx": 3072}, 0, {"n_ctx": 3072}),
        ],
    )
    def test_the_cache_shrinks_to_what_ram_holds(
        self, asked: dict[str, Any], room_for: dict[str, Any], spare: int, given: dict[str, Any]
    ) -> None:
        file, config = file_of(), config_of(**asked)
        free = FreeMemory(ram=room(file, config, **room_for) + spare)
        assert fitted(file, config, free) == config.model_copy(update=given)

    @pytest.mark.parametrize(
        ("asked", "room_for"),
        [
            ({}, {"n_ctx": 256}),
            ({"n_ctx_min": 2048}, {"n_ctx": 1792}),
            ({"n_ctx": 256}, {"n_ctx": 256, "n_parallel": 1}),
            ({"n_kv_cells": 8192, "n_ctx_min": 1000}, {"n_kv_cells": 768}),
        ],
    )
    def test_never_below_the_minimum(self, asked: dict[str, Any], room_for: dict[str, Any]) -> None:
        file, config = file_of(), config_of(**asked)
        with pytest.raises(InsufficientMemoryError, match=r"even at its smallest, does not fit") as refused:
            fitted(file, config, FreeMemory(ram=room(file, config, **room_for)))
        assert refused.value.needed > refused.value.available

    @pytest.mark.parametrize(
        ("asked", "room_for", "given"),
        [
            ({}, {"n_ctx": 1024}, {"n_ctx": 1024}),
            ({}, {"n_ctx": 512, "n_gpu_layers": 5}, {"n_ctx": 512, "n_gpu_layers": 5}),
            ({"n_gpu_layers": 7}, {"n_ctx": 512, "n_gpu_layers": 3}, {"n_ctx": 512, "n_gpu_layers": 3}),
            ({"n_gpu_layers": 7}, {"n_ctx": 768}, {"n_ctx": 768}),
            # The smallest cache is what the user asked for, so layers go at once.
            ({"n_ctx_min": 4096}, {"n_gpu_layers": 4}, {"n_gpu_layers": 4}),
            # The cache stays in RAM, where there is room for it.
            ({"offload_kqv": False}, {"n_gpu_layers": 6}, {"n_gpu_layers": 6}),
        ],
    )
    def test_layers_stay_in_ram_where_the_smallest_cache_is_too_much_for_a_device(
        self, asked: dict[str, Any], room_for: dict[str, Any], given: dict[str, Any]
    ) -> None:
        file, config = file_of(), config_of(**asked)
        free = FreeMemory(ram=2**60, devices=(device_room(file, config, **room_for),))
        # Buffers grow with the cache as well, so they do not tell how large it may be.
        smaller = fitted(file, config, free)
        assert {name: getattr(smaller, name) for name in given} == given
        assert planned(file, smaller, free).fits

    def test_a_full_device_is_not_used(self) -> None:
        config = config_of()
        assert fitted(file_of(), config, FreeMemory(ram=2**60, devices=(0,))) == config.model_copy(
            update={"n_gpu_layers": 0}
        )

    def test_ram_and_device_may_both_be_short(self) -> None:
        file, config = file_of(), config_of()
        device = device_room(file, config, n_ctx=512, n_gpu_layers=4)
        ram = needed(file, config, n_ctx=512, n_gpu_layers=4).needed_ram
        smaller = fitted(file, config, FreeMemory(ram=ram, devices=(device,)))
        assert (smaller.n_ctx, smaller.n_gpu_layers) == (512, 4)
        with pytest.raises(InsufficientMemoryError):
            fitted(file, config, FreeMemory(ram=ram - 1, devices=(device,)))

    @pytest.mark.parametrize(
        "file",
        [
            file_of("bert", is_embedding=True),
            file_of("mamba", n_head=0, n_head_kv=0, is_recurrent=True, ssm__inner_size=2048, ssm__state_size=16),
        ],
        ids=["embedding", "recurrent"],
    )
    def test_a_model_without_a_cache_has_nothing_to_shrink(self, file: ModelFile) -> None:
        config = config_of()
        enough = room(file, config)
        assert fitted(file, config, FreeMemory(ram=enough)) == config
        with pytest.raises(InsufficientMemoryError):
            fitted(file, config, FreeMemory(ram=enough - 1))

    def test_a_hybrid_shrinks_by_its_attention(self) -> None:
        heads = (0, 8, 0, 8, 0, 8, 0, 8)
        file = file_of("lfm2", is_hybrid=True, attention__head_count_kv=heads, shortconv__l_cache=3)
        free = FreeMemory(ram=room(file, config_of(), n_ctx=1280))
        assert fitted(file, config_of(), free).n_ctx == 1280

    def test_a_window_lets_more_fit(self) -> None:
        file = file_of("gemma3", n_swa=512, attention__sliding_window_pattern=4)
        free = FreeMemory(ram=room(file, config_of(swa_full=True, n_parallel=1), n_ctx=2048))
        whole, sparing = (
            fitted(file, config_of(n_ctx=16384, n_parallel=1, swa_full=full), free).n_ctx for full in (True, False)
        )
        assert whole == 2048
        assert sparing > 2048

    @pytest.mark.parametrize("version", [1, 2])
    def test_the_limit_of_a_container_counts_like_ram(self, version: int, tmp_path: Path) -> None:
        file, config = file_of(), config_of()
        limit = room(file, config, n_ctx=1536) + 100 * MIB
        membership = tmp_path / "membership"
        if version == 2:
            membership.write_text("0::/job\n")
            write(tmp_path / "job", memory__max=limit, memory__current=100 * MIB)
        else:
            membership.write_text("4:memory:/job\n")
            names = {"memory__limit_in_bytes": limit, "memory__usage_in_bytes": 100 * MIB}
            write(tmp_path / "memory" / "job", **names)
        free = FreeMemory(ram=free_ram_bytes(tmp_path, membership))
        assert fitted(file, config, free).n_ctx == 1536


files = st.builds(
    file_of,
    st.just("llama"),
    n_bytes=st.integers(1, 4 * GIB),
    n_layer=st.integers(1, 40),
    n_embd=st.sampled_from([64, 1024, 4096]),
    n_head_kv=st.sampled_from([1, 2, 8]),
    n_ctx_train=st.sampled_from([0, 300, 4096, 131072]),
    n_swa=st.sampled_from([0, 512]),
    attention__sliding_window_pattern=st.sampled_from([0, 2, 6]),
) | st.builds(
    file_of,
    st.just("lfm2"),
    is_hybrid=st.just(True),
    n_layer=st.just(4),
    attention__head_count_kv=st.just((0, 8, 0, 8)),
    shortconv__l_cache=st.integers(1, 8),
)
configs = st.builds(
    config_of,
    n_ctx=st.integers(0, 2**17),
    n_kv_cells=st.none() | st.integers(1, 2**18),
    n_ctx_min=st.integers(1, 2**14),
    n_parallel=st.integers(1, 16),
    n_ubatch=st.sampled_from([32, 512]),
    n_gpu_layers=st.integers(-1, 50),
    offload_kqv=st.booleans(),
    swa_full=st.booleans(),
    type_k=st.sampled_from(["f16", "q8_0", "q4_0"]),
    flash_attn=st.sampled_from(["auto", "off"]),
    load_mode=st.sampled_from(["auto", "none"]),
    split_mode=st.sampled_from(["layer", "none"]),
    main_gpu=st.integers(0, 3),
    tensor_split=st.none() | st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)),
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[ModelFile, ModelConfig, FreeMemory]:
    """Memory from nothing to somewhat more than is needed, so that each outcome is met."""
    file, config = draw(files), draw(configs)
    ram, device = room(file, config), device_room(file, config)
    devices = draw(st.lists(st.floats(0, 1.2), max_size=2))
    free = FreeMemory(ram=int(ram * draw(st.floats(0, 1.2))), devices=tuple(int(device * part) for part in devices))
    return file, config, free


def outcome(file: ModelFile, config: ModelConfig, free: FreeMemory) -> ModelConfig | InsufficientMemoryError:
    try:
        return fitted(file, config, free)
    except InsufficientMemoryError as refused:
        return refused


def least_cells(file: ModelFile, config: ModelConfig) -> int:
    asked = cells_asked(file.info, config)
    return min(config.n_ctx_min, config.n_ctx or file.info.n_ctx_train or asked, asked)


class TestFittingAlways:
    @settings(deadline=None)
    @for_all(situations())
    def test_what_is_given_fits_and_is_not_below_the_minimum(
        self, situation: tuple[ModelFile, ModelConfig, FreeMemory]
    ) -> None:
        file, config, free = situation
        given = outcome(file, config, free)
        if planned(file, config, free).fits:
            assert given == config
        elif isinstance(given, ModelConfig):
            assert planned(file, given, free).fits
            assert least_cells(file, config) <= cells_asked(file.info, given) <= cells_asked(file.info, config)
            assert given.n_ctx >= min(config.n_ctx_min, config.n_ctx)
            changed = {"n_ctx", "n_kv_cells", "n_gpu_layers"}
            assert given.model_dump(exclude=changed) == config.model_dump(exclude=changed)

    @settings(deadline=None)
    @for_all(situations())
    def test_what_is_refused_fits_with_no_number_of_layers(
        self, situation: tuple[ModelFile, ModelConfig, FreeMemory]
    ) -> None:
        file, config, free = situation
        refused = outcome(file, config, free)
        if isinstance(refused, InsufficientMemoryError):
            assert refused.needed > refused.available
            asked = offloaded_layers(file.info, config)
            for n_layers in range(asked + 1):
                least = {"n_kv_cells": least_cells(file, config) or None, "n_gpu_layers": n_layers}
                assert not planned(file, config.model_copy(update=least), free).fits

    @settings(deadline=None)
    @for_all(situations())
    def test_no_cell_and_no_layer_more_would_fit(self, situation: tuple[ModelFile, ModelConfig, FreeMemory]) -> None:
        file, config, free = situation
        given, asked = outcome(file, config, free), cells_asked(file.info, config)
        if not isinstance(given, ModelConfig):
            return
        if given.n_gpu_layers != config.n_gpu_layers:
            more = {"n_gpu_layers": given.n_gpu_layers + 1, "n_kv_cells": least_cells(file, config) or None}
            assert not planned(file, given.model_copy(update=more), free).fits
        n_cells = cells_asked(file.info, given)
        if n_cells < asked:
            more = {"n_kv_cells": min(n_cells + 256, asked)}
            assert not planned(file, given.model_copy(update=more), free).fits


# --- the plan and the machine


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
    model: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """Weights and KV to the rounding of the log; compute buffers never less than what is taken."""
    path: Path = request.getfixturevalue(model)
    if model == "tiny_lfm2" and "type_k" in options:
        options = {**options, "type_k": "f32", "type_v": "bf16"}  # its heads are narrower than a q8_0 block
    memory = plan_of(path, n_threads=1, **options)
    with caplog.at_level(logging.DEBUG, "llama_worker.llama_cpp"):
        LlamaWorker(ModelConfig(model=str(path), n_threads=1, **options)).close()
    assert memory.kv / MIB == pytest.approx(allocated(caplog, "KV") + allocated(caplog, "RS"), abs=0.011)
    assert memory.weights / MIB == pytest.approx(allocated(caplog, "model"), abs=0.05)
    tables = 512 * inspect_model(str(path)).n_vocab
    assert 0 < allocated(caplog, "compute") + allocated(caplog, "output") <= (memory.compute - tables) / MIB


@pytest.mark.engine
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_swa", "tiny_mamba", "tiny_lfm2", "tiny_bert", "minilm_path"])
@pytest.mark.parametrize("n_batch", [64, 512, 2048])
def test_the_context_that_embeds_is_no_larger_than_planned(
    model: str, n_batch: int, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(model)
    config = ModelConfig(model=str(path), n_threads=1, n_ctx=512, n_batch=n_batch)
    with LlamaWorker(config) as worker:
        with caplog.at_level(logging.DEBUG, "llama_worker.llama_cpp"):
            worker.embed(["a text"])
    taken = sum(allocated(caplog, kind) for kind in ("KV", "RS", "compute", "output"))
    assert 0 < taken <= plan_of(path, n_batch=n_batch).embedding / MIB


_LOAD = """
import json, pathlib, psutil, re, sys
import llama_worker._engine.llama
from llama_worker import LlamaWorker, ModelConfig, inspect_model
config, embeds = ModelConfig(**json.loads(sys.argv[1])), int(sys.argv[2])
inspect_model(config.model)
before = psutil.Process().memory_info().rss
with LlamaWorker(config) as worker:
    if embeds:
        worker.embed(["a " * embeds])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
print(int(peak[1]) * 1024 - before)
"""


def grown(config: ModelConfig, embeds: int = 0) -> int:
    """Bytes by which a process of its own grows, at most, while it opens `config` and embeds so many tokens."""
    command = [sys.executable, "-c", _LOAD, config.model_dump_json(), str(embeds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


@pytest.mark.engine
class TestTheProcess:
    """What the kernel counts. Compute buffers are reserved whole, but touched as far as a batch fills them."""

    @pytest.mark.parametrize(
        "options",
        [{"n_ctx": 4096}, {"n_ctx": 8192, "n_ubatch": 64}, {"n_ctx": 8192, "type_k": "q8_0", "type_v": "q8_0"}],
        ids=["default", "small batches", "q8_0"],
    )
    def test_grows_as_planned(self, smollm2_path: Path, options: dict[str, Any]) -> None:
        config = ModelConfig(model=str(smollm2_path), load_mode="none", n_threads=1, **options)
        memory, measured = plan_memory(config), grown(config)
        assert 0.9 * measured <= memory.needed_ram <= 1.6 * measured
        assert memory.weights + memory.kv <= measured

    @pytest.mark.parametrize("model", ["tiny_llama", "tiny_swa"])
    def test_also_with_a_long_cache_and_small_weights(self, model: str, request: pytest.FixtureRequest) -> None:
        path: Path = request.getfixturevalue(model)
        config = ModelConfig(model=str(path), load_mode="none", n_threads=1, n_ctx=65536, n_ubatch=32)
        memory, measured = plan_memory(config), grown(config)
        assert 0.9 * measured <= memory.needed_ram <= 1.6 * measured

    def test_grows_by_the_embedding_context_too(self, smollm2_path: Path) -> None:
        """A full batch of a chat model that embeds."""
        options: dict[str, Any] = {"n_ctx": 1024, "n_batch": 512, "cache_ram": 0}
        config = ModelConfig(model=str(smollm2_path), load_mode="none", n_threads=1, **options)
        memory, measured = plan_memory(config), grown(config, embeds=500)
        assert 0.9 * measured <= memory.total <= 1.6 * measured


def test_sliding_windows_take_less_where_the_file_says_which_layers(tiny_swa: Path) -> None:
    """gemma2's file does not, so its plan stays on the high side."""
    assert plan_of(tiny_swa, n_ctx=4096, swa_full=False).kv == plan_of(tiny_swa, n_ctx=4096).kv


def test_an_embedding_model_keeps_no_cache(minilm_path: Path) -> None:
    memory = plan_of(minilm_path)
    assert (memory.kv, memory.n_cells) == (0, 0)
    assert memory.embedding > 0


def test_n_ctx_0_means_the_trained_context(tiny_llama: Path) -> None:
    assert plan_of(tiny_llama, n_ctx=0).n_cells == 4096


def test_mapped_weights_need_not_be_free(smollm2_path: Path) -> None:
    mapped, resident = plan_of(smollm2_path), plan_of(smollm2_path, load_mode="none")
    assert resident.needed_ram == mapped.needed_ram + mapped.weights
    assert (mapped.weights_resident, resident.weights_resident) == (False, True)


def test_a_name_is_planned_with_the_default_configuration(smollm2_path: Path) -> None:
    named, configured = plan_memory(str(smollm2_path)), plan_of(smollm2_path)
    assert replace(named, free_ram=0, verdict="") == replace(configured, free_ram=0, verdict="")
    assert named.verdict.startswith("fits: needs 137.")


def test_a_plan_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        plan_memory(str(tmp_path / "gone.gguf"))


class TestRefusal:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        leave_free(monkeypatch, 64 * 1024 * MIB)

    def test_it_carries_the_arithmetic_and_the_way_out(self, smollm2_path: Path) -> None:
        config = ModelConfig(model=str(smollm2_path), n_ctx=2**24)
        with pytest.raises(InsufficientMemoryError) as refused:
            fit_to_memory(inspect_model(str(smollm2_path)), config)
        text = str(refused.value)
        assert "360.0 GiB KV cache for 16777216 tokens (f16 K, f16 V)" in text
        assert "smaller n_ctx" in text
        assert "fit='auto'" in text
        assert "type_k='q8_0'" in text
        assert refused.value.needed > refused.value.available > 0

    def test_nothing_is_allocated_first(self, smollm2_path: Path) -> None:
        """The worker refuses at once; the process does not grow by a hundredth of what was asked for."""
        before = psutil.Process().memory_info().rss
        with pytest.raises(InsufficientMemoryError):
            LlamaWorker(ModelConfig(model=str(smollm2_path), n_ctx=2**24))
        assert psutil.Process().memory_info().rss - before < 100 * MIB

    def test_what_the_present_model_gives_back_counts(self, smollm2_path: Path) -> None:
        config = ModelConfig(model=str(smollm2_path), n_ctx=2**24)
        info, present = inspect_model(str(smollm2_path)), plan_memory(config)
        require_fit(info, config, replacing=present)
        with pytest.raises(InsufficientMemoryError):
            require_fit(info, config, replacing=replace(present, needed_ram=1))

    def test_so_do_the_states_that_it_has_saved(self, smollm2_path: Path) -> None:
        config = ModelConfig(model=str(smollm2_path), n_ctx=2**24)
        info, present = inspect_model(str(smollm2_path)), replace(plan_memory(config), needed_ram=1)
        require_fit(info, config, replacing=present, kept=2**60)
        with pytest.raises(InsufficientMemoryError):
            require_fit(info, config, replacing=present)

    @pytest.mark.engine
    def test_a_reload_counts_what_its_worker_has_saved(self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With so much free it is let through to the loading, which finds that here nothing becomes free."""
        config = ModelConfig(model=str(tiny_llama), n_ctx=512, n_parallel=1, n_threads=1)
        larger = config.model_copy(update={"n_ctx": 8192})
        with LlamaWorker(config) as worker:
            for letter in "abc":
                worker.generate(letter * 300, max_tokens=1)
            kept = kept_bytes_of(worker._service)
            assert kept
            enough = plan_memory(larger).needed_ram - plan_memory(config).needed_ram - kept
            for free, n_tried in ((enough - 1, 0), (enough, 1)):
                leave_free(monkeypatch, free)
                with pytest.raises(ModelLoadError):
                    worker.reload(larger)
                assert worker.metrics().reloads_failed == n_tried

    def test_a_state_that_a_slot_and_a_saved_sequence_hold_is_counted_once(self, tmp_path: Path) -> None:
        """A sequence that came back stays among those that are saved, with the checkpoints that its slot now has."""
        prompts = ["a" * 300, "b" * 300]
        with fake_worker(loader=fake_loader(hybrid=True), n_ctx=4096, n_parallel=2) as worker:
            for prompt in prompts:
                worker.generate(prompt, max_tokens=1)
            assert worker.export_cache(tmp_path) == 2
        with fake_worker(loader=fake_loader(hybrid=True), n_ctx=4096, n_parallel=2) as worker:
            assert worker.import_cache(tmp_path) == 2
            worker.generate(prompts[0] + "and more", max_tokens=1)
            loaded = worker._service.loaded
            assert loaded is not None
            cache = loaded.scheduler.cache
            in_slots = {checkpoint for slot in cache.slots for checkpoint in slot.checkpoints}
            saved = {checkpoint for entry in cache.tier.entries for checkpoint in entry.checkpoints}
            assert in_slots & saved
            assert saved - in_slots
            whole = sum(entry.state.nbytes + entry.tokens.nbytes for entry in cache.tier.entries)
            partial = sum(checkpoint.state.nbytes for checkpoint in in_slots | saved)
            assert kept_bytes_of(worker._service) == whole + partial

    @pytest.mark.engine
    def test_a_model_that_is_unloaded_gives_nothing_back_any_more(
        self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What it took is free already, so the reload is refused before anything is loaded."""
        config = ModelConfig(model=str(tiny_llama), n_ctx=4096, n_threads=1)
        larger = config.model_copy(update={"n_ctx": 6144})
        with LlamaWorker(config) as worker:
            leave_free(monkeypatch, plan_memory(larger).needed_ram - 1)
            worker.reconfigure(keep_alive=0.0)
            wait_until(lambda: worker.status().state == "unloaded")
            with pytest.raises(InsufficientMemoryError):
                worker.reload(larger)
            assert worker.metrics().reloads_failed == 0

    @pytest.mark.engine
    def test_adapters_are_counted_before_anything_is_loaded(
        self, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And n_ctx shrinks for them, where it may: else the model would be there, and then no room for them."""
        adapter = synth_lora.lora(tmp_path / "adapter.gguf", tiny_llama, rank=32)
        loras = {"lora_paths": {"a": str(adapter), "again": str(adapter)}, "n_threads": 1, "n_ctx": 4096}
        alone, adapted = plan_of(tiny_llama, n_ctx=4096), plan_of(tiny_llama, **loras)
        assert adapted.loras == adapted.needed_ram - alone.needed_ram > 0
        leave_free(monkeypatch, adapted.needed_ram - 1)
        with pytest.raises(InsufficientMemoryError, match="LoRA adapters"):
            LlamaWorker(ModelConfig(model=str(tiny_llama), **loras))
        with LlamaWorker(ModelConfig(model=str(tiny_llama), **loras, fit="auto")) as worker:
            assert worker.n_ctx == 4096 - 256
            assert sorted(worker.loras) == ["a", "again"]

    def test_an_adapter_that_is_not_there_is_named(self, tiny_llama: Path, tmp_path: Path) -> None:
        (tmp_path / "text.gguf").write_bytes(b"no adapter at all")
        for name in ("gone.gguf", "text.gguf"):
            with pytest.raises(LoraLoadError, match=name):
                plan_of(tiny_llama, lora_paths={"a": str(tmp_path / name)})

    def test_a_present_model_whose_file_is_gone_counts_nothing(self, tiny_llama: Path, tmp_path: Path) -> None:
        """Its weights are mapped, so it serves on; that it cannot be planned must not stop a reload."""
        copy = tmp_path / "copy.gguf"
        copy.write_bytes(tiny_llama.read_bytes())
        info, config = inspect_model(str(copy)), ModelConfig(model=str(copy))
        assert plan_of_serving(info, config) is not None
        copy.unlink()
        assert plan_of_serving(info, config) is None

    @pytest.mark.engine
    def test_adapters_whose_file_is_gone_are_given_back_with_their_model(
        self, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are in memory all the same. With a byte less than that the reload is refused."""
        adapter = synth_lora.lora(tmp_path / "adapter.gguf", tiny_llama, rank=32)
        paths = {"a": str(adapter), "again": str(adapter)}
        config = ModelConfig(model=str(tiny_llama), n_ctx=1024, n_threads=1, lora_paths=paths)
        larger = ModelConfig(model=str(tiny_llama), n_ctx=4096, n_threads=1)
        enough = plan_memory(larger).needed_ram - plan_memory(config).needed_ram
        with LlamaWorker(config) as worker:
            adapter.unlink()
            serving = plan_of_serving(worker.info, worker.config, worker.loras.values())
            assert serving is not None
            assert serving.loras == worker.loras["a"].size > 0
            leave_free(monkeypatch, enough - 1)
            with pytest.raises(InsufficientMemoryError):
                worker.reload(larger)
            assert worker.metrics().reloads_failed == 0
            leave_free(monkeypatch, enough)
            with pytest.raises(ModelLoadError):  # by the loading, which finds that here nothing becomes free
                worker.reload(larger)
            assert worker.metrics().reloads_failed == 1

    @pytest.mark.engine
    def test_what_is_being_loaded_is_given_back_to_the_reload_that_supersedes_it(
        self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There is no other model then, so what that one may have taken is all that counts, and no byte more."""
        first, second, third = (
            ModelConfig(model=str(tiny_llama), n_ctx=n_ctx, n_parallel=1, n_threads=1) for n_ctx in (512, 4096, 6144)
        )
        enough = plan_memory(third).needed_ram - plan_memory(second).needed_ram
        reached, go = threading.Event(), threading.Event()

        def hold(fraction: float) -> None:
            reached.set()
            go.wait(60)

        with LlamaWorker(first) as worker:
            superseded = in_thread(lambda: worker.reload(second, progress=hold))
            try:
                assert reached.wait(60)
                leave_free(monkeypatch, enough - 1)
                with pytest.raises(InsufficientMemoryError):
                    worker.reload(third)
                leave_free(monkeypatch, enough)
                reload = worker._reload(third, "drain", None, False, None, {})
            finally:
                leave_free(monkeypatch, 64 * 1024 * MIB)
                go.set()
            assert reload.answer.result(60) is None
            assert "superseded" in str(superseded())
            assert worker.config.n_ctx == 6144

    def test_weights_count_where_they_must_be_resident(self, smollm2_path: Path) -> None:
        config = ModelConfig(model=str(smollm2_path), n_ctx=2**24, load_mode="mlock")
        with pytest.raises(InsufficientMemoryError, match=r"92\.1 MiB weights \+ .*load_mode='mmap'"):
            fit_to_memory(inspect_model(str(smollm2_path)), config)


def leave_free(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """Let the operating system report so much free RAM."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=n_bytes))


class TestFitAuto:
    def test_the_default_refuses(self, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = ModelConfig(model=str(smollm2_path), n_ctx=8192)
        leave_free(monkeypatch, plan_memory(config).needed_ram - 1)
        with pytest.raises(InsufficientMemoryError):
            fit_to_memory(inspect_model(str(smollm2_path)), config)

    def test_it_warns_with_the_numbers(
        self, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = ModelConfig(model=str(smollm2_path), n_ctx=8192, fit="auto")
        leave_free(monkeypatch, plan_of(smollm2_path, n_ctx=2048).needed_ram)
        smaller = fit_to_memory(inspect_model(str(smollm2_path)), config)
        assert smaller == config.model_copy(update={"n_ctx": 2048})
        [record] = [r for r in caplog.records if r.name == "llama_worker"]
        assert record.levelno == logging.WARNING
        assert "n_ctx=2048 instead of 8192; as asked it does not fit: 180.0 MiB KV cache" in record.getMessage()

    def test_it_warns_where_saved_states_would_take_more_than_there_is(
        self, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = ModelConfig(model=str(smollm2_path), cache_ram=1000)
        leave_free(monkeypatch, plan_memory(config).needed_ram + 200 * MIB)
        assert fit_to_memory(inspect_model(str(smollm2_path)), config) == config
        [record] = [r for r in caplog.records if r.name == "llama_worker"]
        assert record.levelno == logging.WARNING
        assert "saved states may come to 1000.0 MiB, 200.0 MiB are left" in record.getMessage()

    def test_a_model_that_fits_is_opened_as_asked_and_nothing_is_said(
        self, smollm2_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = ModelConfig(model=str(smollm2_path), fit="auto")
        assert fit_to_memory(inspect_model(str(smollm2_path)), config) == config
        assert not caplog.records

    def test_a_model_that_comes_back_is_asked_for_as_it_was_at_first(self) -> None:
        """Memory that was short when it was opened may be free by then."""
        load, asked = fake_loader("answer"), []

        def shrinking(config: ModelConfig) -> LoadedModel:
            asked.append((config.model, config.n_ctx))
            if config.model == "fake://broken":
                raise ModelLoadError("broken")
            return replace(load(config), config=config.model_copy(update={"n_ctx": 512}))

        with LlamaWorker(ModelConfig(model="fake://model", n_ctx=2048), loader=shrinking) as worker:
            assert (worker.config.n_ctx, worker.n_ctx) == (512, 512)
            with pytest.raises(ModelLoadError):
                worker.reload(model="fake://broken")
            assert worker.n_ctx == 512
        assert asked == [("fake://model", 2048), ("fake://broken", 2048), ("fake://model", 2048)]

    @pytest.mark.engine
    def test_the_worker_runs_with_what_fits_and_shows_it(
        self, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also after a reload, which asks for too much again."""
        config = ModelConfig(model=str(smollm2_path), n_ctx=8192, n_threads=1, fit="auto")
        leave_free(monkeypatch, plan_of(smollm2_path, n_ctx=768).needed_ram)
        with LlamaWorker(config) as worker:
            assert (worker.config.n_ctx, worker.n_ctx) == (768, 768)
            assert worker.generate("Once", max_tokens=4, temperature=0.0).usage.completion_tokens > 0
            with pytest.raises(ContextOverflowError):
                worker.generate("Once", max_tokens=800)
            worker.reload(n_ctx=4096)
            assert (worker.config.n_ctx, worker.n_ctx) == (768, 768)
            with pytest.raises(InsufficientMemoryError):
                worker.reload(n_ctx=2**20, fit="refuse")
            assert worker.config.n_ctx == 768


# --- what there is


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


class TestFree:
    def test_without_a_control_group_it_is_the_machines(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        leave_free(monkeypatch, 5 * MIB)
        free = free_ram_bytes(tmp_path, tmp_path / "none")
        assert free == 5 * MIB

    def test_free_memory_names_every_device_with_memory_of_its_own(self) -> None:
        free = free_memory()
        assert free.ram > 0
        assert all(n >= 0 for n in free.devices)

    def test_a_version_2_limit_holds_also_from_above(self, tmp_path: Path) -> None:
        """File cache that can be dropped counts as free, and an outer group's limit binds the inner."""
        membership = tmp_path / "membership"
        membership.write_text("0::/outer/inner\n")
        write(tmp_path / "outer", memory__max=300 * MIB, memory__current=250 * MIB)
        write(tmp_path / "outer", memory__stat=f"anon 5\ninactive_file {50 * MIB}")
        write(tmp_path / "outer" / "inner", memory__max="max", memory__current=MIB)
        assert free_ram_bytes(tmp_path, membership) == 100 * MIB

    def test_a_version_1_limit(self, tmp_path: Path) -> None:
        membership = tmp_path / "membership"
        membership.write_text("9:name=systemd:/\n4:cpu,memory:/job\n0::/\n")
        write(
            tmp_path / "memory" / "job",
            memory__limit_in_bytes=64 * MIB,
            memory__usage_in_bytes=60 * MIB,
            memory__stat=f"inactive_file 1\ntotal_inactive_file {20 * MIB}",
        )
        assert free_ram_bytes(tmp_path, membership) == 64 * MIB - 60 * MIB + 1

    def test_a_limit_that_is_overdrawn_leaves_nothing(self, tmp_path: Path) -> None:
        membership = tmp_path / "membership"
        membership.write_text("0::/\n")
        write(tmp_path, memory__max=MIB, memory__current=2 * MIB)
        assert free_ram_bytes(tmp_path, membership) == 0
