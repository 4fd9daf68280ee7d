"""A tiny objective with the shape of the real one: a convolution that predicts the labels of each pixel, frozen part
outside."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dfa.core.metrics import confusion_matrix
from dfa.data.planning import plan_shards, write_plan
from dfa.data.reading import CropSettings, Reader, remaining_items, shard_offsets
from dfa.data.samples import MaskFile, Sample
from dfa.data.shards import ShardIndex
from dfa.data.stream import Batch, eval_batches, to_batch, train_stream
from dfa.data.writer import finish, write_shard
from dfa.train.objective import LossPart, Objective, OptimizerSettings, ParameterGroup
from dfa.train.plan import LoopPlan, Readers
from dfa.train.progress import Progress

# Adam divides by the gradient's own size: with the usual epsilon 1e-8, rounding decides where a gradient cancels.
SETTINGS = OptimizerSettings(learning_rate=1e-2, beta1=0.9, beta2=0.999, epsilon=1e-4, gradient_clip=0.5)


class ToyObjective(Objective):
    """Image labels spread over valid pixels; `unused` never gets a gradient, as a branch switched off would not."""

    def __init__(self, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_classes = num_classes + 1
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, num_classes + 1, 1)
        self.dropout = nn.Dropout(dropout)
        self.unused = nn.Parameter(torch.ones(3))
        self.begun = list[int]()

    def begin_step(self, step: int) -> None:
        self.begun.append(step)

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup("body", tuple(self.body.parameters()), 1.0, 0.01),
            ParameterGroup("head", (*self.head.parameters(), self.unused), 10.0, 0.1),
        ]

    def _logits(self, image_B3HW: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.body(image_B3HW.float() / 255 - 0.5))))

    def forward(self, batch: Batch) -> list[LossPart]:
        logits = self._logits(batch.image_B3HW)[:, 1:]
        target = batch.labels_BC[:, :, None, None].expand_as(logits).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean(1)
        valid = batch.valid_BHW
        size = logits.float().pow(2).mean((1, 2, 3))
        return [
            LossPart("label", 1.0, (loss * valid).sum(), valid.sum().float()),
            LossPart("size", 0.1, size.sum(), torch.tensor(float(len(batch)), device=logits.device)),
        ]

    def validate(self, batch: Batch) -> Tensor:
        assert batch.mask_BHW is not None
        prediction = self._logits(batch.image_B3HW).argmax(1)
        return confusion_matrix(prediction, batch.mask_BHW, num_classes=self.num_classes)


def toy_batch(keys: range, *, size: int = 12, num_classes: int = 3) -> Batch:
    """Samples that are a pure function of their number; the valid area differs between them."""
    images, valid, labels = [], [], []
    for key in keys:
        generator = torch.Generator().manual_seed(1000 + key)
        images.append(torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8))
        area = torch.zeros(size, size, dtype=torch.bool)
        area[: 2 + key % (size - 2)] = True
        valid.append(area)
        labels.append(torch.arange(num_classes) == key % num_classes)
    numbers = torch.tensor(list(keys))
    return Batch(
        torch.stack(images),
        torch.stack(valid),
        torch.stack(labels),
        None,
        tuple(f"k{k}" for k in keys),
        torch.zeros_like(numbers),
        numbers,
    )


def write_toy_shards(root: Path, *, num_samples: int, samples_per_shard: int, size: int = 16) -> ShardIndex:
    """PNG images of noise with masks; sample i has class 1 + i % 3 and key k000i."""
    source = root.parent / f"{root.name}-source"
    source.mkdir(parents=True)
    samples = []
    for i in range(num_samples):
        rng = np.random.default_rng(i)
        image, mask = source / f"k{i:04d}.png", source / f"k{i:04d}-mask.png"
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(image)
        Image.fromarray(np.full((size, size), 1 + i % 3, np.uint8)).save(mask)
        samples.append(Sample(f"k{i:04d}", str(image), (1 + i % 3,), MaskFile(str(mask))))
    plan = plan_shards(
        samples,
        class_names=("cat", "dog", "owl"),
        seed=0,
        shuffle=True,
        samples_per_shard=samples_per_shard,
        max_pixels=10**6,
    )
    write_plan(str(root), plan)
    for item in plan.items:
        write_shard(str(root), item)
    return finish(str(root), plan, max_reject_share=0.0)


def local_batches(plan: LoopPlan, index: ShardIndex, progress: Progress) -> Iterator[Batch]:
    """What `train_stream` gives to a single worker, in this process."""
    crop = CropSettings(size=12, scale_range=(0.5, 2.0), flip_probability=0.5, max_pixels=10**6)
    sizes = [s.num_samples for s in index.shards]
    items = remaining_items(
        sizes,
        seed=plan.seed,
        num_samples=plan.total_samples,
        finished_epochs=progress.finished_epochs,
        open_epochs=progress.open_epochs,
    )
    rows: list[dict[str, Any]] = []
    for item in items:
        offset = int(shard_offsets(sizes)[item.shard])
        reader = Reader(index.path(index.shards[item.shard].name), offset, 3, plan.seed, crop, False)
        for columns in reader.item_blocks(item, dict):
            rows += [{k: v[i] for k, v in columns.items()} for i in range(len(columns["key"]))]
            micro = plan.batch_shape(1).micro_batch
            while len(rows) >= micro:
                now, rows = rows[:micro], rows[micro:]
                yield to_batch({k: np.stack([row[k] for row in now]) for k in now[0]})


def toy_plan(run: Path, index: ShardIndex, **changes: Any) -> LoopPlan:
    """A run over toy shards: 12 px crops, global batch 4."""
    crop = CropSettings(size=12, scale_range=(0.5, 2.0), flip_probability=0.5, max_pixels=10**6)
    seed = changes.get("seed", 0)

    def make_dataset(progress: Progress, readers: Readers) -> Any:
        return train_stream(
            index,
            seed=seed,
            num_samples=plan.total_samples,
            finished_epochs=progress.finished_epochs,
            open_epochs=progress.open_epochs,
            crop=crop,
            with_masks=False,
            num_workers=readers.num_workers,
            read_cpus=readers.read_cpus,
            max_readers=readers.max_readers,
        )

    def make_validation(rank: int, world: int) -> Iterable[Batch]:
        return eval_batches(index, rank=rank, world=world, batch_size=4, max_pixels=10**6, limit=10)

    settings: dict[str, Any] = {
        "run_folder": str(run),
        "class_names": index.class_names,
        "model_description": {"kind": "toy"},
        "shard_sizes": tuple(shard.num_samples for shard in index.shards),
        "make_objective": lambda device: ToyObjective(3).to(device),
        "make_dataset": make_dataset,
        "make_validation": make_validation,
        "total_steps": 12,
        "global_batch": 4,
        "micro_batch": 2,
        "warmup_steps": 2,
        "decay_power": 1.0,
        "optimizer": SETTINGS,
        "engine": "deepspeed",
        "precision": "fp32",
        "zero_stage": 1,
        "num_workers": 1,
        "use_gpu": False,
        "validate_every": 6,
        "checkpoint_every": 4,
        "keep_last": 2,
        "log_every": 2,
        "seed": seed,
    }
    plan = LoopPlan(**{**settings, **changes})
    return plan
