"""The world on disk as a VOCdevkit folder, so that the reader of PASCAL VOC serves it unchanged."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image

from dfa.data.classes import voc_palette
from dfa.data.transforms import encode_mask
from dfa.world.scenes import CLASSES, SIZE, Scene, draw


def write_voc(root: Path, *, seed: int, num_train: int, num_val: int) -> Path:
    """Draw `num_train` + `num_val` scenes of the world `seed` into ROOT/VOC2012 and return that folder.

    JPEGImages, Annotations (image-level labels as VOC objects without boxes), SegmentationClass (palette PNG, exact)
    and ImageSets/Segmentation/{train,val}.txt. Train scenes have the indices 0.., val scenes follow them. A complete
    folder of the same settings is left alone; an interrupted one is drawn again, to the same bytes.

    Raises:
        ValueError: ROOT holds a world of other settings.
    """
    settings = {"seed": seed, "num_train": num_train, "num_val": num_val}
    folder, marker = root / "VOC2012", root / "world.json"
    if marker.exists():
        found = json.loads(marker.read_text())
        if found != settings:
            raise ValueError(
                f"{root} holds a world of other settings: {found}, given {settings}; choose another folder"
            )
        return folder
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(num_train + num_val):
        _write_scene(folder, _key(seed, index), draw(seed, index))
    for split, numbers in (("train", range(num_train)), ("val", range(num_train, num_train + num_val))):
        _replace(folder / "ImageSets/Segmentation" / f"{split}.txt", _lines(_key(seed, index) for index in numbers))
    _replace(marker, json.dumps(settings).encode())
    return folder


def _key(seed: int, index: int) -> str:
    return f"world{seed}_{index:06d}"


def _lines(items: Iterator[str]) -> bytes:
    return "".join(f"{item}\n" for item in items).encode()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _write_scene(folder: Path, key: str, scene: Scene) -> None:
    image = io.BytesIO()
    Image.fromarray(scene.image_HW3).save(image, "JPEG", quality=95, subsampling=0)
    _replace(folder / "JPEGImages" / f"{key}.jpg", image.getvalue())
    _replace(folder / "SegmentationClass" / f"{key}.png", encode_mask(scene.mask_HW, voc_palette()))
    objects = "".join(f"<object><name>{CLASSES[label - 1]}</name></object>" for label in scene.labels)
    size = f"<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>"
    head = f"<filename>{key}.jpg</filename><caption>{escape(scene.caption)}</caption>"
    text = f"<annotation>{head}{size}{objects}</annotation>\n"
    _replace(folder / "Annotations" / f"{key}.xml", text.encode())
