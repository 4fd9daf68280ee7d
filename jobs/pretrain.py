"""Train the tiny CLIP of our world: `python -m jobs.pretrain --work FOLDER`. Killed and started again, it continues.

Ends by measuring the model on scenes that it never saw, and writes dfa/world/tiny_clip.safetensors with a JSON beside
it that tells the command, the seed, the time and the scores.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from dfa import build
from dfa.clip import load_clip
from dfa.config import CONF
from dfa.world import pretrain
from dfa.world.measure import measure_clip
from jobs import Result, run
from jobs.submitted import refuse_lost

_OUTPUT = Path(pretrain.__file__).with_name("tiny_clip.safetensors")
_MEASURED = {"seed": 2024, "num_scenes": 300}
_THRESHOLDS = [0.02, *(round(0.05 * step, 2) for step in range(1, 20))]


def work(settings: pretrain.PretrainSettings, folder: Path, output: Path, threads: int) -> Result:
    """Train, save, measure."""
    torch.set_num_threads(threads)
    model = CONF / "tiny_clip.json"
    weights = pretrain.pretrain(model, settings, folder)
    save_file(weights, output)
    clip = load_clip(str(model), output, device="cpu", precision="fp32")
    scores = measure_clip(clip, pretrain.TEMPLATES[0], **_MEASURED, thresholds=_THRESHOLDS)
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    card = {
        "command": f"python -m jobs.pretrain --work FOLDER --seed {settings.seed}"
        f" --close-up-steps {settings.close_up_steps} --scene-steps {settings.scene_steps}",
        "settings": asdict(settings),
        "training_seconds": last["seconds"],
        "threads": threads,
        "size_bytes": output.stat().st_size,
        "measured_on": f"scenes 0..{_MEASURED['num_scenes'] - 1} of world {_MEASURED['seed']}",
        "scores": {name: round(value, 4) for name, value in scores.items()},
        "versions": {name: build.versions()[name] for name in ("python", "torch", "open_clip_torch")},
    }
    output.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    return {"job": "pretrain", "checkpoint": str(output), **card["scores"]}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the resumable state")
    parser.add_argument("--output", type=Path, default=_OUTPUT, help="the safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    usual = pretrain.PretrainSettings()
    parser.add_argument("--close-up-steps", type=int, default=usual.close_up_steps, help="of single objects, first")
    parser.add_argument("--scene-steps", type=int, default=usual.scene_steps, help="of whole scenes, after them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if min(arguments.close_up_steps, arguments.scene_steps) < 0 or not arguments.close_up_steps + arguments.scene_steps:
        parser.error("--close-up-steps and --scene-steps must not be negative, and one at least must be positive")
    settings = replace(
        usual,
        seed=arguments.seed,
        close_up_steps=arguments.close_up_steps,
        scene_steps=arguments.scene_steps,
    )

    def checked() -> Result:
        for name, path in (("--work", arguments.work), ("--output", arguments.output)):
            refuse_lost(name, path)
        return work(settings, arguments.work, arguments.output, arguments.threads)

    run(checked)


if __name__ == "__main__":
    main()
