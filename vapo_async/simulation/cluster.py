"""What is simulated: engines, learner, lengths, publication and failures, typed and read from YAML."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from vapo_async.config import ConfigError
from vapo_async.config.described import read_described


def _at_least(least: float, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"least": least})


def _above(bound: float, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"above": bound})


@dataclass(frozen=True)
class BatchSizes:
    """``algorithm.groups_per_batch`` and ``group_size``."""

    groups: int = _at_least(1)
    """B."""
    group_size: int = _at_least(1, 1)
    """G."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a response: log-normal, or drawn from a histogram; and of its prompt."""

    median_tokens: float | None = _above(0, None)
    sigma: float = _at_least(0, 0.0)
    """Standard deviation of the logarithm; 0 = all responses have the median's length."""
    histogram: dict[int, float] | None = None
    """Upper bound in tokens → weight. A length is uniform between the bound before it and its own."""
    max_tokens: int | None = _at_least(1, None)
    """The length limit, which cuts; null = none."""
    prompt_tokens: int = _at_least(0, 0)


@dataclass(frozen=True)
class Rollout:
    """The rollout workers, each with an engine of its own."""

    workers: int = _at_least(1)
    tokens_per_s_alone: float = _above(0)
    """Of a response that is decoded alone."""
    slots: int | None = _at_least(1, None)
    """Responses decoded together by one worker; null = as many as there are."""
    ask_ahead: float = _at_least(0, 0.0)
    """Responses that a worker takes in beyond its slots, by its slots: they wait there. 0 = what the slots hold."""
    tokens_per_s_full: float | None = _above(0, None)
    """Of a worker whose slots are all taken; the time of a decode step is linear in between. null = no slower."""
    prefill_tokens_per_s: float | None = _above(0, None)
    """A worker that prefills does not decode. A prompt is prefilled once for its G responses. null = takes no time."""
    mtbf_s: float | None = _above(0, None)
    """Mean time between failures of one worker, exponential; null = never."""
    restart_s: float = _at_least(0, 60.0)
    """Until a lost worker is replaced."""


@dataclass(frozen=True)
class Publication:
    """From trained weights to engines that decode with them."""

    transfer_s: float = _at_least(0, 0.0)
    """The learner waits for it: the version counts when every worker has the weights."""
    transfer_doubling_s: float = _at_least(0, 0.0)
    """More of it for every doubling of the workers: a broadcast along a tree."""
    stall_s: float = _at_least(0, 0.0)
    """Every worker stands still for it."""
    recompute_kv: bool = False
    """Then each worker prefills what it has in flight again (``kv_cache_on_update: recompute``)."""


@dataclass(frozen=True)
class Learner:
    """Time of one batch: ``fixed_s`` + tokens of prompts and responses / ``tokens_per_s``."""

    fixed_s: float = _at_least(0, 0.0)
    tokens_per_s: float | None = _above(0, None)
    """null = tokens take no time."""


@dataclass(frozen=True)
class Stragglers:
    """``buffer.on_straggler=drop``: the group that the learner waits for is cancelled after a time limit."""

    timeout_s: float | None = _above(0, None)
    """null = it is waited for."""
    max_drops: int = _at_least(0, 2)
    """Times that one prompt may be dropped."""


@dataclass(frozen=True)
class Cluster:
    """One file of ``benchmarks/clusters/``."""

    name: str
    batch: BatchSizes
    lengths: Lengths
    rollout: Rollout
    publication: Publication = field(default_factory=Publication)
    learner: Learner = field(default_factory=Learner)
    stragglers: Stragglers = field(default_factory=Stragglers)

    def __post_init__(self) -> None:
        lengths, rollout = self.lengths, self.rollout
        if (lengths.median_tokens is None) == (lengths.histogram is None):
            raise ConfigError("lengths: give median_tokens or histogram, one of them")
        if rollout.tokens_per_s_full is not None:
            if rollout.slots is None:
                raise ConfigError("rollout.tokens_per_s_full: what full is has to be said by rollout.slots")
            alone, full = rollout.tokens_per_s_alone, rollout.tokens_per_s_full
            if not alone <= full <= alone * rollout.slots:
                raise ConfigError(
                    f"rollout.tokens_per_s_full is {full:g}, expected {alone:g} to {alone * rollout.slots:g}: between "
                    "tokens_per_s_alone and slots times it"
                )
        if self.publication.recompute_kv and rollout.prefill_tokens_per_s is None:
            raise ConfigError("publication.recompute_kv takes no time without rollout.prefill_tokens_per_s: give it")

    @property
    def transfer_s(self) -> float:
        """Of one publication, to all workers."""
        publication = self.publication
        return publication.transfer_s + publication.transfer_doubling_s * (self.rollout.workers - 1).bit_length()


def read_cluster(path: Path) -> Cluster:
    """Raises ``ConfigError`` (one line: file, key, found, expected) for any mistake."""
    return read_described("cluster", path, parse_cluster)


def parse_cluster(loaded: object) -> Cluster:
    """The same from nested plain data."""
    found = _section(Cluster, loaded, "")
    assert isinstance(found, Cluster)
    return found


def _section(kind: type, loaded: object, where: str) -> Any:
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{where or 'the file'} is {loaded!r}, expected a section with keys")
    known = {f.name: f for f in fields(kind)}
    prefix = f"{where}." if where else ""
    for key in loaded:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"unknown key '{prefix}{key}'; {hint}")
    hints, values = get_type_hints(kind), {}
    for name, about in known.items():
        if name in loaded:
            values[name] = _value(hints[name], loaded[name], prefix + name, about.metadata)
        elif about.default is MISSING and about.default_factory is MISSING:
            raise ConfigError(f"key '{prefix}{name}' is missing")
    return kind(**values)


def _value(kind: Any, found: object, where: str, bounds: Mapping[str, float]) -> Any:
    if isinstance(kind, UnionType):
        if found is None:
            return None
        kind = next(option for option in get_args(kind) if option is not NoneType)
    if hasattr(kind, "__dataclass_fields__"):
        return _section(kind, found, where)
    if get_origin(kind) is dict:
        return _histogram(found, where)
    wanted = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}[kind]
    least, above = bounds.get("least"), bounds.get("above")
    wanted += f" >= {least:g}" if least is not None else f" > {above:g}" if above is not None else ""
    typed = isinstance(found, (int, float) if kind is float else kind)
    if not typed or (isinstance(found, bool) and kind is not bool):
        raise ConfigError(f"{where} is {found!r}, expected {wanted}")
    # Written so that .nan does not pass.
    if isinstance(found, (int, float)) and not (
        (least is None or found >= least) and (above is None or found > above) and abs(found) < float("inf")
    ):
        raise ConfigError(f"{where} is {found!r}, expected {wanted}")
    return kind(found)


def _histogram(found: object, where: str) -> dict[int, float]:
    good = isinstance(found, Mapping) and all(
        type(bound) is int and bound >= 1 and type(weight) in (int, float) and 0 <= weight < float("inf")
        for bound, weight in found.items()
    )
    if not good or not isinstance(found, Mapping) or sum(found.values()) <= 0:
        raise ConfigError(
            f"{where} is {found!r}, expected upper bounds in tokens with their weights: {{128: 3, 256: 1}}"
        )
    return {bound: float(found[bound]) for bound in sorted(found)}
