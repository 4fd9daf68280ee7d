"""Class lists and their palette."""

import pytest

from dfa.data.sources import (
    ClassSet,
)
from tests.data.toy_sources import CLASSES, conf_classes


def test_the_class_lists_are_those_of_the_field():
    voc, coco = conf_classes("voc"), conf_classes("coco")
    assert (len(voc.names), len(voc.background), len(coco.names), len(coco.background)) == (20, 25, 80, 23)
    assert voc.names == tuple(sorted(voc.names)) and voc.index("tvmonitor") == 20
    assert coco.index("toothbrush") == 80 and coco.index("stop sign") == 12
    assert set(voc.background) - set(coco.background) == {"keyboard", "sign"}
    assert voc.prompts[14] == ("person with clothes,people,human",)
    assert voc.prompts[0] == ("aeroplane",)
    assert coco.prompts[coco.index("hair drier") - 1] == ("hairdrier,blowdrier",)
    assert voc.templates == coco.templates == ("a clean origami {}.",)


def test_an_unknown_class_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown class 'aroplane'; nearest known: 'aeroplane'"):
        conf_classes("voc").index("aroplane")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["cat", "Cat"]}, "lists 'Cat' twice"),
        ({"names": ["sea lion", "sea  lion "]}, "lists 'sea  lion ' twice"),
        ({"background": ["sky", "Sky "]}, "background lists 'Sky ' twice"),
        ({"names": ["background", "cat"]}, "foreground classes only"),
        ({"names": []}, "1 to 32767 names, got 0"),
        ({"background": ["cat"]}, r"'cat' \(class 'cat'\).*'cat' are class texts and background prompts"),
        ({"background": ["Cat "]}, r"'cat' \(class 'cat'\).*'Cat ' are class texts and background prompts"),
        ({"prompts": {"dog": ["puppy", "CAT"]}}, r"'CAT' stands for the classes 'cat' and 'dog'"),
        ({"templates": ["a photo"]}, "exactly one {}"),
        ({"prompts": {"cta": ["x"]}}, "class 'cta'; nearest in names: 'cat'"),
        ({"prompts": {"cat": []}}, "class 'cat' has no prompt"),
        ({"promts": {}}, "key 'promts'.*nearest: 'prompts'"),
    ],
)
def test_a_broken_class_list_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        ClassSet.from_mapping({"names": ["cat", "dog"], "templates": ["a {}."], **change})


def test_the_palette_is_pascal_voc():
    palette = CLASSES.palette()
    for index in range(256):  # the devkit's bit loop
        color, rest = [0, 0, 0], index
        for shift in range(7, -1, -1):
            for channel in range(3):
                color[channel] |= ((rest >> channel) & 1) << shift
            rest >>= 3
        assert palette[index].tolist() == color
    assert palette[15].tolist() == [192, 128, 128] and palette[255].tolist() == [224, 224, 192]
