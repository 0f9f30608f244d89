"""The benchmarks' own arithmetic: counts, medians, goals, exponents, tables, memory."""

import ctypes
from dataclasses import replace

import pytest
import torch

from bench import accuracy, fits, goals, machine, plots, scaling, tables, timing
from bench.goals import Goal
from bench.memory import CLEAR, extra_bytes, measure_memory, saved_bytes
from bench.peers import (
    EAGER,
    Implementation,
    check_equal,
    eager,
    fused,
    oracle,
    outputs_and_gradients,
    peers,
)
from bench.records import WRONG_RESULT, select
from bench.routing import Settings, measure_routing
from bench.shapes import MNIST, SHAPES, SHARED, Convolution, Shape, make_inputs
from bench.timing import CpuTimer, Timing, interleave

SMALL = Shape("small", 12, 3, K=4, D=5)
SMALL_WINDOWS = Convolution("small windows", 2 * 3**2, 3, K=4, D=5, grid=8)
CEILINGS = {"gemm": 1e11, "copy": 1e10}
OF_EAGER = Goal(
    "forward", goals.speedup(goals.EAGER, goals.layer("forward", 128)), tables.ratio, least=30
)


def routing_record(family: str, seconds: float, **fields: object) -> dict:
    return {
        "table": "routing",
        "case": "MNIST",
        "B": 128,
        "pass": "forward",
        "precision": "ieee",
        "dtype": "float32",
        "implementation": family,
        "family": family,
        "operations": 1e9,
        "bytes": 1e7,
        "product_rate": 1e11,
        "seconds": seconds,
        "spread": seconds / 10,
        "status": "ok",
    } | fields


def test_operations_are_those_of_the_paper_account():
    """By hand, MNIST: N = 160, forward 3 * 160 * 8 + 4 * 160 multiply-adds for each (b, i)."""
    assert MNIST.forward_operations(128) == 2 * 128 * 1152 * 4480
    assert MNIST.backward_operations(1) == 2 * 1152 * (2 * (1280 + 480) + 3 * 1280 + 9 * 160)
    assert MNIST.operations(7, 3, True) == MNIST.forward_operations(7) + MNIST.backward_operations(
        7
    )
    assert {s.name: s.prediction_bytes(128) // 2**20 for s in SHAPES}["many classes"] == 5929


def test_operations_with_shared_weights_are_those_of_contracted_ones():
    """32 weights: 160 * 8 multiply-adds a product with a state, and 8 for each pair (i, j)."""
    products, pairs = 32 * 1280, 1152 * 8
    assert SHARED.forward_operations(128) == 2 * 128 * (5 * products + pairs + 4 * 10 * pairs)
    backward = (6 + 10) * products + pairs + (6 + 12) * 10 * pairs
    assert SHARED.backward_operations(1) == 2 * backward
    assert replace(SHARED, weight_sharing=1).operations(1, 3, True) == MNIST.operations(1, 3, True)


@pytest.mark.parametrize(
    "shape",
    [SMALL, replace(SMALL, weight_sharing=2), SMALL_WINDOWS],
    ids=["own", "shared", "windows"],
)
@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("R", [1, 3])
def test_eager_peers_equal_the_oracle(name, R, shape):
    inputs = make_inputs(shape, 6, "cpu")
    expected = outputs_and_gradients(oracle(shape), inputs, R)
    check_equal(outputs_and_gradients(eager(EAGER[name][0], shape), inputs, R), expected, R)
    check_equal(outputs_and_gradients(fused("cpu", shape), inputs, R), expected, R)


def test_operations_and_bytes_of_windows():
    """Those of as many samples as places; the inputs cross the bus once, not once a window."""
    flat = Shape("flat", SMALL_WINDOWS.I, SMALL_WINDOWS.J, SMALL_WINDOWS.K, SMALL_WINDOWS.D)
    assert SMALL_WINDOWS.places == 3
    assert SMALL_WINDOWS.operations(2, 3, True) == flat.operations(18, 3, True)
    assert SMALL_WINDOWS.prediction_bytes(2) == flat.prediction_bytes(18)
    u, weight, v = (x.numel() for x in vars(make_inputs(SMALL_WINDOWS, 2, "cpu")).values())
    assert SMALL_WINDOWS.bytes(2, False) == 4 * (u + weight + v)
    assert SMALL_WINDOWS.bytes(2, True) == 4 * (3 * (u + weight) + 2 * v)


def test_a_peer_that_computes_something_else_is_told_apart():
    inputs = make_inputs(SMALL, 6, "cpu")
    expected = outputs_and_gradients(oracle(SMALL), inputs, 3)
    with pytest.raises(ValueError, match=r"^v \[6, 3, 5\] is off the oracle's by"):
        check_equal(outputs_and_gradients(oracle(SMALL), inputs, 2), expected, 2)


def test_wrong_and_failing_implementations_become_rows_and_the_rest_goes_on():
    def broken(u, weight, R):
        raise MemoryError("no room")

    implementations = [
        Implementation("good", "ours", oracle),
        Implementation("wrong", "eager", lambda shape: lambda u, W, R: oracle(shape)(u, W, 1)),
        Implementation("broken", "eager", lambda _: broken),
        Implementation("absent", "eager", oracle, missing="not built"),
        Implementation("huge", "eager", oracle, stored=1e12),
    ]
    settings = Settings(rounds=1, slice_seconds=0)
    records = list(measure_routing(SMALL, 2, implementations, settings, ["forward"]))
    status = {record["implementation"]: record["status"] for record in records}
    assert status["good"] == "ok"
    assert WRONG_RESULT in status["wrong"]
    assert status["broken"] == "MemoryError: no room"
    assert status["absent"] == "not built"
    assert status["huge"].startswith("too little memory: needs about")
    assert [r["implementation"] for r in records if "seconds" in r] == ["good"]
    assert select(records, implementation="good")[0]["product_rate"] > 0


def test_interleaving_samples_every_variant_in_every_round():
    order = []

    def sampler(name, seconds):
        return lambda: order.append(name) or seconds

    samplers = {name: sampler(name, number) for number, name in enumerate("abc", start=1)}
    timings = interleave(samplers, "clock", rounds=4, slice_seconds=0)
    assert order == list("abc") * 5, "one warm-up, then four rounds"
    assert [timing.median for timing in timings.values()] == [1, 2, 3]
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 100.0], "clock").median == 3.0


@pytest.mark.parametrize("means", [False, True])
def test_the_mean_of_a_turn_is_fair_to_calls_of_any_length(means, monkeypatch):
    """On a machine that does something else for 1 ms in 10, calls of 0.5 ms to 50 ms."""
    now = 0.0

    def sampler(work):
        def sample():
            nonlocal now
            begun, left = now, work
            while left > 0:  # a millisecond of something else after nine of ours
                until_disturbed = max(0.0, 0.009 - now % 0.010)
                step = min(left, until_disturbed)
                now, left = now + step, left - step
                if left > 0:
                    now = (now // 0.010 + 1) * 0.010 + 1e-12
            return now - begun

        return sample

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    lengths = [0.0005, 0.005, 0.050]
    samplers = {str(work): sampler(work) for work in lengths}
    timings = interleave(samplers, "clock", rounds=10, means=means)
    found = fits.exponent(lengths, [timings[str(work)].median for work in lengths])
    assert (abs(found - 1) < 0.01) == means, found


def test_the_spread_is_between_the_quartiles():
    timed = Timing.of([7.0, 1.0, 3.0, 2.0, 6.0, 4.0, 5.0], "clock")
    assert (timed.median, timed.spread, timed.samples) == (4, 4, 7)


def test_cpu_timer_takes_turns():
    turns = []
    sample = CpuTimer().sampler([lambda: turns.append(0), lambda: turns.append(1)])
    assert all(sample() >= 0 for _ in range(4))
    assert turns == [0, 1, 0, 1]


def test_goals_are_judged_against_the_fastest_peer():
    records = [
        routing_record("ours", 1e-3),
        routing_record("eager", 40e-3),
        routing_record("eager", 29e-3, implementation="another"),
    ]
    verdict = OF_EAGER.judge(records)
    assert (verdict["measured"], verdict["verdict"]) == ("29.0x", "no")
    assert OF_EAGER.judge(records[:2])["verdict"] == "yes"


def test_goals_are_those_that_were_set():
    """Of a CPU and of the CUDA kernels; a speed is of the fastest peer."""
    least = {goal.what: goal.least for goal in goals.GOALS["cpu"] if goal.least is not None}
    assert [least[f"{name}, B = 128, of eager"] for name in ("forward", "forward+backward")] == [
        30, 30
    ]  # fmt: skip
    assert sorted(least.values()) == [
        0.75, 0.80, 1, 1, 1.4, 1.5, 2, 2, 2.5, 3, 4, 8, 10, 30, 30, 50
    ]  # fmt: skip
    most = {goal.what: goal.most for goal in goals.GOALS["cuda"] if goal.most is not None}
    assert most == {
        "triton: forward, B = 128, tf32": 40e-6,
        "triton: forward+backward, B = 128, tf32": 120e-6,
        "cuda: forward, B = 128, tf32": 15e-6,
        "cuda: forward, B = 128, ieee": 35e-6,
        "cuda: forward+backward, B = 128, tf32": 50e-6,
    }


def test_a_slowest_shape_and_a_share_are_of_the_right_records():
    records = [
        routing_record(family, seconds, case=shape.name, B=32)
        for n, shape in enumerate(SHAPES)
        for family, seconds in (("ours", 1e-3), ("compiled", (n + 2) * 1e-3), ("compiled", 1.0))
    ]
    assert goals.least_speedup("forward", 32)(records) == pytest.approx(2)
    # 1e9 operations in 20 ms, of the 1e11 a second that were measured beside them.
    record = routing_record("ours", 20e-3)
    assert goals.share(goals.layer("forward", 128))([record]) == pytest.approx(0.5)
    tf32 = routing_record("ours", 480e-6, B=1024, precision="tf32", implementation="ours (cuda)")
    who = {"implementation": "ours (cuda)"}
    assert goals.of_floor(who, "forward", 1024, "tf32")([tf32]) == pytest.approx(0.1)


def test_a_gpu_is_judged_against_the_fastest_of_the_autotuned_peers():
    """Each of them must have been measured."""
    (goal,) = (
        goal
        for goal in goals.GOALS["cuda"]
        if goal.what == "cuda: forward, B = 128, tf32, of compiled, max-autotune"
    )
    records = [
        routing_record(
            family, seconds, precision="tf32", implementation=name, beside=goals.AUTOTUNED
        )
        for family, name, seconds in (
            ("ours", "ours (cuda)", 1e-3),
            ("compiled", "compiled einsum (max-autotune)", 20e-3),
            ("compiled", "compiled multiply-sum (max-autotune)", 9e-3),
            ("compiled", "compiled contracted (max-autotune)", 30e-3),
        )
    ]
    assert goal.judge(records)["measured"] == "9.0x"
    assert goal.judge(records[:-1])["verdict"] == "not measured"


def test_a_share_of_a_product_of_another_dtype_says_so():
    records = [routing_record("ours", 20e-3), routing_record("ours", 20e-3, dtype="bfloat16")]
    table = tables.summary_table(records, {})
    assert table.headers == ["shape", "B", "pass", "ours", "of gemm"], "no columns without peers"
    assert [row[-1] for row in table.rows] == ["50 %", "50 % [1]"]
    assert table.note_lines() == ["[1] by the product in float32"]


def test_an_error_is_told_with_how_many_times_the_oracles_it_is():
    fields = {"table": "accuracy", "implementation": "ours", "dtype": "float16", "status": "ok"}
    records = [
        fields | {"quantity": "v", "error": 3e-4, "oracle_error": 2e-4},
        fields | {"quantity": "grad u", "status": "refused", "oracle_error": 2e-4},
    ]
    table = tables.accuracy_table(records, {})
    assert table.headers == ["implementation", "dtype", "v", "grad u"]
    assert table.rows == [["ours", "float16", "3.0e-04 (1.50x)", "[1]"]]


def test_an_error_is_the_largest_of_the_largest_value():
    found, exact = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([1.0, 4.0, -3.0])
    assert accuracy.errors((found, exact), (exact, exact)) == [0.5, 0]


def test_ceilings_count_both_ways_of_a_copy(monkeypatch):
    second = Timing(1.0, 0.0, 1, "clock")
    monkeypatch.setattr(machine, "interleave", lambda samplers, how: {"": second})
    multiply, operations = machine.product("cpu")
    assert operations == 2 * multiply().shape[0] ** 3
    assert machine.ceilings("cpu") == {"gemm": operations, "copy": 2 * 4 * 2**25}


def test_plots_are_in_the_units_of_their_axes():
    records = [routing_record("ours", 3e-3, **{"pass": name}) for name in plots.PASSES]
    for axes in plots.time_against_batch(records).axes:
        assert axes.lines[0].get_ydata() == pytest.approx([3.0])
    axes = plots.time_against_batch(records).axes[0]
    assert axes.get_ylabel() == "median time [ms]"


def test_a_goal_without_a_measurement_is_not_met_and_says_why():
    """Of one peer, too: it may be the fastest."""
    failed = routing_record("eager", 1.0, status="RuntimeError: no compiler")
    del failed["seconds"]
    verdict = OF_EAGER.judge([routing_record("ours", 1e-3), routing_record("eager", 1.0), failed])
    assert verdict["verdict"] == "not measured"
    assert verdict["reason"] == "RuntimeError: no compiler"


def test_exponents():
    sizes = (10, 20, 50, 100)
    assert fits.exponent(sizes, [3e-6 * s for s in sizes]) == pytest.approx(1)
    assert fits.exponent(sizes, [3e-6 * s**2 for s in sizes]) == pytest.approx(2)
    points = [
        {"table": "scaling", "axis": axis, "size": s, "pass": "forward", "implementation": "x"}
        | {"seconds": s**power, "operations": 50 * s, "product_rate": 100}
        for axis, power in (("B", 0.5), ("I", 1.2), ("threads", -0.9))
        for s in sizes
    ]
    failed = {"table": "scaling", "axis": "B", "implementation": "x", "status": "failed"}
    B, I, threads = scaling.conclude([failed, *points], "cpu")
    assert [B["exponent"], I["exponent"], threads["exponent"]] == pytest.approx([0.5, 1.2, -0.9])
    assert (B["from"], B["to"], B["verdict"], I["verdict"]) == (10, 100, "yes", "no")
    assert "verdict" not in threads
    (table,) = tables.tables([I, threads], {})
    over = ["x", "I from 10 to 100", "forward", "1.20", "<= 1.05", "no"]
    assert table.rows[0][:7] == [*over, ""]
    assert table.rows[0][-1] == "32 % to 20 %", "50 / 10**0.2 and 50 / 100**0.2"
    assert table.rows[1][5:] == [""] * 5


def test_a_cheaper_first_iteration_is_an_exponent_above_1_on_a_straight_line():
    points = [
        {"table": "scaling", "axis": "R", "size": R, "pass": "forward", "implementation": "x"}
        | {"seconds": 2 + 5 * (R - 1), "operations": R, "product_rate": 1}
        for R in scaling.ITERATIONS
    ]
    (found,) = scaling.conclude(points, "cpu")
    assert (found["from"], found["to"], found["first"]) == (3, 30, 2)
    assert found["exponent"] > 1.05
    assert (found["fixed"], found["each"]) == pytest.approx((-3, 5))
    assert found["off_line"] < 1e-12
    bent = fits.straight_line([1, 2, 3, 4], [1, 4, 9, 16])
    assert bent["off_line"] > 0.1


def test_sizes_of_an_axis_take_turns(monkeypatch):
    """A slow turn hits every size; interrupted, the turns so far are kept."""
    calls = []

    def measure_routing(shape, B, implementations, settings):
        calls.append(B)
        if len(calls) == 10:
            raise KeyboardInterrupt
        turn = (len(calls) - 1) // 4
        yield routing_record("ours", B * (1, 10, 2)[turn], timed_by="clock", rounds=settings.rounds)

    monkeypatch.setattr(scaling, "measure_routing", measure_routing)
    sizes = scaling.sizes_of("B", "cpu")
    monkeypatch.setattr(scaling, "TURNS_OF_A_ROUND", 1)
    measured = scaling.measure_axis("B", [], Settings(rounds=3))
    records = [next(measured) for _ in sizes]
    with pytest.raises(KeyboardInterrupt):
        next(measured)
    assert calls == [*sizes, *sizes, *sizes[:2]]
    assert [r["size"] for r in records] == list(sizes)
    assert [r["seconds"] / r["size"] for r in records] == [2, 5.5, 5.5, 5.5]
    assert {r["rounds"] for r in records} == {1}


def test_a_point_that_has_failed_once_has_failed():
    good = routing_record("ours", 1.0, size=32, timed_by="clock")
    failed = routing_record("ours", 1.0, size=32, status="ValueError: v is off")
    del failed["seconds"]
    assert list(scaling.merged([good, failed, good])) == [failed]


def test_tables_show_figures_and_put_reasons_below():
    failed = routing_record("compiled", 1.0, status="no compiler")
    del failed["seconds"]
    records = [routing_record("ours", 20e-3), routing_record("eager", 0.5), failed]
    records.append(routing_record("ours", 1e-3, precision="tf32"))
    summary, every = (
        table.markdown()
        for table in sorted(tables.tables(records, CEILINGS), key=lambda t: -len(t.headers))
    )
    assert "| MNIST | 128 | forward | 500 ms | - | 20.0 ms | 25.0x | - | 50 % |" in summary
    assert "| eager | MNIST | 128 | forward | 500 ms | 10 % | 25.0x | 2 % |" in every
    assert "| ours | MNIST, tf32 | 128 | forward | 1.00 ms |" in every
    assert every.endswith("[1] no compiler")
    assert [tables.duration(t) for t in (1.234, 0.5, 1.2e-3, 20e-6)] == [
        "1.23 s",
        "500 ms",
        "1.20 ms",
        "20.0 µs",
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs Linux and glibc")
def test_extra_memory_sees_allocations_that_torch_does_not():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    MiB = 2**20

    def call():
        block = libc.malloc(64 * MiB)
        ctypes.memset(block, 1, 64 * MiB)
        libc.free(block)
        return (torch.ones(8 * MiB // 4),)

    found = extra_bytes(call, "cpu")  # peak of 64 MiB, of which 8 are the result's size
    assert 50 * MiB < found < 72 * MiB


@pytest.mark.skipif(not CLEAR.exists(), reason="the peak resident set needs Linux's /proc")
def test_memory_of_an_eager_peer_is_a_few_times_u_hat():
    shape = Shape("some", 1152, 10)
    (peer,) = (peer for peer in peers(which="eager") if peer.name == "eager einsum")
    (record,) = measure_memory(shape, 16, [peer], Settings())
    assert record["status"] == "ok"
    assert 2 < record["extra_bytes"] / shape.prediction_bytes(16) < 8
    assert 1 <= record["saved_bytes"] / shape.prediction_bytes(16) < 3


def test_saved_bytes_leaves_inputs_out():
    inputs = make_inputs(SMALL, 2, "cpu")
    assert saved_bytes(lambda u, W, R: (u * u).sum() + W.sum(), inputs, 3) == 0
    doubled = saved_bytes(lambda u, W, R: (2 * u).square().sum(), inputs, 3)
    assert doubled == inputs.u.nbytes
