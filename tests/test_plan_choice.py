"""The choices of algorithms: modes, the cache, files; and, on a GPU, that what is kept is taken."""

import hashlib
import json
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import codes, operand, run_script

import jax_fp8
from jax_fp8._src import _ffi, plan_choice

HERE = str(pathlib.Path(__file__).parent)
GPU = "A GPU, 132 SMs"


def choice(
    problem, algorithm="id 66", candidates=8, ns=7300, origin="timed", gpu=GPU, version="13.1.0"
):
    return gpu, version, problem, algorithm, candidates, ns, origin


def kept():
    """Problem -> algorithm and origin."""
    return {each[2]: (each[3], each[6]) for each in _ffi.plan_choices()}


@pytest.fixture(autouse=True)
def cache(tmp_path):
    """A cache of its own, and nothing chosen."""
    folder = tmp_path / "cache"
    _ffi.clear_plan_choices()
    jax_fp8.set_plan_choice("timed", cache_dir=folder)
    yield folder / "plans.jsonl"
    _ffi.clear_plan_choices()
    jax_fp8.set_plan_choice()


def start_again(cache):
    """What a new process does."""
    _ffi.clear_plan_choices()
    jax_fp8.set_plan_choice("heuristic")
    jax_fp8.set_plan_choice("timed", cache_dir=cache.parent)


# --- Modes and places -----------------------------------------------------------------------------


def test_modes(cache):
    assert plan_choice.describe() == {"mode": "timed", "file": str(cache), "choices": 0}
    jax_fp8.set_plan_choice("heuristic", cache_dir=cache.parent)
    assert plan_choice.describe() == {"mode": "heuristic", "file": None, "choices": 0}
    jax_fp8.set_plan_choice(cache_dir="")
    assert plan_choice.describe() == {"mode": "timed", "file": None, "choices": 0}
    with pytest.raises(ValueError, match="mode must be one of 'timed', 'heuristic' or None, got"):
        jax_fp8.set_plan_choice("fastest")
    assert plan_choice.describe()["mode"] == "timed"


def test_places(monkeypatch, tmp_path):
    jax_fp8.set_plan_choice()
    for name in ("JAX_FP8_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan_choice.cache_file() == tmp_path / ".cache" / "jax_fp8" / "plans.jsonl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert plan_choice.cache_file() == tmp_path / "xdg" / "jax_fp8" / "plans.jsonl"
    monkeypatch.setenv("JAX_FP8_CACHE_DIR", str(tmp_path / "own"))
    assert plan_choice.cache_file() == tmp_path / "own" / "plans.jsonl"
    monkeypatch.setenv("JAX_FP8_CACHE_DIR", "")
    assert plan_choice.cache_file() is None
    jax_fp8.set_plan_choice(cache_dir=tmp_path / "given")
    assert plan_choice.cache_file() == tmp_path / "given" / "plans.jsonl"


def test_programs_of_several_processes_do_not_time():
    printed = run_script(
        """
        import socket, jax, jax_fp8
        from jax_fp8._src import plan_choice
        print(plan_choice.describe()["mode"])
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        jax.distributed.initialize(f"localhost:{port}", num_processes=1, process_id=0)
        print(plan_choice.describe()["mode"])
        jax_fp8.set_plan_choice("timed")
        print(plan_choice.describe()["mode"])
        """,
        JAX_PLATFORMS="cpu",
    )
    assert printed.split() == ["timed", "heuristic", "timed"]


# --- The cache ------------------------------------------------------------------------------------


def test_a_choice_is_on_disk_at_once_and_later_processes_have_it(cache):
    assert _ffi.keep_plan_choice(choice("(1, 16, 4096, 4096) fast", 'id 66, tile "10"')) != ""
    line = json.loads(cache.read_text())
    assert line == {
        "gpu": GPU,
        "cublaslt": "13.1.0",
        "problem": "(1, 16, 4096, 4096) fast",
        "algorithm": 'id 66, tile "10"',
        "candidates": 8,
        "ns": 7300,
    }
    start_again(cache)
    assert kept() == {"(1, 16, 4096, 4096) fast": ('id 66, tile "10"', "cached")}


def test_the_first_timing_in_a_process_decides_and_the_last_line_of_a_file(cache):
    assert _ffi.keep_plan_choice(choice("p", "first")) == "first"
    assert _ffi.keep_plan_choice(choice("p", "second")) == "first"
    assert len(cache.read_text().splitlines()) == 1
    with cache.open("a") as file:
        file.write(cache.read_text().replace("first", "third"))
    start_again(cache)
    assert kept() == {"p": ("third", "cached")}
    # Timed all the same: cublasLt did not offer what was kept.
    assert _ffi.keep_plan_choice(choice("p", "fourth")) == "fourth"
    start_again(cache)
    assert kept() == {"p": ("fourth", "cached")}


def test_other_gpus_and_versions_have_choices_of_their_own(cache):
    _ffi.keep_plan_choice(choice("p", "one"))
    assert _ffi.keep_plan_choice(choice("p", "two", gpu="Another GPU, 60 SMs")) == "two"
    assert _ffi.keep_plan_choice(choice("p", "three", version="13.2.0")) == "three"
    start_again(cache)
    assert sorted(each[3] for each in _ffi.plan_choices()) == ["one", "three", "two"]


def test_a_damaged_file_costs_its_damaged_lines_and_a_warning(cache):
    _ffi.keep_plan_choice(choice("good"))
    good = cache.read_text()
    damaged = [
        good[: len(good) // 2] + "\n",
        "[" * 100_000 + "\n",
        good.replace("7300", '"7300"'),
        good.replace("7300", "-1"),
        good.replace("7300", str(1 << 64)),
        good.replace('"candidates": 8', '"candidates": true'),
        '{"gpu": "A GPU"}\n',
        "[1, 2]\n",
        "\n",
    ]
    cache.write_bytes(b"\xff\x00\xfe\n" + "".join(damaged).encode() + good.encode())
    with pytest.warns(UserWarning, match=r"10 line\(s\) are no choices .* first is line 1; "):
        start_again(cache)
    assert kept() == {"good": ("id 66", "cached")}


def test_a_file_that_cannot_be_read_is_a_warning(cache):
    cache.mkdir(parents=True)  # A folder of that name.
    with pytest.warns(UserWarning, match="cannot be read: .*plans.jsonl"):
        start_again(cache)


@pytest.mark.parametrize("where", ["a file", "full"])
def test_a_file_that_cannot_be_written_is_said_once(cache, capfd, where):
    if where == "a file":
        cache.parent.write_text("")
    else:
        cache.parent.mkdir()
        cache.symlink_to("/dev/full")
    for problem in ("p", "q"):
        assert _ffi.keep_plan_choice(choice(problem)) == "id 66"
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert str(cache) in said
    assert ("No space left" if where == "full" else "Not a directory") in said
    assert len(kept()) == 2


def test_writers_do_not_disturb_each_other(cache):
    script = """
    import sys
    from jax_fp8._src import _ffi
    _ffi.set_plan_choice(True, {file!r})
    for i in range(200):
        _ffi.keep_plan_choice(("gpu", "13", f"{{i}} {{'x' * i}}", "{name}", 8, i, "timed"))
    """
    threads = [
        threading.Thread(target=run_script, args=[script.format(file=str(cache), name=name)])
        for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    choices, faults = plan_choice._parse(cache.read_text())
    assert not faults
    assert sorted((each[3], each[5]) for each in choices) == [
        (name, i) for name in "abcd" for i in range(200)
    ]


def test_clearing(cache):
    _ffi.keep_plan_choice(choice("p"))
    jax_fp8.clear_plans()
    assert len(kept()) == 1 and cache.exists()
    jax_fp8.clear_plans(choices=True)
    assert kept() == {} and not cache.exists()
    jax_fp8.clear_plans(choices=True)  # Nothing left to clear.
    _ffi.keep_plan_choice(choice("p"))
    assert cache.exists()


# --- Export and import ----------------------------------------------------------------------------


def test_export_and_import(cache, tmp_path):
    for problem in ("p", "q"):
        _ffi.keep_plan_choice(choice(problem))
    path = tmp_path / "table.jsonl"
    path.write_text("something older")
    assert jax_fp8.export_plans(path) == 2
    assert sorted(path.read_text().splitlines()) == sorted(cache.read_text().splitlines())
    assert list(tmp_path.glob("table*")) == [path]
    jax_fp8.clear_plans(choices=True)
    assert jax_fp8.import_plans(path) == 2
    assert kept() == {"p": ("id 66", "imported"), "q": ("id 66", "imported")}
    assert not cache.exists()


def test_imported_choices_come_before_others(cache, tmp_path):
    path = tmp_path / "table.jsonl"
    _ffi.keep_plan_choice(choice("p", "imported"))
    jax_fp8.export_plans(path)
    jax_fp8.clear_plans(choices=True)
    _ffi.keep_plan_choice(choice("p", "timed"))
    jax_fp8.import_plans(path)
    assert kept() == {"p": ("imported", "imported")}
    jax_fp8.set_plan_choice("heuristic")
    jax_fp8.set_plan_choice("timed", cache_dir=cache.parent)  # Reads the cache again.
    assert kept() == {"p": ("imported", "imported")}


def test_a_damaged_table_is_refused_whole(cache, tmp_path):
    path = tmp_path / "table.jsonl"
    _ffi.keep_plan_choice(choice("p"))
    path.write_text(cache.read_text() + "damage\n")
    jax_fp8.clear_plans(choices=True)
    with pytest.raises(ValueError, match="table.jsonl: not a choice of an algorithm: line 2"):
        jax_fp8.import_plans(path)
    assert kept() == {}
    with pytest.raises(FileNotFoundError):
        jax_fp8.import_plans(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        jax_fp8.export_plans(tmp_path / "no folder" / "table")


# --- On a GPU -------------------------------------------------------------------------------------

SHAPES = ((64, 768, 1024), (17, 768, 1024), (640, 1024, 512))
#: Of so much arithmetic that the last of a race run alone.
HOT = (4096, 2048, 4096)


def multiply(x, w, **options):
    """One product, compiled anew, and what the journal says of it."""
    jax.clear_caches()
    jax_fp8.clear_plans()
    y = np.asarray(jax_fp8.scaled_matmul(x, w, implementation="cublaslt", **options))
    (plan,) = (p for p in jax_fp8.plans() if p["operation"] == "scaled_matmul")
    return y, plan


PRECISE = {"preferred_element_type": jnp.float32, "precision": "highest"}


def assert_right(y, x, w):
    expected, magnitudes = ref.product(x, w)
    ref.assert_close(y, expected, ref.arbitrary_error(magnitudes))


PROCESS = """
import sys; sys.path.append({here!r})
import hashlib, json
import jax, numpy as np
import jax_fp8
from cases import codes
rng = np.random.default_rng(0)

@jax.jit
def run(operands):
    return [jax_fp8.scaled_matmul(x, w, implementation="cublaslt") for x, w in operands]

operands = [
    (codes(rng, (m, k), granularity=g), codes(rng, (n, k), granularity=g))
    for m, n, k in {shapes!r} for g in ("tensor", "row")
]
digests = set()
for _ in range(4):  # The later ones replay a graph.
    results = [np.asarray(y).tobytes() for y in run(operands)]
    digests.add(hashlib.sha256(b"".join(results)).hexdigest())
plans = [p for p in jax_fp8.plans() if "algorithm" in p]
print(json.dumps(dict(
    digests=sorted(digests),
    chosen=[[p["shape"], p["granularity"], p["algorithm"]] for p in plans],
    choices=sorted(dict.fromkeys(p["choice"] for p in plans)),
)))
"""


@pytest.mark.gpu
def test_the_next_process_takes_the_same_and_gives_the_same_bits(cache):
    script = PROCESS.format(here=HERE, shapes=SHAPES)
    first, second = (
        json.loads(run_script(script, JAX_FP8_CACHE_DIR=str(cache.parent)).splitlines()[-1])
        for _ in range(2)
    )
    assert len(first["digests"]) == 1
    assert first["choices"] == ["timed"] and second["choices"] == ["cached"]
    assert first["digests"] == second["digests"]
    assert first["chosen"] == second["chosen"]
    assert len(cache.read_text().splitlines()) == len(first["chosen"]) == 2 * len(SHAPES)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("shape", [*SHAPES, HOT])
def test_what_is_timed_is_right_and_the_operands_are_left_alone(cache, shape, granularity):
    m, n, k = shape
    rng = np.random.default_rng(1)
    x = codes(rng, (m, k), granularity=granularity)
    w = codes(rng, (n, k), granularity=granularity)
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((x, w))]
    y, plan = multiply(x, w, **PRECISE)
    assert plan["choice"] == "timed" and plan["candidates"] > 1
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((x, w))] == before
    assert_right(y, x, w)
    assert len(cache.read_text().splitlines()) == 1


@pytest.mark.gpu
def test_heuristic_times_nothing(cache, rng):
    jax_fp8.set_plan_choice("heuristic", cache_dir=cache.parent)
    x, w = operand(rng, (40, 512)), operand(rng, (768, 512))
    assert multiply(x, w)[1]["choice"] == "heuristic"
    assert not cache.exists() and kept() == {}


@pytest.mark.gpu
def test_modes_change_between_calls(cache, rng, tmp_path):
    x, w = operand(rng, (48, 512)), operand(rng, (768, 512))
    assert multiply(x, w)[1]["choice"] == "timed"
    jax_fp8.export_plans(tmp_path / "table")
    jax_fp8.set_plan_choice("heuristic")
    assert multiply(x, w)[1]["choice"] == "heuristic"
    jax_fp8.import_plans(tmp_path / "table")
    assert multiply(x, w)[1]["choice"] == "imported"
    jax_fp8.set_plan_choice("timed", cache_dir=cache.parent)
    assert multiply(x, w)[1]["choice"] == "imported"
    start_again(cache)
    assert multiply(x, w)[1]["choice"] == "cached"
    jax_fp8.clear_plans(choices=True)
    assert multiply(x, w)[1]["choice"] == "timed"


@pytest.mark.gpu
def test_without_memory_it_is_the_heuristic_and_the_journal_says_so(cache, rng):
    x, w = operand(rng, (56, 512)), operand(rng, (768, 512))
    _ffi.limit_timing_memory(1 << 20)
    try:
        y, plan = multiply(x, w, **PRECISE)
    finally:
        _ffi.limit_timing_memory((1 << 63) - 1)
    assert plan["choice"] == "heuristic: out of memory"
    assert_right(y, x, w)
    assert not cache.exists()


@pytest.mark.gpu
def test_an_algorithm_that_is_not_offered_is_not_taken(cache, rng):
    x, w = operand(rng, (72, 512)), operand(rng, (768, 512))
    plan = multiply(x, w)[1]
    line = cache.read_text()
    cache.write_text(line.replace(json.loads(line)["algorithm"], "id 66, tile 9999"))
    start_again(cache)
    assert list(kept().values()) == [("id 66, tile 9999", "cached")]
    again = multiply(x, w)[1]
    assert again["choice"] == "timed" and "9999" not in again["algorithm"]
    assert again["candidates"] == plan["candidates"]
    start_again(cache)
    assert multiply(x, w)[1]["choice"] == "cached"


@pytest.mark.gpu
def test_threads_that_meet_a_problem_together_agree(cache, rng):
    x, w = operand(rng, (80, 512)), operand(rng, (768, 512))
    digests = []

    def work():  # Each compiles a program of its own.
        y = jax.jit(lambda x, w: jax_fp8.scaled_matmul(x, w, implementation="cublaslt"))(x, w)
        y = np.asarray(y)
        digests.append(hashlib.sha256(y.tobytes()).hexdigest())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 4 and len(set(digests)) == 1
    assert len(cache.read_text().splitlines()) == 1
