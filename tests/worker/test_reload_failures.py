"""A reload to what cannot be served: the error says so, and the old model answers the next request."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from llama_worker import (
    ConfigError,
    Finished,
    InsufficientMemoryError,
    LlamaWorker,
    ModelConfig,
    ModelLoadError,
    ModelNotFoundError,
)
from llama_worker.testing import assert_well_formed
from tests.worker.waiting import in_thread, wait_until

pytestmark = pytest.mark.engine

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def chat(tiny_llama: Path, tmp_path: Path) -> Iterator[LlamaWorker]:
    """Serves a file that the test may remove."""
    own = shutil.copy(tiny_llama, tmp_path / "serving.gguf")
    with LlamaWorker(ModelConfig(model=str(own), n_ctx=1024, n_parallel=2, n_threads=1)) as worker:
        yield worker


def missing(folder: Path, whole: Path) -> Path:
    return folder / "missing.gguf"


def truncated(folder: Path, whole: Path) -> Path:
    path = folder / "truncated.gguf"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return path


def replaced(old: bytes, new: bytes) -> Callable[[Path, Path], Path]:
    """The model with some bytes of its header exchanged."""
    assert len(old) == len(new)

    def make(folder: Path, whole: Path) -> Path:
        data = whole.read_bytes()
        assert old in data
        (folder / "damaged.gguf").write_bytes(data.replace(old, new, 1))
        return folder / "damaged.gguf"

    return make


def flipped(old: bytes, bit: int) -> Callable[[Path, Path], Path]:
    """The model with one bit of the byte before `old` flipped."""

    def make(folder: Path, whole: Path) -> Path:
        data = bytearray(whole.read_bytes())
        data[data.index(old) - 1] ^= 1 << bit
        (folder / "flipped.gguf").write_bytes(data)
        return folder / "flipped.gguf"

    return make


def encoder_decoder(folder: Path, whole: Path) -> Path:
    path = folder / "t5.gguf"
    writer = gguf.GGUFWriter(path, "t5")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(512)
    writer.add_relative_attn_buckets_count(32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BAD_MODELS = {
    "a missing file": missing,
    "a truncated file": truncated,
    "another magic number": replaced(b"GGUF", b"GGUE"),
    "a bit flipped in the length of a key": flipped(b"llama.block_count", 3),
    "a bit flipped in the name of a tensor": replaced(b"blk.1.ffn_up", b"blk.1.ffn_uq"),
    "an architecture that nobody knows": replaced(b"llama", b"llamb"),
    "a key that is missing": replaced(b"llama.block_count", b"llama.block_c0unt"),
    "an encoder-decoder model": encoder_decoder,
}


@pytest.mark.parametrize("overlap", [False, True], ids=["after", "overlap"])
@pytest.mark.parametrize("make", BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_the_old_model_answers_the_next_request(
    chat: LlamaWorker, tiny_llama: Path, tmp_path: Path, make: Callable[[Path, Path], Path], overlap: bool
):
    """So does it the one that runs meanwhile, and the tokens are those of before."""
    before = chat.generate(HELLO, max_tokens=8, temperature=0.0, ignore_eos=True).text
    running = chat.stream(HELLO, max_tokens=200, temperature=0.0, ignore_eos=True)
    with pytest.raises(ModelLoadError) as error:
        chat.reload(model=str(make(tmp_path, tiny_llama)), overlap=overlap)
    assert error.value.previous_restored
    assert_serves(chat, before)
    end = assert_well_formed(running)
    assert isinstance(end, Finished)
    assert (end.reason, end.usage.completion_tokens) == ("length", 200)


def assert_serves(worker: LlamaWorker, text: str) -> None:
    """The model of before, and the configuration that was not changed."""
    assert worker.generate(HELLO, max_tokens=8, temperature=0.0, ignore_eos=True).text == text
    assert (worker.config.model.rpartition("/")[2], worker.status().state) == ("serving.gguf", "ready")


SETTINGS = {
    "a template that does not compile": ({"chat_template": "{% for %}"}, ModelLoadError, "template"),
    "a template that is not there": ({"chat_template": "missing.jinja"}, ConfigError, "chat_template"),
    "a quantised V cache without flash attention": ({"type_v": "q8_0", "flash_attn": "off"}, ConfigError, "type_v"),
}


@pytest.mark.parametrize(("changes", "kind", "named"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_cannot_work_are_refused_before_the_old_model_is_let_go(
    chat: LlamaWorker, changes: dict[str, str], kind: type[Exception], named: str
):
    """Nothing is drained and nothing that was computed is lost."""
    before = chat.generate(HELLO, max_tokens=8, temperature=0.0, ignore_eos=True).text
    with pytest.raises(kind, match=named):
        chat.reload(**changes)  # type: ignore[arg-type]
    assert_serves(chat, before)
    assert (chat.status().epoch, chat.metrics().reloads_failed) == (1, 0)
    assert chat.metrics().cached_tokens > 0


@pytest.mark.parametrize(("changes", "kind", "named"), SETTINGS.values(), ids=SETTINGS.keys())
def test_the_same_settings_are_refused_in_the_same_way_when_a_model_is_opened(
    tiny_llama: Path, changes: dict[str, Any], kind: type[Exception], named: str
):
    with pytest.raises(kind, match=named):
        LlamaWorker(ModelConfig(model=str(tiny_llama), n_ctx=512, n_threads=1, **changes))


def test_a_model_that_embeds_is_reloaded_with_whatever_it_was_opened_with(tiny_bert: Path):
    """It has no cells, so their types are nothing to it."""
    with LlamaWorker(ModelConfig(model=str(tiny_bert), n_threads=1, type_v="q8_0", flash_attn="off")) as worker:
        before = worker.embed(["hello"])
        worker.reload(n_batch=256)
        assert worker.embed(["hello"]) == before
        assert worker.status().epoch == 2


def test_a_model_that_only_embeds_is_refused_by_a_worker_that_chats(chat: LlamaWorker, tiny_bert: Path):
    with pytest.raises(ModelLoadError, match="open another worker") as error:
        chat.reload(ModelConfig(model=str(tiny_bert), n_threads=1))
    assert error.value.previous_restored
    assert chat.generate(HELLO, max_tokens=3, ignore_eos=True).usage.completion_tokens == 3


def test_a_worker_that_embeds_takes_another_model_that_embeds(tiny_bert: Path):
    with LlamaWorker(ModelConfig(model=str(tiny_bert), n_threads=1)) as worker:
        before = worker.embed(["hello"])
        worker.reload(pooling="cls")
        assert worker.embed(["hello"]) != before


@pytest.mark.parametrize("overlap", [False, True, "auto"])
def test_a_model_too_large_for_the_memory(chat: LlamaWorker, smollm2_path: Path, overlap: bool):
    before = chat.generate(HELLO, max_tokens=8, temperature=0.0, ignore_eos=True).text
    huge = ModelConfig(model=str(smollm2_path), n_kv_cells=2**26, n_threads=1)
    with pytest.raises(InsufficientMemoryError) as error:
        chat.reload(huge, overlap=overlap)
    assert error.value.previous_restored
    assert error.value.needed > error.value.available
    assert_serves(chat, before)


def reload_behind(worker: LlamaWorker, model: Path) -> Callable[[], object]:
    """A reload that has been checked and waits for a request to end; call the result to let it go on."""
    running = worker.stream(HELLO, max_tokens=900, temperature=0.0, ignore_eos=True)
    next(running)
    reload = in_thread(lambda: worker.reload(model=str(model)))
    wait_until(lambda: worker.status().state == "draining")

    def go_on() -> object:
        running.close()
        return reload()

    return go_on


def test_a_file_that_is_removed_between_the_check_and_the_load(chat: LlamaWorker, tiny_llama_q8: Path, tmp_path: Path):
    before = chat.generate(HELLO, max_tokens=8, temperature=0.0, ignore_eos=True).text
    other = Path(shutil.copy(tiny_llama_q8, tmp_path / "other.gguf"))
    go_on = reload_behind(chat, other)
    other.unlink()
    error = go_on()
    assert isinstance(error, ModelLoadError)
    assert error.previous_restored
    assert_serves(chat, before)


def test_when_both_files_are_gone_requests_are_refused_until_a_reload_mends_it(
    chat: LlamaWorker, tiny_llama: Path, tiny_llama_q8: Path, tmp_path: Path
):
    """The worker lives on without a model, and says why."""
    other = Path(shutil.copy(tiny_llama_q8, tmp_path / "other.gguf"))
    go_on = reload_behind(chat, other)
    other.unlink()
    Path(chat.config.model).unlink()
    error = go_on()
    assert isinstance(error, ModelLoadError)
    assert not error.previous_restored
    assert chat.status().state == "unloaded"
    with pytest.raises(ModelLoadError, match="reload"):
        chat.generate(HELLO)
    with pytest.raises(ModelNotFoundError):
        chat.reload(model=str(other))
    chat.reload(model=str(tiny_llama))
    assert chat.generate(HELLO, max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
