"""Block-wise annotation: `python -m jobs.blocks CONF blocks.grid=33 blocks.input=MASKS`.

MASKS is a folder of image shards with masks (default: shards.train) or of PNG masks. Shards become label shards, which
training reads with `loss.supervision=labels shards.labels=OUTPUT`; PNGs become PNGs of the same names. Killed and started
again it writes what is missing. What a coarser annotation costs is foretold by jobs.analyze.
"""

from pathlib import Path

from dfa import build
from dfa.config import Config
from dfa.data import storage
from dfa.data.classes import check_classes
from dfa.data.shards import INDEX_NAME, load_index
from dfa.label.blocks import write_block_labels, write_block_pngs
from jobs import Result, main


def work(config: Config) -> Result:
    """Write the masks of blocks.input at blocks.grid."""
    blocks, limit = config.blocks, config.data.max_pixels
    root, given = blocks.input or config.shards.train, "blocks.input" if blocks.input else "shards.train"
    if not root:
        raise ValueError("blocks.input and shards.train are empty: give a folder of image shards, or of PNG masks")
    output = blocks.output or storage.join(config.run, f"blocks/{blocks.grid}")
    found: Result = {"job": "blocks", "output": output, "grid": blocks.grid}
    if storage.exists(storage.join(root, INDEX_NAME)):
        try:
            index = load_index(root)
        except ValueError as error:
            raise ValueError(f"{given}: {error}; give a folder of image shards with masks, or of PNG masks") from error
        check_classes(index.class_names, build.class_set(config).names, where=f"{given} {root}")
        report = write_block_labels(index, output, grid=blocks.grid, max_pixels=limit)
        rejects = [f"{each.key}: {each.reason}" for each in report.rejects[:5]]
        return found | {"num_masks": report.num_samples, "num_rejects": len(report.rejects), "rejects": rejects}
    folder = Path(storage.local_path(root)).resolve()
    if not folder.is_dir():
        raise ValueError(f"{given}={root} is no folder; give one of image shards with masks, or of PNG masks")
    if storage.is_local(output) and Path(storage.local_path(output)).resolve().is_relative_to(folder):
        raise ValueError(f"blocks.output {output} lies inside blocks.input {root}; choose a folder outside of it")
    return found | {"num_masks": write_block_pngs(str(folder), output, grid=blocks.grid, max_pixels=limit)}


if __name__ == "__main__":
    main(__doc__, work, kept=("run", "blocks.output"))
