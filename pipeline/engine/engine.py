"""The loop: schedule -> prefill or step -> collect, one step ahead of the host.

While the device runs step n, the host reads the tokens of step n-1, admits work and prepares the
next batch; lanes that stop are noticed on the device (`slots.py`), so nothing is wrong in between.
Knows no row, no file and no template.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.cross_cache import cross_cache_for
from pipeline.engine.decode import Decoder
from pipeline.engine.extents import ExtentPool
from pipeline.engine.kv_cache import NUM_TRASH, KVCache
from pipeline.engine.memory import EngineSizes
from pipeline.engine.outcome import Outcomes
from pipeline.engine.prefill import encode_images, prefill
from pipeline.engine.sampler import SamplerMode
from pipeline.engine.schedule import Piece, Scheduler
from pipeline.engine.sequence import Sequence
from pipeline.engine.slots import Slots
from pipeline.engine.starts import Starter
from pipeline.engine.stats import EngineStats, StageTimer
from pipeline.engine.upload import Uploaded, Uploader
from pipeline.errors import RowError
from pipeline.feeder import END, Feed
from pipeline.kernels.transfer import to_device
from pipeline.models.base import Model
from pipeline.rows import Completion, Group, Prefix
from pipeline.settings import EngineSettings

OUT_OF_MEMORY = torch.OutOfMemoryError
MOST_PIXEL_BYTES = 1 << 30  # of images that wait on the device, as large as they were sent


@dataclass(slots=True)
class Step:
    """What the device was asked for and the host has not read yet."""

    lanes: list[tuple[int, Sequence]]  # column of `result`, sequence
    result: Tensor  # [2, n] tokens and states, on the host once `event` passed
    event: Any = None


class Engine:
    """Runs fed groups on one device; one engine serves many feeds, its prefix stays cached."""

    def __init__(
        self, model: Model, settings: EngineSettings, sizes: EngineSizes, outcomes: Outcomes
    ) -> None:
        c = model.decoder.config
        self.model = model
        self.settings = settings
        self.outcomes = outcomes
        self.cache = KVCache(
            c.num_cached_layers, c.num_kv_heads, sizes.num_places, c.head_dim, model.dtype,
            model.device, latent=c.mla is not None, float8=settings.kv_cache == "fp8",
        )  # fmt: skip
        self.slots = Slots(sizes.num_slots, model.device)
        pool = ExtentPool(NUM_TRASH, sizes.num_places)
        self.cross = cross_cache_for(model, sizes.num_state_places, sizes.num_slots + 1)
        state_pool = self.cross.pool if self.cross is not None else None
        self.scheduler = Scheduler(pool, sizes.num_slots, sizes.prefill_tokens, state_pool)
        longest = min(sizes.num_places, settings.max_context or model.family.context_length)
        self.decoder = Decoder(
            model, self.cache, self.slots, settings.cuda_graphs, longest, self.cross
        )
        self.starter = Starter(self.slots, outcomes, c.vocab_size, self.cross)
        self.uploader = Uploader(model.device)
        self.stats = EngineStats()
        self.timer = StageTimer(self.stats, model.device)
        self.running: dict[int, Sequence] = {}
        self._steps: deque[Step] = deque()
        self._mode = SamplerMode()
        self._fed = True  # more may come
        self._num_failed_steps = 0
        self._step_lanes = sizes.num_slots  # at most in one step
        self._num_started = 0  # sequences since the last step
        self.draining = False

    @torch.inference_mode()
    def run(self, feed: Feed) -> Iterator[Completion | None]:
        """Complete every fed request once, in any order. Ends with the feed.

        None comes now and then while there is nothing to do, so that the caller has its turn.
        """
        self._fed = True
        self.timer.begin()
        while True:
            starved = self._receive(feed)
            pieces = [] if self.draining else self.scheduler.next_batch(self._flushing())
            if pieces:
                self._prefill(pieces)
                if self._mode.guided:  # the first tokens decide what may follow
                    yield from self._collect(0)
            elif not self.running and self.scheduler.waiting and not self.draining:
                self.scheduler.reject_stuck()
            self.scheduler.batch_has_run()
            if pieces and self.running:
                self._receive(feed)  # what has come while the batch was asked for
            waits = bool(pieces) and self._waits_to_decode()
            ahead = waits or self._step()
            late = self.settings.overlap and not self._mode.guided and self.running
            yield from self._collect(1 if ahead and late else 0)
            if not self.running and (self.draining or self._idle()):
                self.timer.settle(wait=True)
                return
            if starved:
                yield None

    def _flushing(self) -> bool:
        """Whether a small batch is worth it, as nothing more comes or nothing runs."""
        return not self._fed or not self.running or self._full_of_pixels()

    def _waits_to_decode(self) -> bool:
        """Whether the next batch goes first: a step costs about the same however few lanes run.

        Rows that end with their first token leave their lanes free, so the wait is bounded.
        """
        bounded = self._num_started < self.slots.num_slots
        return bounded and self.scheduler.has_batch(self._flushing())

    def _idle(self) -> bool:
        return not (self._fed or self.scheduler.waiting or self._steps)

    # 1. receive

    def _receive(self, feed: Feed) -> bool:
        """Take what the feed has; wait for it only when the device has nothing to do.

        Returns whether the wait was in vain.
        """
        while self._fed and self._has_room() and not self.draining:
            starving = not self.running and not self.scheduler.waiting
            if starving:
                with self.timer.host("feed_wait"):
                    fed = feed.get(0.1)
            else:
                fed = feed.get(0)
            if fed is END:
                self._fed = False
            elif fed is not None:
                self._add(fed)
            else:
                return starving
        return False

    def _has_room(self) -> bool:
        """Whether less waits than the next two batches need."""
        short = self.scheduler.num_waiting_tokens < 2 * self.scheduler.prefill_tokens
        return short and not self._full_of_pixels()

    def _full_of_pixels(self) -> bool:
        return self.scheduler.num_waiting_bytes >= MOST_PIXEL_BYTES

    def _add(self, fed: Any) -> None:
        uploaded = self._upload(fed.images)
        fed.release()
        pixels = [_Pixels(uploaded, i) for i in uploaded.images]
        values = [p.image if isinstance(p.image, RowError) else p for p in pixels]
        if isinstance(fed.item, Prefix):
            self.scheduler.add_prefix(fed.item, values)
        else:
            assert isinstance(fed.item, Group)
            self.scheduler.add_group(fed.item, values, uploaded.num_bytes)

    def _upload(self, images: tuple[Any, ...]) -> Uploaded:
        """Copy the images; out of memory: once more, then their rows fail."""
        try:
            return self.uploader.upload(images)
        except OUT_OF_MEMORY:
            self._free_memory()
        try:
            return self.uploader.upload(images)
        except OUT_OF_MEMORY:
            error = RowError("out_of_memory", "The row's images do not fit the device's memory.")
            return Uploaded(tuple(i if isinstance(i, RowError) else error for i in images))

    def _free_memory(self) -> None:
        """After out of memory: give back what the allocator keeps."""
        self.stats.num_out_of_memory += 1
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    # 2. prefill

    def _prefill(self, pieces: list[Piece]) -> None:
        """Run the batch; on out-of-memory run its halves, and fail a piece that is alone."""
        try:
            self._run_prefill(pieces)
        except OUT_OF_MEMORY:
            self._free_memory()
            if len(pieces) == 1:
                self._prefill_alone(pieces[0])
                return
            self.scheduler.prefill_tokens = max(256, self.scheduler.prefill_tokens // 2)
            middle = len(pieces) // 2
            self._prefill(pieces[:middle])
            self._prefill([p for p in pieces[middle:] if not self._orphaned(p)])

    def _prefill_alone(self, piece: Piece) -> None:
        """Once more, now that cached memory was given back; then it fails."""
        try:
            self._run_prefill([piece])
        except OUT_OF_MEMORY:
            self._fail_piece(piece)

    def _run_prefill(self, pieces: list[Piece]) -> None:
        if not pieces:
            return
        images = [(pixels, image.layout) for p in pieces for image, pixels in p.images]
        for pixels, _ in images:
            pixels.uploaded.wait()
        with self.timer.stage("vision"):
            features = None
            if self.cross is not None:
                self.cross.fill(pieces)
            else:
                features = encode_images(self.model, [(p.image, layout) for p, layout in images])
        sequences = [p.sequence for p in pieces if p.sequence is not None]
        with self.timer.stage("prefill"):
            logits = prefill(self.model, self.cache, pieces, features, self.cross)
            if sequences:
                self._start(sequences, logits)
        self._count(pieces, len(images))

    def _start(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Draw first tokens and set the lanes going."""
        result = self.starter.start(sequences, logits)
        self.running.update((s.lane, s) for s in sequences)
        self._mode = SamplerMode.of(s.request for s in self.running.values())
        self._num_started += len(sequences)
        self._push(list(enumerate(sequences)), result)

    def _fail_piece(self, piece: Piece) -> None:
        error = RowError("out_of_memory", "The row does not fit the device's memory even alone.")
        if piece.sequence is not None:
            self._reject(piece.sequence, error)
        elif piece.owner is not None:
            piece.owner.error = error

    def _orphaned(self, piece: Piece) -> bool:
        """Whether a shared piece before this one failed; its sequence then fails too."""
        work = piece.work
        error = None
        if work is not None:
            error = work.error or (work.prefix.error if work.prefix is not None else None)
        if error is not None and piece.sequence is not None:
            self._reject(piece.sequence, error)
        return error is not None

    def _reject(self, sequence: Sequence, error: RowError) -> None:
        self.scheduler.rejected.append(sequence.completion("error", error))
        self.scheduler.retire(sequence)

    def _count(self, pieces: list[Piece], num_images: int) -> None:
        stats = self.stats
        stats.num_prefill_batches += 1
        stats.num_prefill_tokens += sum(p.num_tokens for p in pieces)
        stats.num_images += num_images
        stats.num_image_tokens += sum(i.layout.num_tokens for p in pieces for i, _ in p.images)
        for p in pieces:
            if p.sequence is not None:
                stats.num_prompt_tokens += p.sequence.request.num_tokens
                stats.num_cached_tokens += p.sequence.num_cached_tokens

    # 3. step

    def _step(self) -> bool:
        """Ask for one token more of each lane; whether there was one to ask for."""
        # NOTE: the host sees a step late that an answer has its full length, but knows it before.
        sequences = [s for s in self.running.values() if s.num_asked < s.most_tokens]
        if not sequences:
            return False
        self._num_started = 0
        sequences.sort(key=lambda s: -s.request.num_tokens)  # attention then ends on short work
        longest = max(s.request.num_tokens + s.num_asked for s in sequences)
        for first in range(0, len(sequences), self._step_lanes):
            part = sequences[first : first + self._step_lanes]
            try:
                with self.timer.stage("decode"):
                    result = self.decoder.step(part, self._mode, longest)
            except OUT_OF_MEMORY:
                self._shrink(part)
                return True
            for sequence in part:
                sequence.num_asked += 1
            self._push(list(enumerate(part)), result)
        self._num_failed_steps = 0
        self.stats.num_steps += 1
        self.stats.num_lane_steps += self.slots.num_slots
        self.stats.num_running_lane_steps += len(sequences)
        if self.scheduler.waiting:
            self.stats.num_busy_steps += 1
            self.stats.num_busy_lane_steps += len(sequences)
        return True

    def _shrink(self, part: list[Sequence]) -> None:
        """A step did not fit: again, then without graphs, then by halves; a lone row fails."""
        self._free_memory()
        self._num_failed_steps += 1
        if self._num_failed_steps == 1:
            return
        if self.decoder.graphs:
            self.decoder.drop_graphs()
            return
        if len(part) > 1:
            self._step_lanes = len(part) // 2
            return
        sequence = part[0]
        del self.running[sequence.lane]
        self.slots.give_back([sequence.lane])
        sequence.finished = True
        self._reject(sequence, RowError("out_of_memory"))

    def _push(self, lanes: list[tuple[int, Sequence]], result: Tensor) -> None:
        event = None
        if result.is_cuda:
            host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            result = host.copy_(result, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._steps.append(Step(lanes, result, event))

    # 4. collect

    def _collect(self, lag: int) -> Iterator[Completion]:
        """Read all but the latest `lag` steps; yield what ended."""
        rejected, self.scheduler.rejected = self.scheduler.rejected, []
        yield from rejected
        while len(self._steps) > lag:
            yield from self._read(self._steps.popleft())
        self.timer.settle()

    def _read(self, step: Step) -> Iterator[Completion]:
        if step.event is not None:
            step.event.synchronize()
        tokens, states = step.result.tolist()
        ended, masks = [], []
        for column, sequence in step.lanes:
            if sequence.finished:
                continue
            self.stats.num_output_tokens += 1
            completion = self.outcomes.take(sequence, tokens[column], states[column])
            if completion is None:
                if sequence.grammar is not None:
                    masks.append(sequence)
                continue
            sequence.finished = True
            ended.append(sequence)
            yield completion
        self._end(ended)
        for sequence in masks:
            assert self.slots.allowed is not None
            mask = self.outcomes.mask(sequence)
            if mask is not None:
                self.slots.allowed[sequence.lane] = to_device(mask, self.model.device)

    def _end(self, ended: list[Sequence]) -> None:
        if not ended:
            return
        self.slots.give_back([s.lane for s in ended])
        for sequence in ended:
            del self.running[sequence.lane]
            self.scheduler.retire(sequence)
        if not self.running:
            self._mode = SamplerMode()


@dataclass(slots=True)
class _Pixels:
    """One image of a fed item, with the copy that it must wait for."""

    uploaded: Uploaded
    image: Any
