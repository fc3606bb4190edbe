"""What comes back from a file continues as if it had never been away: bit-equal, also in a new process.

The next turn is decoded in the same batches behind the same cells, so no kernel rounds differently; measured on
tiny models of each kind of memory. That an error of one token would be seen is shown by making it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_worker import inspect_model
from llama_worker._cache_identity import MOST_NOTES, _note_name, note_content, noted_content
from llama_worker._disk_threads import begin
from llama_worker._snapshots import cache_metrics_of
from tests.worker.disk_speaker import speak
from tests.worker.test_checkpoints import MODELS, Run
from tests.worker.test_saved_states import MODELS as FORMS

pytestmark = pytest.mark.engine

HISTORY = "river stone lamp " * 100 + "river"
TURN = HISTORY + " lamp garden" * 10
OTHER = "garden water " * 100


def given(request: pytest.FixtureRequest, kind: str) -> tuple[Path, dict[str, Any]]:
    fixture, config = {**MODELS, "llama q8": FORMS["llama q8"], "smollm2": ("smollm2_path", {})}[kind]
    return request.getfixturevalue(fixture), dict(config)


def elsewhere(tmp_path: Path, model: Path, prompts: list[str], config: dict[str, Any]) -> Any:
    """As `speak`, in a process of its own."""
    out = tmp_path / "out.npz"
    command = [sys.executable, "-m", "tests.worker.disk_speaker", str(model), str(out)]
    subprocess.run([*command, json.dumps(prompts), json.dumps(config)], check=True, timeout=200)
    with np.load(out) as found:
        return {name: found[name] for name in found.files}


KINDS = [*MODELS, "llama q8", pytest.param("smollm2", marks=pytest.mark.proof)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_process_goes_on_where_another_ended(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    """One process answers and ends; another, on the same folder, answers the next turn as the first would have.

    So does a third, with an error of one token, which is noticed.
    """
    model, config = given(request, kind)
    expected, spared, _ = speak(model, [HISTORY, TURN], **config)
    kept, copied = tmp_path / "kept", tmp_path / "copied"
    elsewhere(tmp_path, model, [HISTORY], {**config, "cache_dir": str(kept)})
    shutil.copytree(kept, copied)
    found = elsewhere(tmp_path, model, [TURN], {**config, "cache_dir": str(kept)})
    assert (found["hits"], found["failures"]) == (1, 0)
    assert found["cached"][0] == spared[1] >= 300
    assert np.array_equal(found["rows"][0], expected[1])
    wrong, _, _ = speak(model, [TURN], **config, cache_dir=str(copied), mistake="shifted after restore")
    assert not np.array_equal(wrong[0], expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_process_goes_on_with_an_export(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    """What one process exported another imports; and an error of one token would be seen."""
    model, config = given(request, kind)
    config["cache_ram"] = 64  # in each, for a prompt is cut where a checkpoint is taken
    expected, spared, _ = speak(model, [HISTORY, TURN], **config)
    folder = str(tmp_path / "export")
    speak(model, [HISTORY], **config, exported=folder)
    taken = {**config, "imported": folder}
    found = elsewhere(tmp_path, model, [TURN], taken)
    assert found["cached"][0] == spared[1] >= 300
    assert np.array_equal(found["rows"][0], expected[1])
    wrong, _, _ = speak(model, [TURN], **taken, mistake="shifted after restore")
    assert not np.array_equal(wrong[0], expected[1])


@pytest.mark.parametrize("mistake", [None, "shifted after restore"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_what_was_evicted_goes_on_bit_equal(
    tier: str, kind: str, mistake: Any, request: pytest.FixtureRequest, tmp_path: Path
):
    """In one process, through the eviction of a session by another; and an error of one token would be seen."""
    model, config = given(request, kind)
    config["cache_ram"] = 0 if tier == "disk" else 64  # in both, for a prompt is cut where a checkpoint is taken
    expected, _, _ = speak(model, [HISTORY, TURN], **config)
    kept = {"cache_dir": str(tmp_path)} if tier == "disk" else {}
    run = Run(model, mistake, n_parallel=1, **kept, **config)
    for prompt in (HISTORY, OTHER, TURN):
        begin(lambda: None).result(60)  # what is under way is written, so it is read from the file
        run.answer(prompt, n=1)
    assert np.array_equal(run.logits(), expected[1]) is (mistake is None)
    metrics = cache_metrics_of(run.bench.service)
    assert (metrics.saved_hits, metrics.disk_hits) == ((0, 1) if tier == "disk" else (1, 0))
    run.bench.shut_down()


OTHERS: dict[str, dict[str, Any]] = {
    "KV type": {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": "on"},
    "flash attention": {"flash_attn": "off"},
    "context": {"n_ctx": 4096},
    "base of the rotation": {"rope_freq_base": 50_000.0},
    "scale of the rotation": {"rope_freq_scale": 0.5},
    "template": {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_was_made_with_other_settings_is_never_used(other: str, tiny_llama: Path, tmp_path: Path):
    folder = {"cache_dir": str(tmp_path)}
    speak(tiny_llama, [HISTORY], **folder)
    _, cached, metrics = speak(tiny_llama, [TURN], **folder, **OTHERS[other])
    assert (cached, metrics.disk, metrics.disk_hits, metrics.disk_failures) == ([0], 0, 0, 0)
    _, cached, metrics = speak(tiny_llama, [TURN], **folder)
    assert metrics.disk_hits == 1


def test_a_model_that_differs_in_one_weight_is_another(tiny_llama: Path, tmp_path: Path):
    """Somewhere in its midst, where a digest of samples does not look, and with the same name, size and header."""
    model, folder = tmp_path / "model.gguf", {"cache_dir": str(tmp_path / "kept")}
    model.write_bytes(tiny_llama.read_bytes() + bytes(3 << 20))  # so long that its samples do not cover it
    weights = tiny_llama.stat().st_size * 2 // 3
    info = inspect_model(str(model))
    speak(model, [HISTORY], **folder)
    data = bytearray(model.read_bytes())
    data[weights] ^= 1
    model.write_bytes(data)
    assert inspect_model(str(model)).digest == info.digest
    _, cached, metrics = speak(model, [TURN], **folder)
    assert (cached, metrics.disk) == ([0], 0)


def test_the_model_is_read_for_its_digest_once(tiny_llama: Path, tmp_path: Path):
    speak(tiny_llama, [HISTORY], cache_dir=str(tmp_path))
    (note,) = [path for path in tmp_path.iterdir() if path.suffix == ".model"]
    before = note.stat().st_mtime_ns
    assert speak(tiny_llama, [TURN], cache_dir=str(tmp_path))[2].disk_hits == 1
    assert note.stat().st_mtime_ns == before
    note.write_bytes(b"x" + note.read_bytes()[1:])
    speak(tiny_llama, [TURN], cache_dir=str(tmp_path))
    begin(lambda: None).result(60)
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".kv1"]) == 1, "a damaged note is none"
    assert speak(tiny_llama, [TURN], cache_dir=str(tmp_path))[2].disk_hits == 1


def test_notes_are_the_owners_and_do_not_pile_up(tiny_llama: Path, tmp_path: Path):
    """Nobody's file is written to or removed, whatever is put in the way."""
    model, folder = tmp_path / "model.gguf", tmp_path / "kept"
    model.write_bytes(tiny_llama.read_bytes())
    folder.mkdir()
    others = ["a.model", f"{'0' * 32}.model.backup", f"{'0' * 32}.models"]
    left = f"{'0' * 32}.model.1-{'0' * 16}.tmp"
    for name in [*others, left, *[f"{number:032x}.model" for number in range(MOST_NOTES)]]:
        (folder / name).write_bytes(b"older")
        os.utime(folder / name, (1, 1))
    info = inspect_model(str(model))
    for second in (2, 3):
        os.utime(model, (second, second))
        predictable = folder / f"{_note_name(info)}.{os.getpid()}.tmp"
        (tmp_path / "victim").write_text("precious")
        predictable.symlink_to(tmp_path / "victim")
        note_content(info, folder, b"digest")
        assert noted_content(info, folder) == b"digest"
        assert (folder / _note_name(info)).stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "victim").read_text() == "precious"
        predictable.unlink()
    names = {path.name for path in folder.iterdir()}
    assert set(others) < names
    assert left not in names
    assert len(names) == len(others) + MOST_NOTES


def test_an_embedding_model_takes_a_folder_and_leaves_it_alone(tiny_bert: Path, tmp_path: Path):
    run = Run(tiny_bert, cache_dir=str(tmp_path / "kept"))
    run.bench.shut_down()
    assert not (tmp_path / "kept").exists()
