"""docs/options.md has every field of what a user sets, with its true default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from llama_worker import GenerationRequest, ModelConfig, SamplingParams, WorkerConfig
from llama_worker._config import Settings

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", re.MULTILINE)


def rows(heading: str) -> dict[str, str]:
    """The default of each field as the page has it, by name."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = ROW.findall(section)
    names = [name for name, _, _ in found]
    assert len(set(names)) == len(names)
    return {name: default for name, default, _ in found}


def written(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return f"`{json.dumps(default) if isinstance(default, str) else repr(default)}`"


@pytest.mark.parametrize(
    "settings", [ModelConfig, WorkerConfig, SamplingParams], ids=lambda settings: settings.__name__
)
def test_every_field_of_a_setting_is_there_with_its_default(settings: type[Settings]) -> None:
    assert rows(settings.__name__) == {name: written(field) for name, field in settings.model_fields.items()}


def test_every_field_of_a_request_is_there_with_its_default() -> None:
    fields = {name: written(field) for name, field in GenerationRequest.model_fields.items() if name != "params"}
    assert rows("Of a request") == fields


def test_what_embeddings_take_is_there_under_the_names_of_each_way_in() -> None:
    from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding

    from langchain_llama_worker import LlamaWorkerEmbeddings
    from llama_worker import EmbedRequest

    columns = (EmbedRequest, LlamaWorkerEmbeddings, LlamaWorkerEmbedding)
    table = (PAGE.parent / "embeddings.md").read_text(encoding="utf-8").split("\n## What else can be said\n", 1)[1]
    lines = [line.split("|")[1:5] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == 5
    for *cells, default in lines:
        names = [(kind, re.fullmatch(r" `(\w+)` ", cell)) for kind, cell in zip(columns, cells, strict=True)]
        fields = [kind.model_fields[name[1]] for kind, name in names if name and name[1] != "pooling"]
        assert {written(field) for field in fields} <= {default.strip()}
