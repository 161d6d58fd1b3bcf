"""Where the time goes: names of kernels, and what their events add up to."""

import pathlib
import sys

import pytest

pytest.importorskip("tqdm")
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import profile


@pytest.mark.parametrize(
    "name, short",
    [
        ("void jax_fp8::(anonymous namespace)::gemv_kernel<(Type)1, 2>(Product)", "gemv_kernel"),
        ("nvjet_sm90_qqtst_64x8_64x16_4x1_v_bz_TNT", "nvjet_sm90_qqtst_64x8_64x16_4x1_v_bz_TNT"),
        ("loop_add_fusion_3", "loop_add_fusion_3"),
        ("a::b::zero_kernel(unsigned int*, long)", "zero_kernel"),
    ],
)
def test_names_are_short(name, short):
    assert profile.short_name(name) == short


def test_events_add_up():
    # Two units in each profiled run.
    events = [("void a::one<1>(int)", 3.0), ("void a::one<2>(int)", 1.0)] * profile.PROFILED
    events += [("two", 0.5)] * 2 * profile.PROFILED
    first, second = profile.kernels(events, 2)
    assert first == {"name": "one", "calls": 1.0, "us": 2.0}
    assert second == {"name": "two", "calls": 1.0, "us": 0.5}


def test_small_kernels_are_one_line():
    large, small = {"name": "one", "calls": 2.0}, {"calls": 1.0, "us": 0.05}
    kernels = [large | {"us": 9.9}, *({"name": name} | small for name in ("two", "three"))]
    row = {"work": "w", "variant": "v", "us": 10.0, "reading_us": 4.0, "kernels": kernels}
    lines = [line.split("|") for line in profile.table([row]).splitlines()]
    found = {cells[3].strip(): cells[5].strip() for cells in lines if cells[1:2] == [" w "]}
    assert found == {"all": "10", "reading": "4", "`one`": "9.9", "others": "0.1"}
