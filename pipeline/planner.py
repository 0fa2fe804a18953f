"""Requests become a plan: shared prefixes, groups that share images, long work first.

The plan is a list of items in the engine's order. A `Prefix` precedes the groups that use it and
stays the current one until the next; one without tokens ends sharing. Knows no model and no
device. Imports no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.rows import Group, PlacedImage, Prefix, Request
from pipeline.settings import EngineSettings

MAX_PADDING = 0.03  # of a bucket's rectangle
DEFAULT_BUCKET_TOKENS = 16_384
MAX_GROUP_REQUESTS = 64
MAX_GROUP_TOKENS = 16_384
MIN_SHARED_TEXT = 32  # tokens that requests of one row share before they form a group
_CLUSTER_TOKENS = 32  # leading tokens that name a cluster
_MIN_CLUSTER = 64  # requests that deserve a prefix of their own
_MAX_CLUSTERS = 8
_WORTH_TOKENS = 2048  # prefill saved, below which the current prefix is kept


@dataclass(slots=True)
class PlanStats:
    """What a plan saves and wastes; `add` sums plans of one job."""

    num_requests: int = 0
    num_groups: int = 0
    num_buckets: int = 0
    prompt_tokens: int = 0  # of all requests, as if nothing were shared
    prefill_tokens: int = 0  # computed once sharing is taken into account
    prefix_tokens_reused: int = 0
    image_tokens_reused: int = 0  # shared in a group, beyond the prefix
    num_images: int = 0  # of all requests
    num_images_encoded: int = 0
    rectangle_tokens: int = 0  # prefill tokens with padding

    @property
    def padding_share(self) -> float:
        """Share of the buckets' rectangles that no token fills."""
        grouped = self.prompt_tokens - self.prefix_tokens_reused - self.image_tokens_reused
        return 1 - grouped / self.rectangle_tokens if self.rectangle_tokens else 0.0

    def add(self, other: PlanStats) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Plan:
    """Items in the engine's order; `buckets` are index ranges of groups of like length."""

    items: list[Prefix | Group] = field(default_factory=list)
    buckets: list[tuple[int, int]] = field(default_factory=list)
    stats: PlanStats = field(default_factory=PlanStats)


class Planner:
    """Plans one window of requests after the other and remembers the current prefix."""

    def __init__(
        self, settings: EngineSettings, shares: bool = True, whole_images: bool = False
    ) -> None:
        """`shares` is False for engines that share nothing, whatever the settings say.

        With `whole_images` requests share only where all their images are the same, and only past
        the last of them: there even tokens before an image depend on it.
        """
        self._whole_images = whole_images
        self._share_prefix = shares and settings.share_prefix and not whole_images
        self._share_images = shares and settings.share_images
        tokens = settings.prefill_tokens
        self._bucket_tokens = DEFAULT_BUCKET_TOKENS if tokens == "auto" else tokens
        self._prefix: Prefix | None = None

    def plan(self, requests: Iterable[Request]) -> Plan:
        """Order all of `requests`; each stands in exactly one group."""
        plan = Plan()
        for cluster in self._clusters(list(requests)):
            prefix = self._choose_prefix(cluster) if self._share_prefix else None
            self._send(prefix, plan)
            length = len(prefix.tokens) if prefix else 0
            for groups in _by_answer_length(self._groups(cluster, length)):
                self._append(groups, plan)
        return plan

    # 1. prefixes

    def _clusters(self, requests: list[Request]) -> list[list[Request]]:
        """Requests by their opening, where that lets many share a longer prefix."""
        if not requests:
            return []
        if not self._share_prefix or len(requests) < 2 * _MIN_CLUSTER:
            return [requests]
        by_opening: dict[bytes, list[Request]] = defaultdict(list)
        for request in requests:
            by_opening[_opening(request)].append(request)
        large = [members for members in by_opening.values() if len(members) >= _MIN_CLUSTER]
        if len(by_opening) == 1 or not large:
            return [requests]
        large = sorted(large, key=len, reverse=True)[:_MAX_CLUSTERS]
        apart = {id(request) for members in large for request in members}
        rest = [request for request in requests if id(request) not in apart]
        clusters = [*large, rest] if rest else large
        return self._current_first(clusters)

    def _current_first(self, clusters: list[list[Request]]) -> list[list[Request]]:
        """Begin with the cluster that uses the current prefix, if any does."""
        current = self._prefix
        if current is None:
            return clusters
        return sorted(clusters, key=lambda members: not _begins_with(members[0], current))

    def _choose_prefix(self, requests: Sequence[Request]) -> Prefix | None:
        current = self._prefix
        kept = current is not None and all(_begins_with(r, current) for r in requests)
        held = len(current.tokens) if current is not None and kept else 0
        if kept and len(requests) < 2:
            return current
        first, num_tokens = requests[0], _common_prefix(requests)
        if len({request.key[:2] for request in requests}) < 2:
            num_tokens = held  # one row: its own sharing is a group's
        if kept and (num_tokens - held) * len(requests) < _WORTH_TOKENS:
            return current
        if not num_tokens:
            return None
        return Prefix(
            tokens=first.tokens[:num_tokens],
            images=tuple(image for image in first.images if image.start < num_tokens),
            positions=first.positions[:, :num_tokens],
        )

    def _send(self, prefix: Prefix | None, plan: Plan) -> None:
        """Append `prefix` unless it is the current one already."""
        if prefix is self._prefix:
            return
        if prefix is None:
            assert self._prefix is not None
            axes = self._prefix.positions[:, :0]
            plan.items.append(Prefix(np.zeros(0, np.int32), (), axes))
        else:
            plan.items.append(prefix)
            plan.stats.prefill_tokens += len(prefix.tokens)
            plan.stats.num_images_encoded += len(prefix.images)
        self._prefix = prefix

    # 2. groups

    def _groups(self, requests: Sequence[Request], num_prefix: int) -> list[Group]:
        if not self._share_images:
            return [Group((request,), num_prefix, num_prefix) for request in requests]
        by_start: dict[object, list[Request]] = defaultdict(list)
        for request in requests:
            key = _sharing_key(request, num_prefix)
            if self._whole_images:
                key = key, tuple((i.image.digest, i.layout) for i in request.images)
            by_start[key].append(request)
        groups = []
        for members in by_start.values():
            for part in _limited(members, num_prefix):
                groups += _group(part, num_prefix, self._whole_images)
        return groups

    # 3. buckets

    def _append(self, groups: Sequence[Group], plan: Plan) -> None:
        stats = plan.stats
        lengths = [group.num_prefill_tokens for group in groups]
        for start, stop in bucket_ranges(lengths, self._bucket_tokens):
            first = len(plan.items)
            plan.items += groups[start:stop]
            plan.buckets.append((first, first + stop - start))
            stats.num_buckets += 1
            stats.rectangle_tokens += (stop - start) * groups[start].num_prefill_tokens
        for group in groups:
            _count(group, stats)


def _by_answer_length(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """Groups whose answers may be longest first, so that a run does not end on a few long ones.

    Answers whose bounds lie within a factor of two count as equal; equal ones go by prefill length,
    longest first. Source: Graham, "Bounds on multiprocessing timing anomalies" (1969).
    """
    classes: dict[int, list[Group]] = defaultdict(list)
    for group in groups:
        longest = max(request.sampling.max_new_tokens for request in group.requests)
        classes[longest.bit_length()].append(group)
    for _, members in sorted(classes.items(), reverse=True):
        yield sorted(members, key=lambda group: -group.num_prefill_tokens)


def bucket_ranges(lengths: Sequence[int], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut descending `lengths` into ranges whose rectangle fits and is nearly full."""
    start, filled = 0, 0
    for index, length in enumerate(lengths):
        rectangle = lengths[start] * (index + 1 - start)
        wasted = rectangle - filled - length
        if index > start and (rectangle > max_tokens or wasted > MAX_PADDING * rectangle / 2):
            yield start, index
            start, filled = index, 0
        filled += length
    if start < len(lengths):
        yield start, len(lengths)


def _count(group: Group, stats: PlanStats) -> None:
    requests = group.requests
    stats.num_requests += len(requests)
    stats.num_groups += 1
    stats.prompt_tokens += sum(request.num_tokens for request in requests)
    stats.prefill_tokens += group.num_prefill_tokens
    stats.prefix_tokens_reused += group.num_prefix_tokens * len(requests)
    stats.image_tokens_reused += (group.num_shared_tokens - group.num_prefix_tokens) * (
        len(requests) - 1
    )
    stats.num_images += sum(len(request.images) for request in requests)
    stats.num_images_encoded += len(group.images)


def _opening(request: Request) -> bytes:
    """The leading text tokens, up to the first image."""
    stop = request.images[0].start if request.images else request.num_tokens
    return request.tokens[: min(stop, _CLUSTER_TOKENS)].tobytes()


def _same_image(one: PlacedImage, other: PlacedImage) -> bool:
    return (
        one.start == other.start
        and one.image.digest == other.image.digest
        and one.layout == other.layout
    )


def _begins_with(request: Request, prefix: Prefix) -> bool:
    length = len(prefix.tokens)
    if request.num_tokens <= length or not np.array_equal(request.tokens[:length], prefix.tokens):
        return False
    leading = [image for image in request.images if image.start < length]
    return len(leading) == len(prefix.images) and all(map(_same_image, leading, prefix.images))


def _common_prefix(requests: Sequence[Request]) -> int:
    """Leading tokens equal in all requests, images too; at least one token is left to each."""
    first = requests[0]
    common = min(request.num_tokens for request in requests) - 1
    for request in requests[1:]:
        differing = np.flatnonzero(first.tokens[:common] != request.tokens[:common])
        common = int(differing[0]) if len(differing) else common
        common = _cut_at_images(first, request, common)
    return _outside_images(first, common)


def _cut_at_images(first: Request, other: Request, common: int) -> int:
    """`common`, cut where the first image differs that begins before it."""
    for number in range(max(len(first.images), len(other.images))):
        one = first.images[number] if number < len(first.images) else None
        two = other.images[number] if number < len(other.images) else None
        if one is not None and two is not None and _same_image(one, two):
            continue
        starts = [image.start for image in (one, two) if image is not None]
        return min(common, *starts)
    return common


def _outside_images(request: Request, length: int) -> int:
    for image in request.images:
        if image.start < length < image.start + image.layout.num_tokens:
            return image.start
    return length


def _sharing_key(request: Request, num_prefix: int) -> object:
    """Requests of one key share something after the prefix: an image, or a row's long text."""
    for image in request.images:
        if image.start >= num_prefix:
            before = request.tokens[num_prefix : image.start].tobytes()
            return image.image.digest, image.layout, before
    return request.key.shard, request.key.row


def _limited(requests: Sequence[Request], num_prefix: int) -> Iterator[list[Request]]:
    """Requests in parts of bounded size, longest first."""
    part: list[Request] = []
    tokens = 0
    for request in sorted(requests, key=lambda r: -r.num_tokens):
        own = request.num_tokens - num_prefix
        if part and (len(part) == MAX_GROUP_REQUESTS or tokens + own > MAX_GROUP_TOKENS):
            yield part
            part, tokens = [], 0
        own_after_first = own if not part else own - _shared_after(part[0], request, num_prefix)
        part.append(request)
        tokens += own_after_first
    if part:
        yield part


def _shared_after(first: Request, request: Request, num_prefix: int) -> int:
    return max(_common_prefix((first, request)) - num_prefix, 0)


def _group(requests: Sequence[Request], num_prefix: int, whole: bool = False) -> list[Group]:
    """One group, or one a request where sharing is not worth it, or not right."""
    shared = _common_prefix(requests) if len(requests) > 1 else num_prefix
    covers_image = any(num_prefix <= image.start < shared for image in requests[0].images)
    cut = whole and any(image.start >= shared for r in requests for image in r.images)
    if cut or shared < num_prefix or not (covers_image or shared - num_prefix >= MIN_SHARED_TEXT):
        return [Group((request,), num_prefix, num_prefix) for request in requests]
    return [Group(tuple(requests), num_prefix, shared)]
