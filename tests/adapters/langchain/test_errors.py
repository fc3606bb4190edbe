"""An error that leaves the adapter is an instance of llama_worker's class and of langchain_core's."""

import pickle

import pytest
from langchain_core import exceptions as theirs

import llama_worker as ours
from langchain_llama_worker._errors import as_langchain, mapped_errors

OVERFLOW = ours.ContextOverflowError(stage="prompt", resident=0, additional=99, n_ctx=9)


@pytest.mark.parametrize(
    ("error", "counterpart"),
    [
        (OVERFLOW, "ContextOverflowError"),
        (ours.InvalidRequestError("seed", -3, "negative"), "ModelInvalidRequestError"),
        (ours.TemplateError("roles must alternate"), "ModelInvalidRequestError"),
        (ours.UnsupportedFeatureError("tools", "wait"), "ModelInvalidRequestError"),
        (ours.ModelNotFoundError("no such file"), "ModelNotFoundError"),
        (ours.InsufficientMemoryError("too big", needed=2, available=1), "ModelError"),
        (ours.QueueFull(8), "ModelRateLimitError"),
        (ours.DeadlineExceeded(2.0), "ModelTimeoutError"),
        (ours.GenerationError("decode failed"), "ModelAPIError"),
        (ours.InvalidOutputError("not a date"), "ModelAPIError"),
        (ours.WorkerDied("broke"), "ModelConnectionError"),
        (ours.WorkerClosed(), "ModelConnectionError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_both_families_catch_it_and_nothing_is_lost(error: ours.LlamaWorkerError, counterpart: str) -> None:
    with pytest.raises(type(error)) as caught, mapped_errors():
        raise error
    assert isinstance(caught.value, getattr(theirs, counterpart, theirs.LangChainException))
    assert str(caught.value) == str(error)
    assert caught.value.__dict__ == error.__dict__
    assert caught.value.__cause__ is error


def test_the_original_cause_of_a_death_stays_the_cause() -> None:
    cause = MemoryError("native")
    death = ours.WorkerDied("broke")
    death.__cause__ = cause
    with pytest.raises(ours.WorkerDied) as caught, mapped_errors():
        raise death
    assert caught.value.__cause__ is cause


def test_an_error_without_counterpart_passes_unchanged() -> None:
    error = ours.GenerationCancelled()
    with pytest.raises(ours.GenerationCancelled) as caught, mapped_errors():
        raise error
    assert caught.value is error


def test_a_mapped_error_is_not_mapped_again() -> None:
    once = as_langchain(OVERFLOW)
    assert as_langchain(once) is once


def test_a_mapped_error_survives_pickling() -> None:
    twin = pickle.loads(pickle.dumps(as_langchain(OVERFLOW)))
    assert isinstance(twin, theirs.ContextOverflowError)
    assert (twin.additional, twin.n_ctx, str(twin)) == (99, 9, str(OVERFLOW))


def test_other_exceptions_are_none_of_its_business() -> None:
    with pytest.raises(KeyError), mapped_errors():
        raise KeyError("x")
