"""The postman: letters arrive in order, from many senders, and in a forked child too."""

from __future__ import annotations

import os
import queue
import threading

import pytest

from llama_worker import _postman


def test_letters_arrive_in_the_order_of_each_sender() -> None:
    _postman.start()
    arrived: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

    def send(sender: int) -> None:
        for number in range(200):
            _postman.post(arrived.put, (sender, number))

    senders = [threading.Thread(target=send, args=(sender,)) for sender in range(4)]
    for thread in senders:
        thread.start()
    letters = [arrived.get(timeout=60) for _ in range(800)]
    for thread in senders:
        thread.join()
    assert all([n for s, n in letters if s == sender] == list(range(200)) for sender in range(4))


def test_starting_again_starts_no_second_thread() -> None:
    for _ in range(3):
        _postman.start()
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("llama-worker-postman") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_postman_of_its_own() -> None:
    _postman.start()
    child = os.fork()
    if child == 0:
        arrived: queue.SimpleQueue[str] = queue.SimpleQueue()
        _postman.start()
        _postman.post(arrived.put, "here")
        os._exit(0 if arrived.get(timeout=60) == "here" else 1)
    assert os.waitpid(child, 0)[1] == 0
