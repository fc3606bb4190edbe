"""Retrieval over a small handbook: the answer, and a quote that stands word for word in the best passage.

Usage: llamaindex_rag.py [QUESTION [CORPUS.md [MAX_TOKENS]]]
"""

import re
import sys
from pathlib import Path

from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding
from llama_index.llms.llama_worker import LlamaWorkerLLM

CORPUS = Path(__file__).parent / "data" / "skarrow.md"


def passages(corpus: Path) -> list[TextNode]:
    """One node for each `## heading`, which is its id."""
    sections = corpus.read_text(encoding="utf-8").split("\n## ")[1:]
    return [TextNode(id_=head, text=body.strip()) for head, body in (s.split("\n", 1) for s in sections)]


def best_sentence(question: str, passage: str, embedding: LlamaWorkerEmbedding) -> str:
    """The sentence of `passage` that is nearest to the question, word for word."""
    sentences = re.split(r"(?<=[.!?])\s+", passage)
    target, *vectors = embedding.get_text_embedding_batch([question, *sentences])
    return max(zip(sentences, vectors, strict=True), key=lambda pair: embedding.similarity(target, pair[1]))[0]


def main(question: str = "What do the sheep eat?", corpus: str = str(CORPUS), max_tokens: str = "48") -> None:
    llm = LlamaWorkerLLM(model="demo://smollm2-135m-instruct", temperature=0.0, max_tokens=int(max_tokens))
    embedding = LlamaWorkerEmbedding(model="demo://all-minilm-l6-v2")
    index = VectorStoreIndex(passages(Path(corpus)), embed_model=embedding)
    response = index.as_query_engine(llm=llm, similarity_top_k=1).query(question)
    top = response.source_nodes[0]
    print(f"passage: {top.node_id}")
    print(f"answer:  {response}")
    print(f"quote:   {best_sentence(question, top.text, embedding)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
