"""A Ray that is slow to start. Clusters that ask for a token, that died or that nobody knows: tests/test_submission.py."""

import pytest
import ray

from dfa.train.cluster import join_cluster

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.mark.parametrize(("errors", "calls"), [([], 1), ([SLOW], 2), ([SLOW, SLOW], 2), (["no space left"], 1)])
def test_a_slow_start_is_tried_once_more_and_no_other_error_is(errors, calls, monkeypatch):
    made, waiting = [], list(errors)

    def init(**options):
        made.append(options)
        if waiting:
            raise Exception(waiting.pop(0))

    monkeypatch.setattr(ray, "init", init)
    if len(errors) == calls:
        with pytest.raises(Exception, match=errors[-1][:20]):
            join_cluster(2)
    else:
        join_cluster(2)
    assert [each["num_cpus"] for each in made] == [2] * calls
