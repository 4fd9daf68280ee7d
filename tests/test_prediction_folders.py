"""Which folders `jobs/predict` reads and writes."""

import json
import os

import pytest
from PIL import Image

from dfa import build
from dfa.config import load

CLASSES = build.class_set(load("demo")).names


def test_the_input_is_a_folder_of_images_or_of_shards_of_the_same_classes(tmp_path):
    job = load("demo", [f"run={tmp_path}/run"])
    with pytest.raises(ValueError, match=r"predict\.input is empty"):
        build.prediction_input(job, CLASSES)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for way in (f"{tmp_path}/", f"file://{tmp_path}"):
        job.predict.input = way
        assert build.prediction_input(job, CLASSES).class_names == CLASSES
    job.predict.input = "memory://no/shards"
    with pytest.raises(ValueError, match=r"images at a remote address are read from shards"):
        build.prediction_input(job, CLASSES)
    job.predict.input = str(tmp_path)
    index = {"kind": "dfa-shards", "format": 1, "class_names": ["cat"], "num_samples": 0, "num_rejects": 0}
    (tmp_path / "index.json").write_text(json.dumps({**index, "shards": [], "plan_hash": ""}))
    assert build.prediction_input(job, ("cat",)).num_samples == 0
    with pytest.raises(ValueError, match=r"predict\.input .* has 1 foreground classes \(cat\)"):
        build.prediction_input(job, CLASSES)


def test_the_output_is_named_for_the_input_and_lies_outside_of_it(tmp_path):
    job = load("demo", ["run=runs/mine", f"predict.input={tmp_path}/photos/"])
    assert build.prediction_output(job) == "runs/mine/predict/photos"
    for way in (f"file://{tmp_path}/photos", f"{tmp_path}/other/../photos"):
        job.predict.input = way
        assert build.prediction_output(job) == "runs/mine/predict/photos"
    job.predict.input = "s3://bucket/all/photos/?endpoint_override=127.0.0.1:9000&scheme=http"
    assert build.prediction_output(job) == "runs/mine/predict/photos"
    job.predict.input = f"{tmp_path}/photos"
    job.predict.output = str(tmp_path / "masks")
    assert build.prediction_output(job) == str(tmp_path / "masks")
    job.predict.output = os.path.join(tmp_path, "photos", "masks")
    with pytest.raises(ValueError, match=r"masks lies inside predict\.input"):
        build.prediction_output(job)
