"""DeepSpeed is quiet while we call it, and its logger is afterwards as it was."""

import logging

import pytest

from dfa.train.lean_deepspeed import quiet


@pytest.fixture
def logger():
    found = logging.getLogger("DeepSpeed")
    level = found.level
    yield found
    found.setLevel(level)


def test_announcements_are_held_back_and_warnings_pass(logger, caplog):
    logger.addHandler(caplog.handler)  # it does not propagate once DeepSpeed is imported
    with quiet():
        logger.setLevel(logging.INFO)  # as versions of DeepSpeed do when they are imported
        logger.info("configuration")
        logger.warning("something is wrong")
    logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records][:1] == ["something is wrong"]


@pytest.mark.parametrize("level", [logging.DEBUG, logging.ERROR, logging.NOTSET])
def test_the_logger_is_as_before_afterwards(logger, level):
    logger.setLevel(level)
    with quiet():
        pass
    assert (logger.level, logger.filters) == (level, [])


def test_the_logger_is_as_before_after_an_error(logger):
    logger.setLevel(logging.DEBUG)
    with pytest.raises(ValueError, match="no such stage"), quiet():
        raise ValueError("no such stage")
    assert (logger.level, logger.filters) == (logging.DEBUG, [])
