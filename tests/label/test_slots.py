"""How a cluster is divided between scorers and CRF tasks."""

import pytest

from dfa.label.slots import Capacity, Free, Share, derive_slots


@pytest.mark.parametrize(
    ("free", "share"),
    [
        (Free(2, 0), Share()),
        (Free(1, 0), Share()),
        (Free(0.5, 0), Share()),
        (Free(16, 1), Share(use_gpu=True, scorer_gpus=0.25)),
        (Free(7, 8), Share(use_gpu=True)),
        (Free(8, 0), Share(num_scorers=3, scorer_cpus=1.0, crf_cpus=1.0)),
    ],
)
def test_scorers_and_crf_tasks_fit_beside_each_other(free, share):
    slots = derive_slots(free, share)
    left = free.cpus - slots.num_scorers * slots.scorer_cpus
    assert left + 1e-9 >= slots.num_crf * slots.crf_cpus > 0
    assert slots.num_scorers * slots.scorer_gpus <= free.gpus
    assert slots.num_crf >= 1
    assert slots.num_scorers >= 1


def test_no_cpu_is_left_without_a_crf_task():
    assert derive_slots(Free(16, 1), Share(use_gpu=True, scorer_gpus=0.25)).num_crf >= 15
    assert derive_slots(Free(2, 0), Share()).num_crf == 2


def test_four_scorers_share_a_gpu():
    slots = derive_slots(Free(16, 2), Share(use_gpu=True, scorer_gpus=0.25))
    assert (slots.num_scorers, slots.scorer_gpus) == (8, 0.25)


def test_crf_nodes_are_counted_apart():
    slots = derive_slots(Free(4, 1, crf_cpus=64), Share(use_gpu=True, crf_resource="crf"))
    assert (slots.num_scorers, slots.num_crf, slots.crf_cpus) == (1, 64, 1.0)


def test_nodes_that_join_or_leave_change_what_is_counted_with():
    start = Capacity(total=Free(8, 1), free=Free(6, 1))
    assert Capacity(Free(16, 2), Free(0, 0)).grown_since(start) == Free(14, 2)
    assert Capacity(Free(1, 0), Free(0, 0)).grown_since(start) == Free(0, 0)
    assert derive_slots(Free(0, 0), Share(), at_least_one=True).num_scorers == 1


@pytest.mark.parametrize(
    ("free", "share", "message"),
    [
        (Free(0.05, 0), Share(), r"0\.05 CPUs"),
        (Free(4, 0), Share(use_gpu=True), r"0 GPUs free; without a GPU set train\.use_gpu=false"),
        (Free(4, 0, crf_cpus=0), Share(crf_resource="crf"), "resource 'crf'"),
        (Free(2, 0), Share(num_scorers=2, scorer_cpus=1.0), "do not fit on the 2 CPUs"),
        (Free(2, 0), Share(crf_cpus=2.0), "do not fit on the 2 CPUs"),
    ],
)
def test_what_cannot_fit_is_refused_with_both_numbers(free, share, message):
    with pytest.raises(ValueError, match=message):
        derive_slots(free, share)
