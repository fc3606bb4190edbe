"""Who is served with which rows, driven step by step on the fake engine, without a thread."""

import pytest

from llama_worker import Finished, Message
from llama_worker.testing import FakeEngine, fake_loader
from tests.worker.bench import Bench

LONG = "x" * 700


def alone(prompt: str, **params: object) -> str:
    """The text that a fresh worker gives to `prompt`."""
    bench = Bench(n_ctx=4096, n_parallel=1).load()
    sink, _ = bench.ask(prompt, **params)
    bench.settle(sink)
    return sink.text


def test_many_at_once_get_what_each_would_get_alone():
    """The fake's next token depends on all that its sequence holds: a mixed-up row changes the text."""
    bench = Bench(n_ctx=4096, n_parallel=4).load()
    prompts = [f"question number {i} " + "pad " * i for i in range(12)]
    sinks = [bench.ask(prompt)[0] for prompt in prompts]
    bench.settle(*sinks)
    assert [sink.text for sink in sinks] == [alone(prompt) for prompt in prompts]


def test_decoding_sequences_go_on_while_a_long_prompt_is_prefilled():
    bench = Bench(n_ctx=8192, n_parallel=2, n_ubatch=32).load()
    talker, _ = bench.ask("hello", max_tokens=200, ignore_eos=True)
    bench.step(3)
    bench.ask("y" * 2000, max_tokens=4)
    before = len(talker.events)
    bench.step(10)
    assert len(talker.events) >= before + 9


def test_prompts_that_share_a_prefix_compute_it_once_even_when_they_start_together():
    bench = Bench(n_ctx=8192, n_parallel=4).load()
    sinks = [bench.ask(LONG + f" agent {i}")[0] for i in range(4)]
    bench.settle(*sinks)
    computed = bench.engine.n_rows - sum(sink.terminal.usage.completion_tokens for sink in sinks)
    assert computed < len(LONG) + 4 * 40
    assert [s.terminal.usage.cached_tokens >= len(LONG) for s in sinks] == [False, True, True, True]
    assert [sink.text for sink in sinks] == [alone(LONG + f" agent {i}") for i in range(4)]


def test_the_next_turn_reuses_the_whole_conversation():
    bench = Bench("first answer", n_ctx=4096).load()
    turn = [Message(role="user", content="hello")]
    first, _ = bench.ask(turn)
    bench.settle(first)
    second, _ = bench.ask([*turn, Message(role="assistant", content=first.text), Message(role="user", content="and?")])
    bench.settle(second)
    usage = first.terminal.usage
    assert second.terminal.usage.cached_tokens >= usage.prompt_tokens + usage.completion_tokens - 1


def test_more_than_fits_is_preempted_and_still_right():
    """Four that need 4 x 160 cells share 256: some lose their slot and compute their tokens again."""
    bench = Bench(n_ctx=256, n_parallel=4).load()
    prompts = [f"{i}" * 60 for i in range(4)]
    sinks = [bench.ask(prompt, max_tokens=100, ignore_eos=True)[0] for prompt in prompts]
    bench.settle(*sinks)
    assert all(isinstance(sink.terminal, Finished) for sink in sinks)
    assert [sink.text for sink in sinks] == [alone(prompt, max_tokens=100, ignore_eos=True) for prompt in prompts]


def test_a_full_engine_that_the_books_did_not_foresee_is_relieved():
    """The engine has fewer cells than it says (fragments, another window): rc 1 is recovered from."""
    engines: list[FakeEngine] = []

    def seen(engine: FakeEngine) -> None:
        engines.append(engine)
        engine.hidden_cells = 300

    bench = Bench(loader=fake_loader(seen=seen), n_ctx=1024, n_parallel=4).load()
    bench.engines = engines
    prompts = [f"{i}" * 150 for i in range(4)]
    sinks = [bench.ask(prompt, max_tokens=60, ignore_eos=True)[0] for prompt in prompts]
    bench.settle(*sinks)
    assert [sink.text for sink in sinks] == [alone(prompt, max_tokens=60, ignore_eos=True) for prompt in prompts]


def test_a_short_prompt_overtakes_a_long_one_and_the_long_one_still_gets_through():
    bench = Bench(n_ctx=16384, n_parallel=3, n_ubatch=32).load()
    slow, _ = bench.ask("z" * 3000, max_tokens=1)
    bench.step(2)
    quick, _ = bench.ask("q" * 40, max_tokens=1)
    bench.settle(quick)
    assert not slow.is_answered
    while not slow.is_answered:
        bench.ask("q" * 30, max_tokens=1)
        bench.step(2)
    assert slow.terminal.usage.prompt_tokens == 3001


def test_a_model_that_cannot_share_or_trim_serves_the_same_texts():
    engines: list[FakeEngine] = []
    bench = Bench(loader=fake_loader(hybrid=True, seen=engines.append), n_ctx=8192, n_parallel=3).load()
    bench.engines = engines
    sinks = [bench.ask(LONG + f" agent {i}")[0] for i in range(5)]
    bench.settle(*sinks)
    assert [sink.text for sink in sinks] == [alone(LONG + f" agent {i}") for i in range(5)]


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_length_is_reached_exactly(max_tokens: int):
    bench = Bench(n_ctx=512).load()
    sink, _ = bench.ask("hello", max_tokens=max_tokens, ignore_eos=True)
    bench.settle(sink)
    assert isinstance(sink.terminal, Finished)
    assert sink.terminal.reason == "length"
    assert sink.terminal.usage.completion_tokens == max_tokens
