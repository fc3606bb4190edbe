"""The profile that agents and middleware read: what a model can do and how much fits."""

from __future__ import annotations

from typing import Any, cast

from langchain_core.language_models import ModelProfile

from llama_worker import ModelInfo, can_think


def profile_of(
    info: ModelInfo, *, n_ctx: int, max_tokens: int | None, chat_template: str | None = None
) -> ModelProfile:
    """`n_ctx` is what prompt and completion may use together; 0 means the trained context.

    Calls and formats are enforced while they are sampled, so every model that generates can be given tools.
    """
    limit = n_ctx or info.n_ctx_train
    generates = not info.is_embedding
    facts: dict[str, Any] = {
        "name": info.name,
        "open_weights": True,
        "max_input_tokens": limit,
        "max_output_tokens": min(max_tokens or limit, limit),
        "text_inputs": True,
        "image_inputs": False,
        "audio_inputs": False,
        "video_inputs": False,
        "text_outputs": True,
        "image_outputs": False,
        "audio_outputs": False,
        "video_outputs": False,
        "reasoning_output": can_think(info, chat_template),
        "tool_calling": generates,
        "tool_choice": generates,
        "tool_call_streaming": generates,
        "structured_output": generates,
        "image_tool_message": False,
        "pdf_tool_message": False,
        "temperature": True,
    }
    # An older core warns of keys that it does not know.
    return cast("ModelProfile", {key: facts[key] for key in facts if key in ModelProfile.__annotations__})
