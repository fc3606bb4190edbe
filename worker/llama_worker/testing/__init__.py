"""An engine without a model: for this package's tests and for yours.

    from llama_worker.testing import fake_worker

    with fake_worker("Hello!", "Goodbye.") as worker:
        assert worker.generate([{"role": "user", "content": "Hi"}]).text == "Hello!"

FakeEngine keeps a KV cache like llama.cpp's, token by token, with the same limits, return codes and
refusals, and its next token depends on everything that the sequence holds: a scheduler that loses,
repeats or mixes up a token produces another text. It is held to the same contract tests as the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from llama_worker._config import ModelConfig, WorkerConfig
from llama_worker._engine.base import EngineLimits, LoadedModel, Loader, ModelInfo, outputs_of
from llama_worker._engine.state import fingerprint
from llama_worker._events import assert_well_formed
from llama_worker._worker import LlamaWorker
from llama_worker.testing._engine import FakeEngine
from llama_worker.testing._faults import Fault, Gate
from llama_worker.testing._tokenizer import CHATML, ByteTokenizer

__all__ = ["ByteTokenizer", "FakeEngine", "Fault", "Gate", "assert_well_formed", "fake_loader", "fake_worker"]


def fake_limits(config: ModelConfig, *, hybrid: bool = False, embedding: bool = False) -> EngineLimits:
    return EngineLimits(
        n_ctx=config.n_kv_cells or config.n_ctx or 4096,
        n_batch=config.n_batch,
        n_ubatch=config.n_ubatch,
        n_seq=config.n_parallel,
        n_outputs=outputs_of(config),
        n_vocab=ByteTokenizer.n_tokens,
        n_embd=16,
        can_trim=not hybrid,
        can_share=not hybrid,
        generates=not embedding,
        embeds=True,
        n_embed_tokens=512,
        n_embed_text=256,
        n_embed_seq=32,
        can_save=not embedding,
        can_trim_restored=not hybrid,
        needs_checkpoints=hybrid,
        n_loras=0 if embedding else 8,
        state_mark=fingerprint(config.model, config.type_k, config.type_v, config.flash_attn, config.swa_full),
    )


def fake_info(config: ModelConfig, *, hybrid: bool = False, embedding: bool = False) -> ModelInfo:
    return ModelInfo(
        name=config.model.rpartition("/")[2],
        path=config.model,
        architecture="fake",
        size=0,
        n_params=0,
        n_vocab=ByteTokenizer.n_tokens,
        n_ctx_train=8192,
        n_embd=16,
        n_layer=1,
        n_head=1,
        n_head_kv=1,
        chat_template=CHATML,
        pooling="mean" if embedding else None,
        is_recurrent=False,
        is_hybrid=hybrid,
        n_swa=0,
        is_embedding=embedding,
        digest=blake2b(config.model.encode(), digest_size=16).hexdigest(),
    )


def fake_loader(
    *replies: str,
    faults: Sequence[Fault] = (),
    gate: Gate | None = None,
    hybrid: bool = False,
    embedding: bool = False,
    seen: Callable[[FakeEngine], Any] | None = None,
) -> Loader:
    """A loader for LlamaWorker(…, loader=…). `seen` is called with each engine that is loaded.

    `hybrid` engines cannot trim or share; `embedding` engines cannot generate. With a `draft_model` there is a second
    engine, for which `seen` is called first; it says what follows from the tokens, and has neither faults nor a gate.
    """

    def load(config: ModelConfig) -> LoadedModel:
        limits = fake_limits(config, hybrid=hybrid, embedding=embedding)
        own = config.of_draft(n_ctx_train=4096)
        draft = None if own is None else FakeEngine(fake_limits(own))
        engine = FakeEngine(limits, replies=replies, faults=list(faults), gate=gate or Gate())
        if seen is not None:
            for each in [engine] if draft is None else [draft, engine]:
                seen(each)
        info = fake_info(config, hybrid=hybrid, embedding=embedding)
        return LoadedModel(engine=engine, vocabulary=ByteTokenizer(), info=info, draft=draft)

    return load


def fake_worker(
    *replies: str,
    loader: Loader | None = None,
    worker_config: WorkerConfig | None = None,
    model: str = "fake://model",
    **config: Any,
) -> LlamaWorker:
    """A LlamaWorker over a FakeEngine that answers with `replies` in turn.

    Without replies the text follows from the prompt's tokens. `config`: fields of ModelConfig.
    """
    return LlamaWorker(ModelConfig(model=model, **config), worker_config, loader=loader or fake_loader(*replies))
