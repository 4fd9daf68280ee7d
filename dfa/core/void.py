"""How many classes there can be, and which label marks pixels that count nowhere.

Label maps of up to 254 classes are uint8 with 255 for void, as everywhere in the field. Those of more are uint16 with
65535, so that no class loses its index. Neither torch nor numpy is imported here: reading processes load this module.
"""

from typing import Literal

VOID, WIDE_VOID = 255, 65_535
#: Tables of samples keep class indices as 16-bit signed integers.
MAX_CLASSES = 32_767


def is_wide(num_classes: int) -> bool:
    """Tell whether label maps of C foreground classes need 16 bits."""
    return num_classes >= VOID


def void_label(num_classes: int) -> int:
    """The label of void among C foreground classes.

    >>> void_label(254), void_label(255)
    (255, 65535)
    """
    return WIDE_VOID if is_wide(num_classes) else VOID


def label_dtype(num_classes: int) -> Literal["uint8", "uint16"]:
    """The type of label maps of C foreground classes; its largest value is void."""
    return "uint16" if is_wide(num_classes) else "uint8"
