"""Three ways to stop a generation: leave the stream, cancel a scope from elsewhere, set a deadline."""

import sys
import threading

from llama_worker import DeadlineExceeded, GenerationCancelled, LlamaWorker, TextDelta, cancel_scope

STORY = [{"role": "user", "content": "Tell me a very long story about the sea."}]


def main(max_tokens: int = 2000) -> None:
    with LlamaWorker("demo://smollm2-135m-instruct") as worker:
        with worker.stream(STORY, max_tokens=max_tokens, ignore_eos=True) as stream:
            first = next(event for event in stream if isinstance(event, TextDelta))
        print(f"left the stream after {first.text!r}")

        with cancel_scope() as scope:
            threading.Timer(0.2, scope.cancel).start()
            try:
                worker.generate(STORY, max_tokens=max_tokens, ignore_eos=True)
            except GenerationCancelled as cancelled:
                print(f"scope cancelled: {cancelled}")

        try:
            worker.generate(STORY, max_tokens=max_tokens, ignore_eos=True, timeout=0.2)
        except DeadlineExceeded as late:
            print(f"deadline: {late}")

        reply = worker.generate(STORY, max_tokens=8)
        print(
            f"the worker serves on, {reply.usage.cached_tokens} prompt tokens were still in its cache: {reply.text!r}"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
