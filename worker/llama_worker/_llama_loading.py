"""What a worker asks of llama.cpp before and around loading. Nothing of the engine is imported before it is needed."""

from __future__ import annotations

from typing import Literal

from llama_worker import _exit
from llama_worker._chat.template import CHATML, ChatTemplate
from llama_worker._config import ModelConfig
from llama_worker._engine.base import LoadedModel, Loader, ModelInfo
from llama_worker._errors import ConfigError, ModelLoadError, TemplateError
from llama_worker._view import ModelView, template_source


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
    config: ModelConfig, serving: ModelView | None, overlap: bool | Literal["auto"], kept: int | None = 0
) -> bool:
    """Everything that can be known to fail before the old model is let go. Returns whether to overlap.

    `kept`: bytes of saved states that will be free with the old model; None when that is unloaded already.
    Reads the header, milliseconds. Raises ConfigError, and ModelLoadError, which says that the old model serves on.
    """
    try:
        return _checked(config, serving, overlap, kept)
    except ModelLoadError as refused:
        refused.previous_restored = serving is not None
        raise


def check_loras(config: ModelConfig, info: ModelInfo) -> None:
    """Read all adapters of `config` and hold them against the model of `info`. Raises LoraLoadError."""
    from llama_worker._engine.loras import checked_lora

    for _, path in config.lora_paths:
        checked_lora(path, info)


def _checked(config: ModelConfig, serving: ModelView | None, overlap: bool | Literal["auto"], kept: int | None) -> bool:
    from llama_worker._fitting import plan_of_serving, require_fit
    from llama_worker._memory import plan
    from llama_worker._models import read_info, resolve

    info = read_info(resolve(config.model))
    if info.is_embedding and serving is not None and not serving.info.is_embedding:
        raise ModelLoadError(f"{info.name} only embeds, and this worker's callers chat; open another worker for it")
    _check_settings(config, info)
    if config.lora_paths:
        check_loras(config, info)
    if overlap == "auto":
        overlap = plan(info, config).fits
    stays = overlap or kept is None
    former = None if serving is None or stays else plan_of_serving(serving.info, serving.config)
    require_fit(info, config, replacing=former, kept=kept or 0)
    return overlap


def _check_settings(config: ModelConfig, info: ModelInfo) -> None:
    """Raises ConfigError and ModelLoadError for what no model, or not this one, can be served with."""
    if config.flash_attn == "off" and config.type_v not in ("f32", "f16", "bf16"):
        raise ConfigError("type_v", config.type_v, "a quantised V cache needs flash attention, which is off")
    source = template_source(config.chat_template) or info.chat_template
    try:
        ChatTemplate(source or CHATML, bos_text="", eos_text="")
    except TemplateError as refused:
        raise ModelLoadError(str(refused)) from refused
