"""Batched transport against POT's batched solver."""

import statistics
import time
from typing import Any

from jobs.bench.measure import Result, take_turns, versions

DEFAULT_REPEATS = 15


def transport(repeats: int) -> Result:
    """Batched transport of 32 images, 400 patches, 27 columns against POT's `ot.batch.solve_batch`, plain scalings.

    Our epsilon is POT's `reg`: with the cost M = -O, its `min <T, M> - reg H(T)` is our `max <T, O> + epsilon H(T)`. POT's other
    ways to solve the same problems, the log domain and a loop over `ot.sinkhorn`, are timed beside it.
    """
    import ot
    import ot.batch
    import torch

    from dfa.core.transport import sinkhorn_plan

    torch.set_num_threads(1)
    num_images, num_patches, num_columns, epsilon, tolerance = 32, 400, 27, 0.1, 1e-4
    generator = torch.Generator().manual_seed(0)
    # Smooth maps stretched to [0, 1], as scoring matrices are, and unequal marginals.
    maps = torch.randn(num_images, num_columns, 5, 5, generator=generator)
    maps = torch.nn.functional.interpolate(maps, (20, 20), mode="bicubic").flatten(2).transpose(1, 2)
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    scores_BNK = ((maps - low) / (high - low)).contiguous()
    marginal_BK = torch.softmax(0.5 * torch.randn(num_images, num_columns, generator=generator), -1)
    mask_BK = torch.ones(num_images, num_columns, dtype=torch.bool)
    # The peer gets its tensors ready-made. Plain scalings are its fastest way; `auto` would take the log domain.
    cost_BNK = -scores_BNK
    uniform_BN = torch.full((num_images, num_patches), 1 / num_patches)
    costs, marginals, uniform = cost_BNK.numpy(), marginal_BK.numpy(), uniform_BN[0].numpy()

    def run_ours() -> Any:
        return sinkhorn_plan(
            scores_BNK, marginal_BK, mask_BK, epsilon=epsilon, max_iterations=100, tolerance=tolerance
        ).plan_BNK

    def run_batched(method: str) -> Any:
        # No gradient, as in ours; `envelope`, the default, would keep one for the value.
        return ot.batch.solve_batch(
            cost_BNK, epsilon, uniform_BN, marginal_BK, tol=tolerance, method=method, grad="detach"
        ).plan

    def run_loop() -> Any:
        return [
            ot.sinkhorn(uniform, marginals[image], costs[image], epsilon, stopThr=tolerance)
            for image in range(num_images)
        ]

    ways = {
        "ours": run_ours,
        "peer": lambda: run_batched("sinkhorn"),
        "log_domain": lambda: run_batched("log_sinkhorn"),
        "loop": run_loop,
    }
    errors = {}
    for name, run in ways.items():
        plan = run()
        plan_BNK = torch.stack([torch.from_numpy(each) for each in plan]) if name == "loop" else plan
        # POT stops on the norm of one marginal's error; ours stops on the sum, which is never smaller.
        column_error = float((plan_BNK.sum(1) - marginal_BK).norm(dim=1).max())
        row_error = float((plan_BNK.sum(2) - 1 / num_patches).norm(dim=1).max())
        errors[name] = max(column_error, row_error)
        if errors[name] > tolerance:
            raise ValueError(
                f"{name} stopped at a marginal error of {errors[name]}, the benchmark asks for {tolerance}"
            )
    times_ms = take_turns(ways, repeats=repeats, per=num_images, clock=time.process_time)
    median_ms = {name: statistics.median(times) for name, times in times_ms.items()}
    ours_ms, peer_ms = times_ms["ours"], times_ms["peer"]
    return Result(
        title="Entropic transport",
        unit="ms an image",
        ours=median_ms["ours"],
        peer=median_ms["peer"],
        ours_range=(min(ours_ms), max(ours_ms)),
        peer_range=(min(peer_ms), max(peer_ms)),
        peer_name="`ot.batch.solve_batch`, plain scalings",
        versions=versions("torch", "POT", "numpy"),
        lines=(
            f"{num_images} images x {num_patches} patches x {num_columns} columns, epsilon {epsilon}, fp32, one thread,"
            f" {repeats} interleaved repeats, processor time. All stop at a marginal error of {tolerance} (reached: ours"
            f" {errors['ours']:.1e}, peer {errors['peer']:.1e}, norm of the worst image). The peer also computes the value of"
            " the transport, which ours does not.",
            "",
            f"POT's other ways: `solve_batch` in the log domain, its default, {median_ms['log_domain']:.3g} ms an image; a loop over"
            f" `ot.sinkhorn` {median_ms['loop']:.3g} ms.",
        ),
        extra={"marginal_error": errors, "repeats": repeats, "median_ms": median_ms},
    )
