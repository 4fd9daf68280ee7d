"""From conf/NAME.yaml and key=value to a checked Config."""

import dataclasses
import difflib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dfa.config.schema import Config
from dfa.data import storage
from dfa.data.classes import ClassSet

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "conf"  # a wheel carries the folder inside the package; in a checkout it lies beside it
CONF = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "conf"


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        name: a name in conf/ ("demo") or the path of a YAML file; "" for the defaults alone.
        overrides: "section.key=value", value in YAML syntax.

    Raises:
        ValueError: unknown file or key (with the nearest known one), wrong type, value out of range.
    """
    layers: list[tuple[str, Any]] = []
    if name:
        path, content = read_yaml(name)
        layers.append((f"conf {path}", content))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form section.key=value")
        # "key=" is the empty text, not nothing.
        override += "" if override.partition("=")[2] else "''"
        layers.append((f"override {key}", OmegaConf.to_container(OmegaConf.from_dotlist([override]))))
    return _resolve(layers)


def from_sections(sections: Mapping[str, Any], *, where: str) -> Config:
    """A configuration of some sections as plain mappings, as a checkpoint holds them; the defaults elsewhere.

    Raises:
        ValueError: as in `load`; `where` tells what the sections are.
    """
    return _resolve([(where, dict(sections))])


def _resolve(layers: Sequence[tuple[str, Any]]) -> Config:
    merged = OmegaConf.structured(Config)
    for where, layer in layers:
        for key in _flat(layer):
            _check_key(key, where)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            reason = "a list is expected, as [a, b]" if "ListConfig" in reason else reason
            raise ValueError(f"{where}: {reason}") from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    _check_ranges(config, "")
    return config


def class_set(name: str) -> ClassSet:
    """The class list `name` of conf/, or at the path or address `name`: keys names, prompts, background, templates."""
    path, content = read_yaml(name)
    try:
        return ClassSet.from_mapping(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_yaml(classes: ClassSet) -> str:
    """A class list as the YAML that `class_set` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(classes.to_mapping()))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain containers, for JSON."""
    return dataclasses.asdict(config)


def digest(*parts: Any) -> str:
    """A short stable hash of configuration sections or other plain values: what an output depends on."""
    plain = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def project_file(name: str) -> str:
    """Where a file of the project is, named as in the checkout ("conf/tiny_clip.json"), from any working directory.

    A file of that name in the working directory comes first. A name that stands for neither is returned as it is.
    """
    if not Path(name).exists():
        for folder in (CONF.parent, _PACKAGE.parent):
            if (folder / name).is_file():
                return str(folder / name)
    return name


def _conf_path(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONF / f"{name}.yaml"
    if not path.is_file():
        known = sorted(str(each.relative_to(CONF).with_suffix("")) for each in CONF.rglob("*.yaml"))
        raise ValueError(f"no configuration {name!r} ({path} is not a file); conf/ has {', '.join(known)}")
    return path


def read_yaml(name: str) -> tuple[str, dict[str, Any]]:
    """The mapping in a YAML file, given by a name in conf/, by its path or by its address; and where that is.

    Raises:
        ValueError: there is no such file, or it holds no mapping.
    """
    path = name if "://" in name else str(_conf_path(name))
    try:
        content = OmegaConf.to_container(OmegaConf.load(io.BytesIO(storage.read_bytes(path))), resolve=True)
    except Exception as error:  # the YAML parser behind OmegaConf raises its own family
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a mapping is expected at the top, found {type(content).__name__}")
    return path, {str(key): value for key, value in content.items()}


def _flat(layer: Any, prefix: str = "") -> Iterator[str]:
    for key, value in layer.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _known_keys(kind: type = Config, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for each in dataclasses.fields(kind):
        if dataclasses.is_dataclass(each.type):
            keys += [f"{prefix}{each.name}", *_known_keys(each.type, f"{prefix}{each.name}.")]  # type: ignore[arg-type]
        else:
            keys.append(f"{prefix}{each.name}")
    return keys


def _check_key(key: str, where: str) -> None:
    known = _known_keys()
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; sections are {', '.join(k for k in known if '.' not in k)}"
    raise ValueError(f"{where}: unknown key {key!r}{hint}")


def _check_ranges(section: Any, prefix: str) -> None:
    for each in dataclasses.fields(section):
        value, name = getattr(section, each.name), f"{prefix}{each.name}"
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{name}.")
        elif "choices" in each.metadata and value not in each.metadata["choices"]:
            near = difflib.get_close_matches(str(value), [str(option) for option in each.metadata["choices"]], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} is {value!r}, allowed are {list(each.metadata['choices'])}{hint}")
        elif "range" in each.metadata:
            low, high = each.metadata["range"]
            if not low <= value <= high:
                raise ValueError(f"{name} is {value!r}, allowed is {low} to {high}")
