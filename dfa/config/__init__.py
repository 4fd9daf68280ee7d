"""The configuration of a run: its fields, and how files and key=value become one.

`load("voc_dfa", ["train.steps=100"])` reads conf/voc_dfa.yaml, which holds differences from the defaults, then the
key=value overrides, and checks names, types and ranges. Only `dfa.build` and jobs read a Config.
"""

from dfa.config.loading import CONF, class_set, digest, from_sections, load, project_file, read_yaml, to_dict, to_yaml
from dfa.config.schema import ClipConfig, Config

__all__ = [
    "CONF",
    "ClipConfig",
    "Config",
    "class_set",
    "digest",
    "from_sections",
    "load",
    "project_file",
    "read_yaml",
    "to_dict",
    "to_yaml",
]
