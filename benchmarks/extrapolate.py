"""On paper: what the measured compute and the bytes of the collectives make on more GPUs.

A step of n GPUs takes its compute, as measured, and its collectives, as bytes over a rate, first
one after the other and then, where they do not wait for each other, at once. In a ring each GPU
sends ``2 (n - 1) / n`` of what an all-reduce gives it, and ``(n - 1) / n`` of what an all-gather or
a reduce-scatter goes through, so times are those bytes over the rate of a link in one direction.
"""

from __future__ import annotations

from typing import Any

from benchmarks import tables

Row = dict[str, Any]

#: Of a GPU to other hosts, each way: a network card of 400 Gb/s for each GPU, nine tenths used.
NETWORK_BYTES_PER_S = 0.9 * 50e9
HOST, FLEET = 8, 1024


def all_reduce_us(nbytes: float, count: int, rate: float) -> float:
    """Of a ring of ``count`` GPUs, whose links move ``rate`` bytes a second each way."""
    return 1e6 * 2 * (count - 1) / count * nbytes / rate


def all_gather_us(nbytes: float, count: int, rate: float) -> float:
    """Likewise, of what each has in the end; a reduce-scatter of as much takes as long."""
    return 1e6 * (count - 1) / count * nbytes / rate


def link_rate(rows: list[Row]) -> float | None:
    """Bytes a second each way, from the largest all-reduce that was timed alone."""
    found = [row for row in rows if row["variant"] == "all-reduce" and row.get("us")]
    if not found:
        return None
    row = max(found, key=lambda row: row["rows"])
    return 1e6 * 2 * (row["devices"] - 1) / row["devices"] * row["rows"] / row["us"]


def tensor_us(one_us: float, moved_bytes: float, count: int, rate: float) -> float:
    """An MLP over ``count`` GPUs of a host: its compute divided, and its sum, not overlapped."""
    return one_us / count + all_reduce_us(moved_bytes, count, rate)


def hybrid_us(
    compute_us: float, gathered: float, summed: float, local: float, network: float
) -> tuple[float, float]:
    """Weights divided over a host's 8 GPUs, and copies of that on 128 hosts.

    Args:
      compute_us: of a GPU's part of the batch.
      gathered: bytes of weights that each GPU gathers from its host in a step.
      summed: bytes of all gradients; a GPU has an eighth of them behind the reduce-scatter, which
        is summed over hosts.
      local: bytes a second of a link in the host, each way.
      network: likewise, between hosts.

    Returns:
      (microseconds with nothing overlapped, with all of it).
    """
    inside = all_gather_us(gathered, HOST, local) + all_gather_us(summed, HOST, local)
    outside = all_reduce_us(summed / HOST, FLEET // HOST, network)
    return compute_us + inside + outside, max(compute_us, inside, outside)


def _bytes(row: Row, *collectives: str) -> float:
    return 1e6 * sum(mb for what, mb in row["moved"].items() if what.split()[0] in collectives)


def parts(rows: list[Row]) -> list[str]:
    """Text and tables on ``rows`` of benchmarks/parallel.py."""
    rate = link_rate(rows)
    good = [row for row in rows if row.get("us")]
    if rate is None:
        return []
    lines: list[list[str]] = []
    number = tables.number

    def add(what: str, variant: str, one: float, nothing: float, everything: float) -> None:
        shares = [number(100 * one / us, "{:.0f} %") for us in (nothing, everything)]
        lines.append([what, variant, number(one / 1e3), number(nothing / 1e3), *shares])

    for row in good:
        if row["part"].startswith("MLP, tensor") and row["devices"] > 1:
            one = one_device(good, row)
            if one is None:
                continue
            us = tensor_us(one["us"], _bytes(row, "all-reduce"), HOST, rate)
            ideal = one["us"] / HOST
            add(f"MLP, tensor parallel on {HOST}", row["variant"], ideal, us, us)
        elif row["part"].startswith("MLPs, gradients") and row["devices"] > 1:
            one = one_device(good, row)
            if one is None:
                continue
            # Of a layer, whose collectives are in the loop over layers. Each device has its rows.
            compute = one["us"] / row["devices"] / row["layers"]
            gathered = _bytes(row, "all-gather")
            # A reduce-scatter leaves each device its part.
            summed = _bytes(row, "all-reduce") + row["devices"] * _bytes(row, "reduce-scatter")
            both = hybrid_us(compute, gathered, summed, rate, NETWORK_BYTES_PER_S)
            add(f"MLPs, gradients, on {FLEET}", row["variant"], compute, *both)
        elif row["part"].startswith("GPT") and row["devices"] > 1:
            one = one_device(good, row)
            if one is None:
                continue
            summed = _bytes(row, "all-reduce", "reduce-scatter")
            inside = all_reduce_us(summed, HOST, rate)
            add(f"GPT, data parallel on {HOST}", row["variant"], one["us"], *_both(one, inside))
            # Inside of the host, then an eighth of it over the hosts.
            outside = all_reduce_us(summed / HOST, FLEET // HOST, NETWORK_BYTES_PER_S)
            both = _both(one, inside + outside)
            add(f"GPT, data parallel on {FLEET}", row["variant"], one["us"], *both)
    if not lines:
        return []
    said = (
        "On paper, not measured: ms of a GPU's compute (as measured on one), ms with collectives"
        " that nothing hides, and the share of the compute in a step when nothing and when all"
        f" that can is hidden. {rate / 1e9:.0f} GB/s each way inside of a host, as the all-reduce"
        f" above, and {NETWORK_BYTES_PER_S / 1e9:.0f} GB/s for each GPU between hosts; latencies"
        f" are left out. {FLEET} GPUs: weights of the MLP divided over the {HOST} GPUs of a host"
        f" and copied on {FLEET // HOST} hosts, gradients summed over hosts an eighth on each GPU."
    )
    header = ["", "", "compute", "ms", "nothing hidden", "all hidden"]
    return [said, tables.markdown(header, lines)]


def _both(one: Row, collectives_us: float) -> tuple[float, float]:
    return one["us"] + collectives_us, max(one["us"], collectives_us)


def one_device(rows: list[Row], row: Row) -> Row | None:
    """What ``row`` is of on one device, where that was measured."""
    keys = ("part", "problem", "variant")
    same = (r for r in rows if r["devices"] == 1 and all(r[key] == row[key] for key in keys))
    return next(same, None)
