"""What a worker asks of llama.cpp before and around loading. Nothing of the engine is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llama_worker import _exit
from llama_worker._chat.template import CHATML, ChatTemplate
from llama_worker._config import ModelConfig
from llama_worker._engine.base import LoadedModel, Loader, ModelInfo
from llama_worker._errors import ModelLoadError, TemplateError
from llama_worker._view import ModelView, template_source

if TYPE_CHECKING:
    from llama_worker._memory import MemoryPlan


def load_llama(config: ModelConfig) -> LoadedModel:
    """The loader of every worker that is not given another. Blocks; raises what `LlamaWorker(config)` does."""
    _exit.await_leaving()
    from llama_worker._engine.llama import load  # here, on the loading thread: it loads the shared library

    return load(config)


def contained(loader: Loader) -> Loader:
    """`loader`, on threads whose native crashes are parked."""
    from llama_worker._engine.containment import contained as within

    return within(loader)


def check_reload(
    config: ModelConfig,
    serving: ModelView | None,
    overlap: bool | Literal["auto"],
    kept: int | None = 0,
    coming: ModelConfig | None = None,
) -> bool:
    """Everything that can be known to fail before the old model is let go. Returns whether to overlap.

    `kept`: bytes of saved states that will be free with the old model; None when that is unloaded already.
    `coming`: what is being loaded while there is no model; that ends, and what it has taken will be free.
    Reads the header, milliseconds; with a draft model the tokens of both, some 0.2 s. Raises ConfigError, and
    ModelLoadError, which says that the old model serves on.
    """
    try:
        return _checked(config, serving, overlap, kept, coming)
    except ModelLoadError as refused:
        refused.previous_restored = serving is not None
        raise


def check_loras(config: ModelConfig, info: ModelInfo) -> None:
    """Read all adapters of `config` and hold them against the model of `info`. Raises LoraLoadError."""
    from llama_worker._engine.loras import checked_lora

    for _, path in config.lora_paths:
        checked_lora(path, info)


def _checked(
    config: ModelConfig,
    serving: ModelView | None,
    overlap: bool | Literal["auto"],
    kept: int | None,
    coming: ModelConfig | None,
) -> bool:
    from llama_worker._engine.draft import require_draft, require_same_tokens
    from llama_worker._engine.generator import require_consistent
    from llama_worker._engine.vocabulary import LlamaVocabulary
    from llama_worker._fitting import require_fit
    from llama_worker._memory import plan
    from llama_worker._models import read_info, resolve

    info = read_info(resolve(config.model))
    if info.is_embedding and serving is not None and not serving.info.is_embedding:
        raise ModelLoadError(f"{info.name} only embeds, and this worker's callers chat; open another worker for it")
    require_consistent(config, info)
    drafting = require_draft(config, info)
    if drafting is not None:
        require_same_tokens(config, LlamaVocabulary(Path(info.path)).pieces, LlamaVocabulary(drafting[0]).pieces)
    _check_template(config, info)
    if config.lora_paths:
        check_loras(config, info)
    if overlap == "auto":
        overlap = plan(info, config).fits
    former, states = _given_back(serving, None if overlap else kept, coming)
    require_fit(info, config, replacing=former, kept=states)
    return overlap


def _given_back(
    serving: ModelView | None, kept: int | None, coming: ModelConfig | None
) -> tuple[MemoryPlan | None, int]:
    """What will be free before the next model is loaded, and the bytes of saved states beside it.

    `kept` None: the model that serves stays, or is free already.
    """
    from llama_worker._fitting import plan_of_loading, plan_of_serving

    if coming is not None:
        return plan_of_loading(coming), 0
    if serving is None or kept is None:
        return None, 0
    return plan_of_serving(serving.info, serving.config, serving.loras.values()), kept


def _check_template(config: ModelConfig, info: ModelInfo) -> None:
    """Raises ConfigError where there is no template, and ModelLoadError for one that does not compile."""
    source = template_source(config.chat_template) or info.chat_template
    try:
        ChatTemplate(source or CHATML, bos_text="", eos_text="")
    except TemplateError as refused:
        raise ModelLoadError(str(refused)) from refused
