"""Metrics that carry their own reducer, so that no reader has to guess from a name how to combine them.

A metric is measured in pieces (micro-batches, ranks, groups) and merged; only `value` divides. Names are listed and
explained in `docs/metrics.md`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Reducer = Literal["mean", "sum", "max", "last"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One piece of a measurement. `weight` counts what `total` was summed over and is read by the mean only."""

    reducer: Reducer
    total: float
    weight: float

    @property
    def value(self) -> float | None:
        """The number that is logged; None for a mean over nothing."""
        if self.reducer != "mean":
            return self.total
        return self.total / self.weight if self.weight else None

    def merge(self, other: "Metric") -> "Metric":
        if self.reducer != other.reducer:
            raise ValueError(f"cannot merge a {self.reducer} with a {other.reducer}")
        if self.reducer == "max":
            return Metric("max", max(self.total, other.total), self.weight + other.weight)
        if self.reducer == "last":
            return other
        return Metric(self.reducer, self.total + other.total, self.weight + other.weight)


Metrics = dict[str, Metric]


def mean(total: float, weight: float) -> Metric:
    """A mean, given as the sum of the values and their number."""
    return Metric("mean", float(total), float(weight))


def mean_of(values: Iterable[float]) -> Metric:
    values = list(values)
    return mean(sum(values), len(values))


def total(value: float) -> Metric:
    return Metric("sum", float(value), 1.0)


def largest(value: float) -> Metric:
    return Metric("max", float(value), 1.0)


def last(value: float) -> Metric:
    return Metric("last", float(value), 1.0)


def merge(parts: Iterable[Mapping[str, Metric]]) -> Metrics:
    """Merges the pieces name by name; a name that only some pieces have is kept as those pieces say."""
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The numbers to log. A mean over nothing is left out: it is not zero."""
    return {name: metric.value for name, metric in metrics.items() if metric.value is not None}
