"""The training loop of one process: batches in, checkpoints and metrics out. Knows torch.distributed, not Ray."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dfa.core.metrics import iou_per_class, mean_iou
from dfa.core.void import void_label
from dfa.data.randomness import stable_seed
from dfa.data.stream import Batch
from dfa.train import history
from dfa.train.average import WeightAverage
from dfa.train.checkpoint import Checkpoint, CheckpointInfo, best_checkpoint, prune, read_info, save_checkpoint
from dfa.train.engine import Engine, make_engine
from dfa.train.objective import LossPart, all_reduce_sum, gather_objects, global_loss, learning_rate_factor, world
from dfa.train.plan import BatchShape, LoopPlan
from dfa.train.progress import Ledger, Progress, Row
from dfa.train.record import Meter, Observer, Recorder, duration
from dfa.train.stop import StopFile
from dfa.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

_ASK_EVERY_S = 2.0  # whether a machine leaves
_CHECKPOINT_AGAIN_S = 10.0  # while one leaves: what is trained until it has gone is not lost
_PATIENCE = 2.0  # times the collectives' timeout, which has the better message


class Trainer:
    """One process of a run. Make it on every rank alike, then call `train` once."""

    def __init__(
        self,
        plan: LoopPlan,
        *,
        device: torch.device,
        checkpoint: Checkpoint | None,
        observers: Sequence[Observer] = (),
        warned: Callable[[], bool] = lambda: False,
        machine_leaves: Callable[[], bool] = lambda: False,
    ) -> None:
        """`warned`: whether this process was told since the last call that it will end. `machine_leaves`: whether a machine
        of the run will; a collective. Either is answered by a checkpoint after the current step; training goes on.

        Raises:
            RuntimeError: the ranks were given different checkpoints: their run folder is not the same one.
        """
        self.rank, self.world = world()
        self.plan, self.device, self.run = plan, device, plan.run_folder
        self.shape = plan.batch_shape(self.world)
        torch.manual_seed(plan.seed)
        self.engine = _engine(plan, device, self.shape)
        self._average = WeightAverage(self.engine.objective, plan.average_decay) if plan.average_decay else None
        self.step = self.samples_seen = self.num_rejected = 0
        self.best_miou = self.last_miou = None
        progress = Progress(plan.shard_sizes) if checkpoint is None else checkpoint.progress.over(plan.shard_sizes)
        self._agree(checkpoint)
        if checkpoint is not None:
            self._restore(checkpoint)
        self.first_step, self.interrupted = self.step, False
        self._ledger = Ledger(progress, keep_rows=plan.keep_history)
        self._warned, self._machine_leaves, self._ask_at, self._leaving = warned, machine_leaves, 0.0, False
        self._attempt = self._begin_attempt() if self.rank == 0 else None
        self._recorder = Recorder(
            self.run, rank=self.rank, first_step=self.step, world_size=self.world, observers=observers
        )
        self._stop = StopFile(self.run)
        self._meter = Meter()
        self._spare: Batch | None = None
        self._checkpoint_step = self.step if checkpoint is not None else 0
        self._writer, self._writing, self._checkpoint_s = ThreadPoolExecutor(1), None, 0.0
        self._watchdog = Watchdog(_PATIENCE * plan.collective_timeout_s)

    def _agree(self, checkpoint: Checkpoint | None) -> None:
        """Each rank has read the run folder by itself: one that does not see it, or not all of it, would train another model
        from here on, and no collective would notice."""
        steps = gather_objects(0 if checkpoint is None else checkpoint.info.step)
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"the workers would continue {self.run} from different checkpoints (steps {steps}, by rank): every node must"
                " see the same folder, with the same files"
            )

    def _restore(self, checkpoint: Checkpoint) -> None:
        info = checkpoint.info
        if dict(info.model) != dict(self.plan.model_description):
            saved, now = _flat(info.model), _flat(self.plan.model_description)
            differ = sorted(key for key in {*saved, *now} if saved.get(key) != now.get(key))
            pairs = ", ".join(f"{key}: saved {saved.get(key)!r}, now {now.get(key)!r}" for key in differ)
            raise ValueError(f"{checkpoint.folder} was trained with another model ({pairs}); use another run folder")
        self.engine.load(checkpoint.engine)
        self._restore_average(checkpoint)
        self.step, self.samples_seen, self.num_rejected = info.step, info.samples_seen, info.num_rejected
        best = best_checkpoint(self.run, up_to=self.step)
        self.best_miou = None if best is None else read_info(best).val_miou
        self.last_miou = info.val_miou
        logger.info("continuing from %s: step %d, %d samples seen", checkpoint.folder, self.step, self.samples_seen)

    def _restore_average(self, checkpoint: Checkpoint) -> None:
        if self._average is None:
            return
        if checkpoint.average is None:
            logger.warning("%s holds no averaged weights: the average begins with its weights", checkpoint.folder)
        self._average.load(checkpoint.engine.weights if checkpoint.average is None else checkpoint.average)

    def _begin_attempt(self) -> history.Attempt:
        if self.shape.global_batch != self.plan.global_batch:
            logger.warning(
                "%d workers do not divide the global batch of %d: steps take %d samples while there are so many",
                self.world,
                self.plan.global_batch,
                self.shape.global_batch,
            )
        return history.begin_attempt(
            self.run, self.shape, num_workers=self.world, step=self.step, samples_seen=self.samples_seen
        )

    def train(self, batches: Iterator[Batch], *, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Train to the plan's end or to a stop request; returns the numbers of the run, the same on every rank.

        `report` is called on every rank at every validation and checkpoint with the newest metrics (a barrier under Ray
        Train).

        Raises:
            NonFiniteLossError: on all ranks, before the update.
            RuntimeError: the stream ended before the run.
        """
        with self._watchdog.watching():
            return self._train(batches, report)

    def _train(self, batches: Iterator[Batch], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        plan, start = self.plan, time.perf_counter()
        while self.samples_seen < plan.total_samples and not self.interrupted:
            self._step(batches)
            done = self.samples_seen >= plan.total_samples or self.interrupted
            if self.step % plan.log_every == 0 or done:
                self._log()
            improved = self._validate() if self._validation_due(done) else False
            if done or improved or self._leaving or self.step % plan.checkpoint_every == 0:
                begin = time.perf_counter()
                self._save()
                if self._leaving:
                    self._finish_writing()
                report({"step": self.step, "samples_seen": self.samples_seen, "val_miou": self.last_miou})
                self._watchdog.progress()
                self._checkpoint_s += time.perf_counter() - begin
        self._finish_writing()
        self._recorder.close()
        return self._result(time.perf_counter() - start)

    def _step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: micro-batches, then the update."""
        plan, accumulation = self.plan, self.engine.num_accumulation
        begin, wait_s, value, sums = time.perf_counter(), 0.0, 0.0, [0.0] * 5
        means: dict[str, float] = {}
        self._rate_factor = learning_rate_factor(
            self.samples_seen / plan.global_batch,
            total=plan.total_steps,
            warmup=plan.warmup_steps,
            power=plan.decay_power,
        )
        self.engine.set_learning_rate(self._rate_factor)
        self.engine.objective.begin_step(self.step)
        # Dropout repeats after a resume, whatever process continues the run. torch takes seeds of 64 bits.
        torch.manual_seed(stable_seed(plan.seed, self.step, self.rank) % 2**63)
        for micro in range(accumulation):
            fetch = time.perf_counter()
            batch = next(batches, None)
            wait_s += time.perf_counter() - fetch
            batch, parts = self._forward(batch)
            loss = global_loss(parts, batch, signals=self._signals(batch))
            sums = [a + b for a, b in zip(sums, loss.signals, strict=True)]
            if not loss.signals[0] and self.samples_seen + sums[0] < plan.total_samples:
                raise RuntimeError(
                    f"the stream ended after {self.samples_seen + sums[0]:.0f} of {plan.total_samples} samples"
                )
            self.engine.backward(loss.local)
            self._ledger.note(batch, step=self.step + 1, micro=micro)
            self._watchdog.progress()
            value += loss.value / accumulation
            means = {k: means.get(k, 0.0) + v / accumulation for k, v in loss.means.items()}
        norm = self.engine.step()
        seen, rejected, stopping, warned, asking = sums
        self.step, self.samples_seen, self.num_rejected = (
            self.step + 1,
            self.samples_seen + int(seen),
            self.num_rejected + int(rejected),
        )
        if self._average is not None:
            self._average.update(self.step)
        self.interrupted = stopping > 0
        self._leaving = bool(asking and self._machine_leaves()) or warned > 0
        if asking:
            self._ask_at = time.monotonic() + (_CHECKPOINT_AGAIN_S if self._leaving else _ASK_EVERY_S)
        self._meter.add(time.perf_counter() - begin, wait_s, int(seen), {"loss": value, "grad_norm": norm, **means})
        if self._attempt is not None and self.step == self.first_step + 1:
            history.note_first_step(self.run, self._attempt)

    def _signals(self, batch: Batch) -> tuple[float, ...]:
        """What every rank learns of all others with the loss: samples, rejected ones, a stop request, a warning that this
        process will end, and rank 0's wish to ask whether a machine will."""
        return (
            float(len(batch) + len(batch.rejected)),
            float(len(batch.rejected)),
            float(self.rank == 0 and self._stop.asked()),
            float(self._warned()),
            float(self.rank == 0 and time.monotonic() >= self._ask_at),
        )

    def _forward(self, batch: Batch | None) -> tuple[Batch, list[LossPart]]:
        """Loss parts of a micro-batch. A rank without samples takes part with weightless ones, so that
        collectives match."""
        if batch is not None and len(batch):
            self._spare = batch
            return batch, self.engine.forward(batch.to(self.device))
        if self._spare is None:
            if batch is None:
                raise RuntimeError(f"rank {self.rank} got nothing from the stream to begin with")
            self._spare = _black_picture(batch)
        parts = self.engine.forward(self._spare.to(self.device))
        empty = _without_samples(self._spare, batch)
        return empty, [replace(p, total=p.total * 0, count=p.count * 0) for p in parts]

    def _log(self) -> None:
        values = self._meter.take()
        rate = values["images_per_s"]
        values |= {
            "samples_seen": self.samples_seen,
            "epoch": self.samples_seen / self.plan.num_samples,
            "num_rejected": self.num_rejected,
            "world_size": self.world,
            "learning_rate": self.plan.optimizer.learning_rate * self._rate_factor,
            "restarts": self._recorder.restarts,
            "global_batch": self.shape.global_batch,
        }
        if self.device.type == "cuda":
            values["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self._recorder.write("train", self.step, values)
        if self.rank == 0:
            eta_s = (self.plan.total_samples - self.samples_seen) / rate
            text = "step %d/%d  loss %.4f  %.1f images/s  waiting for data %.0f%%  ETA %s"
            total = self.step + -(-(self.plan.total_samples - self.samples_seen) // self.plan.global_batch)
            if "labels_given" in values:
                text += f"  offline labels {100 * values['labels_given']:.0f}%%"
            logger.info(text, self.step, total, values["loss"], rate, 100 * values["data_wait"], duration(eta_s))

    def _validation_due(self, done: bool) -> bool:
        if self.plan.make_validation is None or self.interrupted or (self._leaving and not done):
            return False  # who will end in seconds writes a checkpoint, and is validated at the next occasion
        return done or (self.plan.validate_every > 0 and self.step % self.plan.validate_every == 0)

    def _validate(self) -> bool:
        """Mean IoU over all ranks' shares, of the averaged weights where they are kept; True if it is the best so far."""
        start, objective, make_validation = time.perf_counter(), self.engine.objective, self.plan.make_validation
        assert make_validation is not None
        confusion = torch.zeros(objective.num_classes, objective.num_classes, dtype=torch.int64, device=self.device)
        objective.eval()
        with torch.no_grad(), nullcontext() if self._average is None else self._average.used():
            for batch in make_validation(self.rank, self.world):
                confusion += objective.validate(batch.to(self.device))
                self._watchdog.progress()
        objective.train()
        all_reduce_sum(confusion)
        miou = self.last_miou = float(mean_iou(confusion))
        iou = {
            f"iou_{n}": float(v)
            for n, v in zip(("background", *self.plan.class_names), iou_per_class(confusion), strict=True)
        }
        seconds = time.perf_counter() - start
        self._recorder.write("val", self.step, {"miou": miou, **iou, "seconds": seconds})
        if self.rank == 0:
            logger.info("step %d  validation mIoU %.2f  (%.1f s)", self.step, 100 * miou, seconds)
        improved = self.best_miou is None or miou > self.best_miou
        self.best_miou = miou if improved else self.best_miou
        self._scored_step = self.step
        return improved

    _scored_step = -1

    def _save(self) -> None:
        """Checkpoint of this step: gathered by all ranks, written by rank 0 in the background."""
        if self._checkpoint_step == self.step:
            return
        last, self._checkpoint_step = self._checkpoint_step, self.step
        start = time.perf_counter()
        self._finish_writing()
        state, progress, rows = self.engine.state(), self._ledger.gather(self.device), self._ledger.gather_rows()
        average = None if self._average is None else self._average.state()
        if progress.num_consumed != self.samples_seen:
            raise RuntimeError(
                f"book-keeping differs: {progress.num_consumed} samples noted, {self.samples_seen} counted"
            )
        info = CheckpointInfo(
            step=self.step,
            samples_seen=self.samples_seen,
            num_rejected=self.num_rejected,
            val_miou=self.last_miou if self._scored_step == self.step else None,
            num_updates=state.num_updates,
            loss_scale=state.loss_scale,
            class_names=self.plan.class_names,
            model=self.plan.model_description,
        )
        if self.rank == 0:
            self._recorder.write("checkpoint", self.step, {"blocked_s": time.perf_counter() - start})
            self._writing = self._writer.submit(self._write, state, progress.to_tensors(), info, average, rows, last)

    _writing: Future[None] | None

    def _write(
        self,
        state: Any,
        progress: dict[str, Tensor],
        info: CheckpointInfo,
        average: dict[str, Tensor] | None,
        rows: Sequence[Row],
        last: int,
    ) -> None:
        self._recorder.sync()
        if self._attempt is not None and self.plan.keep_history:
            number = self._attempt.number
            history.write_rows(self.run, rows, step=info.step, continues_from=last, attempt=number)
        save_checkpoint(self.run, state, progress, info, average)
        try:
            prune(self.run, keep_last=self.plan.keep_last, newest=info.step)
        except OSError as error:  # this checkpoint is safe, and the next one prunes again
            logger.warning("old checkpoints were not deleted: %s", error)

    def _finish_writing(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _result(self, seconds: float) -> dict[str, Any]:
        meter = self._meter.whole()
        return {
            "step": self.step,
            "steps_made": self.step - self.first_step,
            "samples_seen": self.samples_seen,
            "num_rejected": self.num_rejected,
            "val_miou": self.last_miou,
            "best_val_miou": self.best_miou,
            "samples_left_in_epoch": -self.samples_seen % self.plan.num_samples,
            "interrupted": self.interrupted,
            "world_size": self.world,
            "seconds": seconds,
            "checkpoint_share": self._checkpoint_s / max(seconds, 1e-9),
            **meter,
        }


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    """`section.key` -> value, as one types them."""
    found = dict[str, Any]()
    for name, value in description.items():
        found |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def _engine(plan: LoopPlan, device: torch.device, shape: BatchShape) -> Engine:
    objective = plan.make_objective(device)
    objective.train()
    return make_engine(
        objective,
        plan.optimizer,
        kind=plan.engine,
        precision=plan.precision,
        zero_stage=plan.zero_stage,
        micro_batch=shape.micro_batch,
        num_accumulation=shape.num_accumulation,
        device=device,
    )


def _without_samples(spare: Batch, batch: Batch | None) -> Batch:
    """The book-keeping of a micro-batch without any readable sample."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return replace(spare, keys=(), epoch_B=nothing, sample_B=nothing, rejected=() if batch is None else batch.rejected)


def _black_picture(batch: Batch) -> Batch:
    """One picture of the first class, of the shape of a batch without any."""
    _, channels, height, width = batch.image_B3HW.shape
    mask, void = batch.mask_BHW, void_label(batch.labels_BC.shape[1])
    labels_1C = torch.zeros(1, batch.labels_BC.shape[1], dtype=torch.bool)
    labels_1C[0, 0] = True
    return replace(
        batch,
        image_B3HW=torch.zeros(1, channels, height, width, dtype=torch.uint8),
        valid_BHW=torch.ones(1, height, width, dtype=torch.bool),
        labels_BC=labels_1C,
        mask_BHW=None if mask is None else torch.full((1, height, width), void, dtype=mask.dtype),
        given_B=None if batch.given_B is None else torch.zeros(1, dtype=torch.bool),
        rejected=(),
    )
