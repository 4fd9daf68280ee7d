import json

import open_clip
import pytest

from dfa import config

# METHOD 1.14, 1.19, 1.21, 1.22 and the papers; steps and batch differ between the data sets.
PUBLISHED = {
    "crop.size": 320,
    "crop.scale_min": 0.5,
    "crop.scale_max": 2.0,
    "frequency.mu": 0.4,
    "frequency.window": 9,
    "cam.generator": "transport",
    "cam.lambda_low": 1.0,
    "cam.lambda_high": 0.1,
    "decoder.width": 256,
    "decoder.depth": 3,
    "decoder.heads": 8,
    "decoder.dropout": 0.1,
    "loss.alignment": 0.1,
    "loss.rectification": 0.2,
    "train.learning_rate": 1e-4,
    "train.decoder_rate_scale": 10.0,
    "train.weight_decay": 1e-2,
    "train.warmup_steps": 50,
    "train.decay_power": 1.0,
    "evaluate.scales": [1.0, 1.2, 1.5],
    "evaluate.flip": True,
    "evaluate.merge": "mean",
    "evaluate.input": "native",
    "crf.preset": "deeplab",
    "clip.similarity": "surgery",
    "clip.checkpoint": "openai",
}
RECIPES = {"voc_dfa": (30_000, 4), "coco_dfa": (80_000, 8), "voc_dfa_vitl": (30_000, 4), "coco_dfa_vitl": (80_000, 8)}


def field(loaded, name):
    section, _, key = name.partition(".")
    return getattr(getattr(loaded, section), key)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_settings_and_spells_out_those_that_matter(name):
    loaded, text = config.load(name), (config.CONF / f"{name}.yaml").read_text()
    wanted = PUBLISHED | {"train.steps": RECIPES[name][0], "train.batch_size": RECIPES[name][1]}
    if name.endswith("vitl"):
        wanted["crop.size"] = 322
    assert {key: field(loaded, key) for key in wanted} == wanted
    spelled_out = [key for key in wanted if key != "evaluate.input" and f" {key.partition('.')[2]}: " not in text]
    assert not spelled_out
    assert all(
        word in text for word in ("# Hardware: ", "Hours: not", "jobs.evaluate" if "vitl" not in name else "score")
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_grid_and_blocks_fit_its_encoder(name):
    loaded = config.load(name)
    vision = open_clip.get_model_config(loaded.clip.model)["vision_cfg"]
    assert loaded.crop.size % vision["patch_size"] == 0
    assert loaded.clip.attention_blocks == vision["layers"] * 8 // 12
    assert loaded.clip.surgery_blocks == vision["layers"] * 5 // 12
    assert loaded.clip.checkpoint in open_clip.list_pretrained_tags_by_model(loaded.clip.model)


@pytest.mark.parametrize("name", sorted(path.stem for path in config.CONF.glob("*.yaml") if "classes" not in path.stem))
def test_every_configuration_in_conf_loads(name):
    loaded = config.load(name)
    assert loaded.name == name
    json.dumps(config.to_dict(loaded))


@pytest.mark.parametrize(
    ("name", "num_classes", "num_background"),
    [("classes_voc", 20, 25), ("classes_coco", 80, 23), ("classes_world", 10, 6)],
)
def test_class_lists_have_the_published_sizes(name, num_classes, num_background):
    classes = config.class_set(name)
    assert (len(classes.names), len(classes.background)) == (num_classes, num_background)


def test_overrides_beat_the_file_and_the_file_beats_the_defaults():
    assert config.load("").train.steps == 30_000
    assert config.load("coco_dfa").train.steps == 80_000
    assert config.load("coco_dfa", ["train.steps=7", "evaluate.scales=[1.0]"]).train.steps == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=5", r"unknown key 'train.stpes'; did you mean 'train.steps'"),
        ("trian.steps=5", r"did you mean 'train.steps'"),
        ("train.steps", r"not of the form"),
        ("train.steps=many", r"override train.steps"),
        ("analyze.grids=nine", r"override analyze.grids: a list is expected, as \[a, b\]"),
        ("train.steps=0", r"train.steps is 0, allowed is 1 to"),
        ("clip.similarity=surgry", r"allowed are \['raw', 'value', 'surgery'\]; did you mean 'surgery'"),
    ],
)
def test_a_wrong_override_is_named_with_what_is_allowed(override, message):
    with pytest.raises(ValueError, match=message):
        config.load("demo", [override])


def test_a_typo_in_a_file_names_the_file_and_the_nearest_key(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("crop:\n  siez: 64\n")
    with pytest.raises(ValueError, match=r"mine.yaml: unknown key 'crop.siez'; did you mean 'crop.size'"):
        config.load(str(path))


def test_an_unknown_configuration_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"conf/ has ablations/ladder, .*ablations/world, .*demo"):
        config.load("dmeo")


def test_broken_yaml_and_broken_class_lists_name_their_file(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ValueError, match=r"broken.yaml: not readable as YAML"):
        config.load(str(broken))
    classes = tmp_path / "classes.yaml"
    classes.write_text("names: [cat, cat]\ntemplates: ['{}']\n")
    with pytest.raises(ValueError, match=r"classes.yaml"):
        config.class_set(str(classes))


def test_the_digest_depends_on_every_field():
    first, second = config.load("demo"), config.load("demo", ["cam.threshold=0.41"])
    assert config.digest(first) == config.digest(config.load("demo")) != config.digest(second)


def test_an_override_without_a_value_is_the_empty_text():
    assert config.load("voc_dfa", ["shards.val="]).shards.val == ""
