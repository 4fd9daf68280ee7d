"""Seeds of random generators, keyed by what is drawn for and never by who draws."""

import hashlib


def stable_seed(*key: int | str) -> int:
    """Return a seed of 128 bits: a pure function of `key`, the same in every process, Python version and machine.

    Python's `hash` salts texts anew in each process, and its value for a tuple is an implementation detail; hence blake2b.

    >>> stable_seed(0, 3, "2007_000032")
    217589312308847057587713042662593270038
    """
    text = ":".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
