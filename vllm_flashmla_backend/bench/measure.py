"""Times: whole calls under CUDA graph replay, L2 flushed before each, peers taking turns, the median.

FLOPs are `2 · h · s_q · Σlen · 1088`, bytes `Σlen · 1152 + b · s_q · h · 2176`, as in `cases.Case`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from ..flash_mla.planning import num_parts, plan_into
from ..flash_mla.schedule import METADATA_WIDTH
from .cases import Case, regime_of
from .clock import GpuMonitor
from .inputs import Inputs, make_inputs, reference, relative_error
from .peers import Missing, Peer, Step

FLUSH_BYTES = 256 << 20  # four times the L2 of an H200
AHEAD_CYCLES = 1_000_000  # half a millisecond
LARGEST_ERROR = 5e-3
"""A relative error above this is a wrong result: rounding to bf16 makes 2e-3, and a page left out of
4,096 tokens 5e-2, of 32,768 tokens 9e-3. (In still longer sequences one page is lost in the rounding.)"""

READ_BYTES = 4 << 30
PRODUCT_SIZE = 8192
PLAN_MUST_US = {1: 5.0, 512: 8.0}
"""What a plan launch may take at most, by batch size."""


@dataclass
class Timed:
    """A captured call, what it returned, and its times in microseconds and SM clocks in MHz."""

    graph: torch.cuda.CUDAGraph
    step: Callable[[], torch.Tensor | None]  # kept, for it owns the plan that the graph reads
    out: torch.Tensor | None
    us: list[float] = field(default_factory=list)
    mhz: list[int] = field(default_factory=list)


def capture(step: Callable[[], torch.Tensor | None]) -> Timed:
    """One call of `step` as a CUDA graph; it must have run before, so that nothing compiles within."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return Timed(graph, step, out)


class Timer:
    """Replays captured calls in turn. One untimed round comes first."""

    def __init__(self, device: torch.device, monitor: GpuMonitor, repeat: int) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._monitor, self._repeat = monitor, repeat

    def take_turns(self, calls: Sequence[Timed]) -> None:
        """Fill in the times of all `calls`."""
        for turn in range(1 + self._repeat):
            for call in calls:
                us = self._replay(call, read_clock=self._monitor.quick or turn == 1)
                if turn > 0:
                    call.us.append(us)

    def _replay(self, call: Timed, read_clock: bool) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # While the GPU waits, the host, which is late at times, queues what follows: its time is not counted.
        torch.cuda._sleep(AHEAD_CYCLES)
        self._flush.fill_(1)
        start.record()
        call.graph.replay()
        end.record()
        start.synchronize()
        if read_clock and (mhz := self._monitor.sm_mhz()) is not None:  # while the call runs, if it is long
            call.mhz.append(mhz)
        end.synchronize()  # no other's flush stands right behind the call
        return start.elapsed_time(end) * 1e3


def measure_case(
    case: Case, peers: Sequence[Peer], timer: Timer, device: torch.device
) -> tuple[list[dict], list[dict]]:
    """Measure every peer that takes the case, on the same tensors.

    Returns
    -------
    rows : one for each peer, at its fastest setting; the keys are those of a results file.
    failures : a case's keys, the peer and the error, for each peer that raised one.
    """
    try:
        inputs = make_inputs(case, device)
    except torch.OutOfMemoryError as error:  # other cases may have room
        reason = f"the case does not fit the GPU: {error}"[:1000]
        return [], [case.keys() | {"peer": peer.name, "error": reason} for peer in peers]
    timed: list[tuple[Peer, str, int, Timed]] = []
    failures = []
    for peer in peers:
        if not peer.takes(case):
            continue
        try:
            timed += [(peer, *prepared) for prepared in _prepare(peer, inputs)]
        except Exception as error:  # whatever a peer raises, the others are still to be measured
            reason = str(error) if isinstance(error, Missing) else f"{type(error).__name__}: {error}"
            failures.append(case.keys() | {"peer": peer.name, "error": reason[:1000]})
    timer.take_turns([call for *_, call in timed])
    want = reference(inputs)
    rows: dict[str, dict] = {}
    for peer, setting, workspace_bytes, call in timed:
        row = _row(case, peer.name, setting, workspace_bytes, call, want)
        best = rows.get(peer.name)
        if best is None or (row["right"], -row["us"]) > (best["right"], -best["us"]):
            rows[peer.name] = row
    return list(rows.values()), failures


def _prepare(peer: Peer, inputs: Inputs) -> list[tuple[str, int, Timed]]:
    """Of each of the peer's settings: its name, its workspace in bytes, its captured call."""
    idle = _requested_bytes("current")
    prepared = []
    for setting, step in peer.prepare(inputs).items():
        workspace_bytes = _workspace(step, inputs.case, idle)
        prepared.append((setting, workspace_bytes, capture(step)))
    return prepared


def _workspace(step: Step, case: Case, idle: int) -> int:
    """Run `step` once: the most memory it had, what `prepare` took included, less its results."""
    torch.cuda.reset_peak_memory_stats()
    out = step()
    torch.cuda.synchronize()
    lse_bytes = case.b * case.h_q * case.s_q * 4
    return max(0, _requested_bytes("peak") - idle - out.nbytes - lse_bytes)


def _requested_bytes(when: str) -> int:
    """What tensors asked for, not what the allocator had at hand for them."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def _row(case: Case, peer: str, setting: str, workspace_bytes: int, call: Timed, want: torch.Tensor) -> dict:
    us, error = median(call.us), relative_error(call.out, want)
    return case.keys() | {
        "regime": regime_of(case),
        "tokens": sum(case.cache_seqlens()),
        "peer": peer,
        "setting": setting,
        "us": round(us, 2),
        "tflops": round(case.flops() / us / 1e6, 1),
        "gbps": round(case.bytes_moved() / us / 1e3, 1),
        "rel_err": float(f"{error:.3g}") if error == error else None,  # JSON has no NaN
        "right": error <= LARGEST_ERROR,
        "sm_mhz": median(call.mhz) if call.mhz else None,
        "workspace_bytes": workspace_bytes,
    }


def ceilings(timer: Timer, device: torch.device) -> dict:
    """What this machine can do: read, copy, multiply; and the least time that any call takes here."""
    from .read_kernel import BLOCK, sum_blocks

    data = torch.ones(READ_BYTES // 4, dtype=torch.int32, device=device)
    sums = torch.empty(data.numel() // BLOCK, dtype=torch.int32, device=device)
    half = data.numel() // 2
    shape = (PRODUCT_SIZE, PRODUCT_SIZE)
    a, b = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    product, one = torch.empty_like(a), torch.zeros(1, device=device)
    steps = {
        "read": lambda: sum_blocks(data, sums),
        # a kernel that negates: in a graph, a copy goes to the copy engines, which are slower
        "copy": lambda: torch.neg(data[half:], out=data[:half]),
        "product": lambda: torch.mm(a, b, out=product),
        "floor": lambda: one.add_(1),
    }
    us = {}
    for name, step in steps.items():  # not in turns: the product would lower the clocks of the others
        step()
        call = capture(step)
        timer.take_turns([call])
        us[name] = median(call.us)
    if not bool((sums == BLOCK).all()):
        raise RuntimeError("the kernel that only reads did not read all of its data")
    return {
        "read_gbps": round(READ_BYTES / us["read"] / 1e3, 1),
        "read_by": f"a Triton kernel that sums {READ_BYTES >> 30} GiB block by block, 16-byte loads",
        "copy_gbps": round(READ_BYTES / us["copy"] / 1e3, 1),  # half of it read, half of it written
        "product_tflops": round(2 * PRODUCT_SIZE**3 / us["product"] / 1e6, 1),
        "product_of": f"bfloat16 {PRODUCT_SIZE}³, random data",
        "floor_us": round(us["floor"], 2),  # a kernel of one element, between the same two events
    }


def plan_launches(timer: Timer, device: torch.device) -> list[dict]:
    """Time of planning one decode step of 16 heads, as `plan_into` does it in vLLM's builder."""
    rows = []
    for b, must_us in PLAN_MUST_US.items():
        lengths = Case(b, 1, 4096, 16, "normal").cache_seqlens()
        cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
        metadata = cache_seqlens.new_empty(num_parts(device, 1, 16, 1), METADATA_WIDTH)
        num_splits = cache_seqlens.new_empty(b + 1)
        tensors = (cache_seqlens, metadata, num_splits)
        plan_into(*tensors, 16)
        call = capture(lambda tensors=tensors: plan_into(*tensors, 16))
        timer.take_turns([call])
        rows.append({"b": b, "us": round(median(call.us), 2), "must_us": must_us})
    return rows
