"""Makes given blocks of a plan: the same call for one process and for many workers."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

from ..checkpoint.shards import ShardWriter
from ..core.errors import MachineError, PlanError
from ..core.tensors import Action
from ..core.typed_json import Misfit, parse
from ..core.units import ITEMSIZE, format_size
from ..methods.base import CONCURRENT_OUTPUTS, OutputTensor
from ..plan.blocks import BlockPlan
from ..plan.types import Plan
from ..report.manifest_parts import BlockSeconds, TensorDiagnostics
from .compute import BlockComputer, Computed, Loaded
from .device import choose_device
from .document_results import document_results
from .quantize import QuantizedWriter
from .times import COMPUTED, READ, WAITED, WROTE, Stopwatch

if TYPE_CHECKING:
    import torch

#: called when a block begins and while it is made, with the fraction of its elements that is written
OnFraction = Callable[[BlockPlan, float], None]


class BlockRecord(TypedDict):
    """What the manifest will say of a block: JSON data.

    Attributes:
        tensors: The diagnostics of its method.
        seconds: What it took its time for.
    """

    tensors: Sequence[TensorDiagnostics]
    seconds: BlockSeconds


def is_record(value: object) -> bool:
    """Whether a JSON value is a `BlockRecord` that a manifest can hold: none of its numbers is NaN or infinite."""
    try:
        parse(BlockRecord, value)
        json.dumps(value, allow_nan=False)
    except (Misfit, ValueError):
        return False
    return True


def run_blocks(
    plan: Plan,
    indices: Iterable[int],
    writer: ShardWriter,
    *,
    device: torch.device | str | None,
    seed: int = 0,
    max_memory: int | None = None,
    on_block: Callable[[BlockPlan, BlockRecord], None] = lambda block, record: None,
    on_fraction: OnFraction | None = None,
) -> None:
    """Make blocks of a plan and write their tensors.

    The next block is read ahead while one is computed, and a tensor is written while the next one is computed. Blocks
    are independent: any process that reaches the sources can make any of them, in any order. The bytes are those of a
    single run with the same seed and threads on such a machine (`run.device.machine_identity`). Nothing else is
    written: config, index, side files, manifest, verification and the final rename belong to `executor.execute`.

    Args:
        plan: The plan; it may have been pickled.
        indices: Which of its blocks, in the order in which they are made.
        writer: The writer of the files that their tensors belong to.
        device: Where the arithmetic is done, or its name; None when these blocks only copy.
        seed: For methods that draw random numbers.
        max_memory: Bytes that the process may take; None for no limit.
        on_block: Called after each block, when all its tensors are written, with what the manifest says of it.
        on_fraction: Called when a block begins and after each write, with the fraction of the block's elements that is
            written. Calls come from several threads.

    Raises:
        PlanError: there is no such block, or the writer has no file for one of its tensors.
        CheckpointError: a source has changed since the plan was made.
        DeusMergeError: a tensor that cannot be read, merged or written.
    """
    blocks = _checked_blocks(plan, indices, writer)
    plan.check_sources()
    if isinstance(device, str):
        device = choose_device(device)
    with ExitStack() as stack:
        runner = _BlockRunner(plan, blocks, writer, device, seed, max_memory, stack, on_fraction)
        for block in blocks:
            with _memory_errors(block):
                record = runner.run(block)
            on_block(block, record)


def _checked_blocks(plan: Plan, indices: Iterable[int], writer: ShardWriter) -> list[BlockPlan]:
    blocks = []
    for index in indices:
        if not 0 <= index < len(plan.blocks):
            expected = f"0 to {len(plan.blocks) - 1}"
            raise PlanError("the plan has no such block", where="indices", expected=expected, got=index)
        blocks.append(plan.blocks[index])
        written = (tensor.name for output in blocks[-1].outputs for tensor in output.written)
        if missing := next((name for name in written if name not in writer), None):
            raise PlanError(
                "the writer has no file for a tensor of this block",
                where=blocks[-1].title,
                expected="a writer of the files of `plan.shards` that the block belongs to",
                got=f"none with {missing}",
            )
    return blocks


class _BlockRunner:
    """The moving parts: the block being read ahead, the one being computed, the tensor being written behind; and on a
    CPU the threads that compute outputs of a block at the same time, where its method allows that."""

    def __init__(
        self,
        plan: Plan,
        blocks: Sequence[BlockPlan],
        writer: ShardWriter,
        device: torch.device | None,
        seed: int,
        max_memory: int | None,
        stack: ExitStack,
        on_fraction: OnFraction | None,
    ):
        self._on_fraction, self._written = on_fraction, lambda elements: None
        self._writer, self._quantized = writer, QuantizedWriter(writer)
        self._results = document_results(plan, device, seed, limited=max_memory is not None)
        self._computer = BlockComputer(plan, device, seed, plan.block_memory(max_memory), self._results)
        self._ahead = stack.enter_context(ThreadPoolExecutor(1, "read-ahead"))
        self._behind = stack.enter_context(ThreadPoolExecutor(1, "write-behind"))
        self._map = _parallel_map(stack) if device and device.type == "cpu" else None
        self._writing: Future | None = None
        self._upcoming = iter([block for block in blocks if block.computes])
        on_processor = device is not None and device.type == "cpu"
        self._watches = {block.index: Stopwatch(on_processor) for block in blocks}
        self._loading = self._read_ahead()

    def run(self, block: BlockPlan) -> BlockRecord:
        """Make one block.

        Returns:
            Its times, and the diagnostics of its method and of documents' blocks that were computed for it.
        """
        self._written = _fraction_counter(block, self._on_fraction)
        self._watch = self._watches[block.index]
        diagnostics: list[Any] = self._make(block)
        for result in self._results.values():
            diagnostics += result.take_diagnostics()
        return {"tensors": diagnostics, "seconds": self._watch.seconds}

    def _make(self, block: BlockPlan) -> list[dict]:
        copies = [(t.name, t.stored) for o in block.outputs for t in o.written if t.stored is not None]
        for kind, remote in ((READ, True), (WROTE, False)):  # from another machine, they are written as they come
            if found := [pair for pair in copies if (pair[1].remote is not None) is remote]:
                with self._watch.during(kind):
                    self._writer.copy_many(found)
        with self._watch.during(WROTE):
            self._zeros(block)
        constant = (Action.COPY, Action.ZEROS)
        self._written(sum(math.prod(output.shape) for output in block.outputs if output.action in constant))
        diagnostics: list[dict] = []
        if block.computes:
            with self._watch.during(READ):
                diagnostics += self._computer.scale_warnings(block)
            loaded = self._loaded()
            independent = self._computer.independent_outputs(block) if self._map else []
            computing = (
                self._computer.read_outputs(block)
                if independent
                else self._computer.compute(block, diagnostics, loaded)
            )
            for computed in self._watch.each(COMPUTED, computing):
                self._write_behind(computed)
            self._await_write()
            diagnostics += self._compute_independent(block, independent, loaded)
        return diagnostics

    def _zeros(self, block: BlockPlan) -> None:
        for output in block.outputs:
            if output.action is Action.ZEROS and output.quantization:
                self._quantized.zeros(output)
            elif output.action is Action.ZEROS:
                self._writer.zeros(output.name)

    def _compute_independent(self, block: BlockPlan, outputs: Sequence[OutputTensor], loaded: Loaded) -> list[dict]:
        """Compute outputs that do not depend on each other, a thread each. A single one, too: runs are so short that
        threads that shared them would mostly wait for each other."""

        watch = self._watch

        def one(output: OutputTensor) -> list[dict]:
            diagnostics: list[dict] = []
            merged = self._computer.merge_outputs(block, diagnostics, loaded, only=output)
            for computed in watch.each(COMPUTED, merged):
                self._write(computed, watch)
            return diagnostics

        if not outputs or self._map is None:
            return []
        return [line for lines in self._map(one, outputs) for line in lines]

    def _write_behind(self, computed: Computed) -> None:
        """Hand to the writing thread; at most one tensor waits, so that memory stays bounded."""
        self._await_write()
        self._writing = self._behind.submit(self._write, computed, self._watch)

    def _write(self, computed: Computed, watch: Stopwatch) -> None:
        with watch.during(WROTE):
            self._write_now(computed)

    def _write_now(self, computed: Computed) -> None:
        import torch

        output, chunk = computed
        assert chunk.values is not None
        if output.quantization:
            self._quantized.add(output, chunk)
            self._written(chunk.values.numel())
            return
        at = None if chunk.start is None else chunk.start * ITEMSIZE[output.dtype]
        flat = chunk.values.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        self._writer.write(output.name, flat.numpy().data, at=at)
        self._written(chunk.values.numel())

    def _await_write(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with self._watch.during(WAITED):
                writing.result()

    def _read_ahead(self) -> Future[Loaded] | None:
        """Begin with the next block that computes something."""
        block = next(self._upcoming, None)
        return self._ahead.submit(self._load, block) if block else None

    def _load(self, block: BlockPlan) -> Loaded:
        with self._watches[block.index].during(READ):
            return self._computer.load(block)

    def _loaded(self) -> Loaded:
        loading = self._loading
        assert loading is not None
        with self._watch.during(WAITED):
            loaded = loading.result()
        self._loading = self._read_ahead()
        return loaded


def _fraction_counter(block: BlockPlan, on_fraction: OnFraction | None) -> Callable[[int], None]:
    """A function that counts written elements of a block and reports their fraction, also now: the block begins."""
    if on_fraction is None:
        return lambda elements: None
    total, written, lock = sum(math.prod(output.shape) for output in block.outputs), 0, threading.Lock()

    def add(elements: int) -> None:
        nonlocal written
        with lock:
            written += elements
            on_fraction(block, min(1.0, written / max(1, total)))

    add(0)
    return add


@contextmanager
def _memory_errors(block: BlockPlan) -> Iterator[None]:
    """Too little memory as a MachineError; torch has several ways to say it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise MachineError(
            "out of memory",
            where=block.title,
            got=str(error).splitlines()[0] if str(error) else None,
            hint=f"plans work in less with --max-memory; this block was estimated at {format_size(block.workspace())}",
        ) from error


def _parallel_map(stack: ExitStack) -> Callable | None:
    """A ``map`` that calls its function in several threads, which share torch's among them; None for one thread."""
    import torch

    threads = torch.get_num_threads()
    count = min(CONCURRENT_OUTPUTS, threads)
    if count == 1:
        return None
    # In a thread of its own this sets how many threads that one uses, and the number for those to come.
    pool = stack.enter_context(
        ThreadPoolExecutor(count, "merge", initializer=lambda: torch.set_num_threads(threads // count))
    )

    def map_(function, items):
        try:
            return list(pool.map(function, items))
        finally:
            torch.set_num_threads(threads)

    return map_
