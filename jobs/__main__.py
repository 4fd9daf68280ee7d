"""The command `dfa`: `dfa train voc_dfa key=value ...` is `python -m jobs.train voc_dfa key=value ...`, and so for every job."""

import difflib
import runpy
import sys
from collections.abc import Sequence

#: Every job with what it does, in the order in which a newcomer meets them.
JOBS = {
    "demo": "the whole flow on a laptop, on a drawn world; with --data FOLDER a first look at your own images",
    "check": "look at a PASCAL VOC or COCO folder: what is missing or wrong, and the commands to run next",
    "recipe": "run a published recipe, from the folder of the data set to the scores beside the paper's",
    "shard": "write a labelled data set as WebDataset shards",
    "train": "train a model from image-level labels; the same command continues a run",
    "pseudo_label": "label a data set with a run's checkpoint: CAM, then dense CRF",
    "evaluate": "score seeds, masks and model of a run by exact mIoU",
    "predict": "write masks of a trained model for any images",
    "report": "write the page of a run: curves, scores, pictures",
    "ablate": "train variants of one configuration on the same shards and compare them",
    "history": "check that a run consumed each sample exactly once per epoch",
    "analyze": "analyse predictions by frequency: what coarser grids would cost and save",
    "blocks": "write block-wise masks: ground truth at the resolution of a grid",
    "correlate": "compare the predicted and the observed cost of coarser grids for a run's model",
    "gradients": "show which feature frequencies each frequency of the loss reaches in a run's decoder",
    "size": "estimate hours and costs of a data set on a cluster",
    "bench": "measure ours against the peers",
    "pretrain": "train the tiny CLIP of the demo's world",
}
_HELP = """usage: dfa JOB [arguments ...]

Image-level labels in, segmentation models and masks out. Most jobs take a configuration (a name in conf/ or the path of a
YAML file) and differences from it:

  dfa train voc_dfa run=runs/mine train.steps=1000

`dfa JOB --help` tells what a job takes. `dfa JOB` is the same as `python -m jobs.JOB`.

jobs:
{jobs}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the job that the first argument names, with the arguments that follow. Without one, or with --help, list the jobs."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        width = max(map(len, JOBS))
        print(_HELP.format(jobs="\n".join(f"  {job:{width}}  {what}" for job, what in JOBS.items())))
        return
    if name not in JOBS:
        near = difflib.get_close_matches(name, JOBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the jobs are {', '.join(JOBS)}"
        raise SystemExit(f"error: there is no job {name!r}; {hint}")
    sys.argv = [name, *rest]
    # As `python -m` does it: the job's module is __main__ while it runs, which pickles of its functions refer to.
    runpy.run_module(f"jobs.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
