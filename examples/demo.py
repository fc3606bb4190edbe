"""Both frameworks on two workers: one LangChain stream, one LlamaIndex answer with its source."""

import sys
from pathlib import Path

from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding
from llama_index.llms.llama_worker import LlamaWorkerLLM

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings
from llama_worker import ModelConfig, get_worker

HANDBOOK = Path(__file__).parent / "data" / "skarrow.md"
QUESTION = "At what time does the ferry leave the mainland?"


def main(max_tokens: int = 64) -> None:
    chat_worker = get_worker(ModelConfig(model="demo://smollm2-135m-instruct"))
    embed_worker = get_worker(ModelConfig(model="demo://all-minilm-l6-v2"))

    print("LangChain, streamed:")
    chat = ChatLlamaWorker(worker=chat_worker, temperature=0, max_tokens=max_tokens)
    for chunk in chat.stream("In one sentence: why do lighthouses have lamps?"):
        print(chunk.text, end="", flush=True)

    print(f"\n\nLlamaIndex, over {HANDBOOK.name}: {QUESTION}")
    sections = HANDBOOK.read_text(encoding="utf-8").split("\n## ")[1:]
    embedding = LlamaWorkerEmbedding(worker=embed_worker)
    index = VectorStoreIndex([TextNode(text=section) for section in sections], embed_model=embedding)
    llm = LlamaWorkerLLM(worker=chat_worker, temperature=0.0, max_tokens=max_tokens)
    response = index.as_query_engine(llm=llm, similarity_top_k=1).query(QUESTION)
    print(response)
    print(f"  source: {response.source_nodes[0].text.strip()!r}")

    same = LlamaWorkerEmbeddings(worker=embed_worker).embed_query(QUESTION) == embedding.get_text_embedding(QUESTION)
    print(f"\nTwo workers served both frameworks; the same question has the same vector in both: {same}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
