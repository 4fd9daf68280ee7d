"""The gauges of a run, scraped from the endpoint where Prometheus finds them."""

import time
import urllib.request

import pytest
import ray

from dfa.train.gauges import Gauges


def scrape() -> str:
    """What the metrics endpoint of the local node says."""
    (node,) = ray.nodes()
    place = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(place, timeout=10).read().decode()


def values(text: str, name: str, run: str) -> list[float]:
    return [
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(f"ray_{name}{{") and f'run="{run}"' in line
    ]


@pytest.mark.runs  # Ray passes metrics on every few seconds
def test_a_line_of_metrics_is_at_rays_prometheus_endpoint(ray_session: None) -> None:
    gauges = Gauges("s3://bucket/runs/owls?region=eu")
    gauges.write("train", 10, {"images_per_s": 1.0, "loss": 9.0})
    line = {"images_per_s": 123.5, "data_wait": 0.03, "bad": float("nan"), "name": "x", "traffic light": 1.0}
    gauges.write("train", 20, line)
    gauges.write("val", 20, {"miou": 0.5, "iou_cat": 0.25})
    deadline = time.monotonic() + 90
    while not values(text := scrape(), "dfa_val_miou", "owls"):
        if time.monotonic() > deadline:
            pytest.fail("the gauges did not come to the endpoint within 90 s")
        time.sleep(1.0)
    found = {name: values(text, f"dfa_train_{name}", "owls") for name in ("images_per_s", "data_wait", "step", "loss")}
    assert found == {"images_per_s": [123.5], "data_wait": [0.03], "step": [20.0], "loss": [9.0]}
    assert values(text, "dfa_val_miou", "owls") == [0.5]
    assert "dfa_val_iou_cat" not in text and "dfa_train_bad" not in text and "traffic" not in text
    gauges.close()
