"""A user's own images: classes that the data names, and a class list that says more."""

import json
import logging

import pytest
import torch
import yaml
from PIL import Image

from dfa import build
from dfa.build.labelling import seed_images
from dfa.config import class_set, load, to_yaml
from dfa.data import storage
from dfa.data.classes import ClassSet, own_class_set
from dfa.data.planning import plan_shards, write_plan
from dfa.data.samples import Reject, Sample
from dfa.data.shards import read_samples
from dfa.data.writer import finish, write_shard
from dfa.label.images import ShardFile
from dfa.label.scoring import LabelSettings, label_image
from dfa.label.work import Batch, finish_piece, score_batch
from jobs.own import few

COCO = class_set("classes_coco")


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), (9, 99, 199)).save(path)


@pytest.fixture
def photos(tmp_path):
    for name in ("dog/trip/1.jpg", "cat/1.jpg", "traffic_light/1.png", "background/1.jpg", "masks/cat/1.png", "2.jpg"):
        picture(tmp_path / "photos" / name)
    return tmp_path / "photos"


def own(photos, *overrides):
    given = [f"data.root={photos}", f"data.output={photos.parent}/shards", "shards.train=", *overrides]
    return load("own", given)


def test_folders_name_the_classes_and_the_labels(photos):
    config = own(photos)
    classes = build.source_classes(config)
    assert classes.names == ("cat", "dog", "masks", "traffic_light")
    assert classes.prompts == (("cat",), ("dog",), ("masks",), ("traffic light",))
    assert (classes.background, classes.templates) == (COCO.background, COCO.templates)
    found = {sample.key: sample for sample in build.source(config)}
    assert {key: sample.labels for key, sample in found.items() if isinstance(sample, Sample)} == {
        "cat_1": (1,),
        "dog_trip_1": (2,),
        "masks_cat_1": (3,),
        "traffic_light_1": (4,),
    }
    assert "the folder 'background' is no class" in found["background_1"].reason
    assert "lies in no sub-folder" in found["2"].reason
    kept = {sample.key: sample for sample in build.source(own(photos, "data.unlabelled=background"))}
    assert kept["background_1"].labels == kept["2"].labels == ()


def test_a_folder_of_masks_is_no_class(photos):
    assert build.source_classes(own(photos, "data.masks=masks")).names == ("cat", "dog", "traffic_light")


def test_images_without_folders_say_what_to_do(tmp_path):
    picture(tmp_path / "photos/1.jpg")
    with pytest.raises(ValueError, match=r"1 images of .*photos lie in no sub-folder; .*data\.label_file"):
        build.source_classes(own(tmp_path / "photos"))


def test_a_table_names_the_classes(photos):
    table = photos.parent / "labels.csv"
    table.write_text("image,labels\ncat/1.jpg,tabby; red fox\ndog/trip/1.jpg,\n2.jpg,red fox\n")
    config = own(photos, f"data.label_file={table}")
    assert build.source_classes(config).names == ("red fox", "tabby")
    labels = {sample.key: sample.labels for sample in build.source(config) if isinstance(sample, Sample)}
    assert labels == {"cat_1": (1, 2), "2": (1,)}
    with pytest.raises(ValueError, match=r"needs names in .*labels.csv, data.label_kind is index_from_0"):
        build.source_classes(own(photos, f"data.label_file={table}", "data.label_kind=index_from_0"))


def coco_file(photos, **changes):
    document = {
        "images": [{"id": "one", "file_name": "cat/1.jpg"}, {"id": 7, "file_name": "dog/trip/1.jpg"}],
        "categories": [{"id": 900, "name": "zebra fish"}, {"id": 3, "name": "newt"}],
        "annotations": [{"image_id": "one", "category_id": 900}, {"image_id": 7, "category_id": 3}],
    }
    address = photos.parent / "own.json"
    address.write_text(json.dumps(document | changes))
    return ["data.source=coco", f"data.annotations={address}"]


def test_coco_annotations_of_any_categories_and_ids_give_image_level_labels(photos):
    config = own(photos, *coco_file(photos))
    assert build.source_classes(config).names == ("newt", "zebra fish")
    assert [(sample.key, sample.labels) for sample in build.source(config)] == [("cat_1", (2,)), ("dog_trip_1", (1,))]


def test_the_users_class_list_may_order_coco_categories_as_it_likes(photos):
    path = photos.parent / "mine.yaml"
    path.write_text(yaml.safe_dump({"names": ["zebra fish", "newt"], "templates": ["a {}"]}))
    config = own(photos, *coco_file(photos), f"data.classes={path}")
    assert [sample.labels for sample in build.source(config)] == [(1,), (2,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"image_id": 7}]}, r"annotations\[0\] has category_id None; needed is a whole number"),
        ({"annotations": [{"image_id": [7], "category_id": 3}]}, r"annotations\[0\] has image_id \[7\]; .* or text"),
        ({"images": [{"id": 7}]}, r"images\[0\] has file_name None; needed is text"),
        ({"images": ["a.jpg"]}, r"images\[0\] is 'a.jpg', not an object"),
        ({"categories": [{"id": "3", "name": "newt"}]}, r"categories\[0\] has id '3'; needed is a whole number"),
        (
            {"categories": [{"id": 3, "name": "newt"}, {"id": 4, "name": "Newt"}]},
            "own.json names: names lists 'Newt' twice",
        ),
    ],
)
def test_broken_coco_entries_are_named(photos, changes, message):
    with pytest.raises(ValueError, match=message):
        build.source_classes(own(photos, *coco_file(photos, **changes)))


def test_background_prompts_that_a_class_stands_for_are_left_out():
    classes = own_class_set(["Sky", "ground_floor", "background", "land"], like=COCO)
    assert classes.names == ("Sky", "ground_floor", "land")
    assert set(COCO.background) - set(classes.background) == {"sky", "land"}
    with pytest.raises(ValueError, match="text 'red fox' stands for the classes 'red fox' and 'red_fox'"):
        own_class_set(["red fox", "red_fox"], like=COCO)


def test_the_list_beside_the_shards_is_the_users_to_edit(photos):
    config = own(photos)
    with pytest.raises(ValueError, match=r"shards.train and shards.val are empty"):
        build.class_set(config)
    (photos.parent / "shards").mkdir()
    config.shards.val = config.data.output
    with pytest.raises(ValueError, match=r"there is none in .*shards; shard with data.classes=auto"):
        build.class_set(config)
    classes = build.source_classes(config)
    address = build.write_classes(config, classes)
    assert build.class_set(config) == classes
    edited = yaml.safe_load((photos.parent / "shards/classes.yaml").read_text()) | {"background": ["my wall"]}
    (photos.parent / "shards/classes.yaml").write_text(yaml.safe_dump(edited))
    assert build.write_classes(config, classes) == address
    assert build.class_set(config).background == ("my wall",)
    picture(photos / "newt/1.jpg")
    with pytest.raises(ValueError, match=r"classes.yaml lists other classes than the data"):
        build.write_classes(config, build.source_classes(config))
    config.data.classes = "classes_voc"
    assert build.write_classes(config, classes) is None


def test_voc_has_classes_of_its_own(photos):
    with pytest.raises(ValueError, match=r"data\.classes=auto is for data\.source=folder and coco"):
        build.source_classes(own(photos, "data.source=voc"))


def test_every_prompt_and_template_reaches_the_text_bank(tmp_path):
    texts = {"prompts": {"fish": ["kite", "drum"]}, "background": ["sand"], "templates": ["a photo of a {}", "{}"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"names": ["shell", "fish"], **texts}))
    segmenter = build.segmenter(load("demo", [f"data.classes={tmp_path}/mine.yaml"]), torch.device("cpu"))
    clip = segmenter.clip

    def mean(*words):
        sentences = [sentence for word in words for sentence in (f"a photo of a {word}", word)]
        rows = torch.stack([clip.clip.encode_text(clip.tokenizer([one]))[0].double() for one in sentences])
        return torch.nn.functional.normalize(torch.nn.functional.normalize(rows, dim=-1).mean(0), dim=-1)

    with torch.no_grad():
        expected = torch.stack([mean("shell"), mean("kite", "drum"), mean("sand")])
    torch.testing.assert_close(segmenter.bank_KE.double(), expected, rtol=0, atol=1e-5)  # fp32 embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": "cat"}, "names is 'cat'; needed is a list"),
        ({"names": ["cat", False]}, "names holds False, which YAML does not take for text; put it in quotes"),
        ({"prompts": ["cat"]}, r"prompts is \['cat'\]; needed is a mapping"),
    ],
)
def test_a_class_list_of_another_form_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        ClassSet.from_mapping({"names": ["cat", "dog"], "templates": ["a {}."], **change})


def test_a_few_images_are_taken_in_turn_from_each_class_and_rejects_are_kept():
    samples = [Sample(f"a{number}", "", (1, 2)) for number in range(9)] + [
        Sample("b", "", (2,)),
        Reject("r", "", "why"),
    ]
    samples += [Sample("c0", "", (3,)), Sample("c1", "", (3,))]
    taken = list(few(samples, 5))
    assert [one.key for one in taken if isinstance(one, Reject)] == ["r"]
    assert sorted(one.labels for one in taken if isinstance(one, Sample)) == [(1, 2), (1, 2), (2,), (3,), (3,)]
    again = {one.key for one in few(reversed(samples), 5)}
    assert again == {one.key for one in taken}
    assert len(list(few(samples, 100))) == len(samples)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (2, 400), (400, 2)])
def test_images_smaller_than_a_patch_or_of_extreme_shape_get_masks_of_their_own_size(size):
    config = load("demo", ["evaluate.scales=[1.0]"])
    segmenter = build.segmenter(config, torch.device("cpu"))
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (scores,) = seed_images(segmenter, config, [image], [(1, 3)])
    settings = LabelSettings(10, build.crf_settings(config), 1.0, 0.0, ())
    labelled = label_image(image.permute(1, 2, 0).numpy().copy(), scores, None, settings)
    assert labelled.mask_HW.shape == size and set(labelled.mask_HW.reshape(-1).tolist()) <= {0, 1, 3}


def test_a_camera_picture_is_seen_small_and_gets_a_mask_of_its_own_size():
    config = load("demo", ["evaluate.input=long_side", "evaluate.input_size=112", "evaluate.cam_scales=[1.0]"])
    image = torch.randint(0, 256, (3, 1500, 2000), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (scores,) = seed_images(build.segmenter(config, torch.device("cpu")), config, [image], [(2,)])
    assert scores.score_KHW.shape == (2, 1500, 2000)


def test_a_picture_of_too_many_patches_is_left_out_with_the_reason_and_the_others_are_labelled(tmp_path):
    config = load("demo", ["evaluate.cam_scales=[1.0]"])
    samples = []
    for key, size in (("huge", (4000, 3000)), ("small", (64, 48))):
        Image.new("RGB", size, (9, 99, 199)).save(tmp_path / f"{key}.jpg")
        samples.append(Sample(key, str(tmp_path / f"{key}.jpg"), (1,)))
    names = build.class_set(config).names
    plan = plan_shards(
        samples, class_names=names, seed=0, shuffle=False, samples_per_shard=2, max_pixels=config.data.max_pixels
    )
    root = str(tmp_path / "shards")
    write_plan(root, plan)
    write_shard(root, plan.items[0])
    index = finish(root, plan, max_reject_share=0.0)
    built = build.segmenter(config, torch.device("cpu"))

    def score(images, labels):
        return [one for image, present in zip(images, labels, strict=True) for one in each(image, present)]

    def each(image, present):
        return seed_images(built, config, [image], [present])

    part = ShardFile(index.path(index.shards[0].name), index.shards[0].sha256)
    settings = LabelSettings(10, None, 1.0, 0.0, ())
    (piece,) = score_batch(Batch(part, read_samples(index), names, settings, config.data.max_pixels, 8), score)
    (reject,) = piece.rejects
    assert reject.key == "huge" and "500 patches" in reject.reason and "evaluate.input=long_side" in reject.reason
    assert [record.quality.key for record in finish_piece(piece).records] == ["small"]


def test_labels_outside_the_class_list_reject_their_image_and_name_the_nearest(photos, caplog):
    table = photos.parent / "labels.jsonl"
    rows = [{"image": "cat/1.jpg", "labels": ["cat"]}, {"image": "2.jpg", "labels": "cat;dgo"}]
    table.write_text("\n".join(map(json.dumps, rows)))
    (photos.parent / "mine.yaml").write_text(yaml.safe_dump({"names": ["cat", "dog"], "templates": ["a {}"]}))
    with caplog.at_level(logging.WARNING):
        config = own(photos, f"data.label_file={table}", f"data.classes={photos.parent}/mine.yaml")
        found = {sample.key: sample for sample in build.source(config)}
    assert isinstance(found["2"], Reject)
    assert "unknown class 'dgo'; nearest known: 'dog'" in found["2"].reason and "line 2" in found["2"].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image,labels\n2.jpg,cat,dog\n",
            r"line 2 has more cells than the header's \['image', 'labels'\]; a name with a comma needs quotes, and several labels",
        ),
        ("image;labels\n2.jpg;cat\n", r"line 1 has one column, 'image;labels': a \.csv is separated by commas"),
        (
            "file,class\n2.jpg,cat\n",
            r"line 2 has no column 'image'.*data\.image_column and data\.label_column may name",
        ),
    ],
)
def test_a_table_of_another_form_says_what_is_needed(photos, text, message):
    (photos.parent / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        build.source_classes(own(photos, f"data.label_file={photos.parent}/labels.csv"))


def test_a_folder_that_is_not_there_is_named(photos):
    with pytest.raises(ValueError, match=r"no folder of images .*/elsewhere"):
        build.source_classes(own(photos.parent / "elsewhere"))


def test_a_class_list_may_lie_in_an_object_store():
    storage.make_folder("memory://own")
    storage.write_atomic("memory://own/classes.yaml", lambda file: file.write(to_yaml(COCO).encode()))
    assert class_set("memory://own/classes.yaml") == COCO
    config = load("own", ["shards.train=memory://own"])
    assert build.class_set(config) == COCO
