"""A LangChain chat model that streams its answer, then reports exactly what it cost."""

import sys

from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage

from langchain_llama_worker import ChatLlamaWorker

MESSAGES = [
    SystemMessage("You answer in one or two short sentences."),
    HumanMessage("What does a lighthouse keeper do?"),
]


def main(max_tokens: int = 48) -> None:
    chat = ChatLlamaWorker(model="demo://smollm2-135m-instruct", temperature=0, max_tokens=max_tokens)
    answer = AIMessageChunk(content="")
    for chunk in chat.stream(MESSAGES):
        print(chunk.text, end="", flush=True)
        answer += chunk
    print(f"\n{answer.usage_metadata}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
