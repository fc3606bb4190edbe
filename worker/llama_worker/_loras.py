"""The adapters of the model that is loaded: names and scales become a KVIdentity, and what is loaded at first."""

from __future__ import annotations

from collections.abc import Mapping

from llama_worker._config import ModelConfig
from llama_worker._engine.base import Engine, EngineLimits, LoraInfo
from llama_worker._errors import ConfigError, InvalidRequestError, UnsupportedFeatureError
from llama_worker._identity import KVIdentity
from llama_worker._requests import GenerationRequest


def load_loras(engine: Engine, config: ModelConfig) -> dict[str, LoraInfo]:
    """All adapters that `config` names. The engine's thread. Raises LoraLoadError, ConfigError."""
    if config.lora_paths and not engine.limits.n_loras:
        raise ConfigError("lora_paths", dict(config.lora_paths), "this model only embeds; adapters are for chat models")
    return {name: engine.load_lora(path) for name, path in config.lora_paths}


def chosen(request: GenerationRequest, known: Mapping[str, LoraInfo], limits: EngineLimits) -> KVIdentity:
    """What the KV of `request` is computed with. Raises InvalidRequestError, which says the known names."""
    for name, _ in request.loras:
        if name not in known:
            raise unknown(name, known)
    kv = KVIdentity.of((known[name].digest, scale) for name, scale in request.loras)
    if len(kv.loras) > limits.n_loras:
        hint = f"this model computes with at most {limits.n_loras} at once"
        raise UnsupportedFeatureError(f"loras ({len(kv.loras)} adapters)", hint)
    return kv


def names_of(kv: KVIdentity, known: Mapping[str, LoraInfo]) -> list[str]:
    """The names of the adapters in `kv`, as far as they are known."""
    digests = dict(kv.loras)
    return [name for name, info in known.items() if info.digest in digests]


def are_known(kv: KVIdentity, known: Mapping[str, LoraInfo]) -> bool:
    """Whether each adapter in `kv` is loaded under some name."""
    return not kv.loras or {digest for digest, _ in kv.loras} <= {info.digest for info in known.values()}


def unknown(name: str, known: Mapping[str, LoraInfo]) -> InvalidRequestError:
    names = ", ".join(repr(known_name) for known_name in sorted(known))
    hint = (
        f"the adapters that are loaded are {names}" if known else "no adapter is loaded; use lora_paths or add_lora()"
    )
    return InvalidRequestError("loras", name, hint)
