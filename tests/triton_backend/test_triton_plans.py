"""Plans: what follows from the signature of a call is worked out once, and anew wherever the signature differs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import random_problem
from triton_device import DEVICE

from vvae_fast.spec import FlowSpec
from vvae_fast.triton import (
    _heuristics,
    compact_backward,
    compact_forward,
    direct_backward,
    direct_forward,
    launch,
    planar,
)

ROWS, STEPS, DIM = 8, 3, 4
LEAKY = FlowSpec(activation="leaky_relu")  # each of its fields counts


@pytest.fixture(params=["direct", "compact"])
def form(request, monkeypatch):
    monkeypatch.setattr(_heuristics, "is_compact", lambda *problem: request.param == "compact")
    return request.param


@pytest.fixture
def launched(monkeypatch):
    """What would be launched: (planned, its tensors)."""
    found = []
    monkeypatch.setattr(launch.Launch, "__call__", lambda planned, *tensors: found.append((planned, tensors)))
    return found


@pytest.fixture
def made(monkeypatch):
    """How often each launch was worked out: plans ask for the blocks and warps."""
    counts = {"forward": 0, "backward": 0, "gradients": 0}
    for name in ("direct", "compact"):
        choose = getattr(_heuristics, name)

        def counting(pass_, *problem, choose=choose):
            counts[pass_] += 1
            return choose(pass_, *problem)

        monkeypatch.setattr(_heuristics, name, counting)
    choose_gradients = _heuristics.compact_gradients

    def counting_gradients(*problem):
        counts["gradients"] += 1
        return choose_gradients(*problem)

    monkeypatch.setattr(_heuristics, "compact_gradients", counting_gradients)
    return counts


def strided(*shape, device="meta", dtype=torch.float32, order=None):
    """Of that shape, laid out in another order of its dimensions."""
    order = range(len(shape)) if order is None else order
    t = torch.empty([shape[i] for i in order], device=device, dtype=dtype)
    return t.permute([list(order).index(i) for i in range(len(shape))])


def arguments(dtype=torch.float32, device="meta", rows=ROWS, steps=STEPS, dim=DIM, sets=(), **changed):
    """Of a flow's backward by name; `changed` replaces some."""
    new = {"dtype": dtype, "device": device}
    computed = {"dtype": torch.float64 if dtype == torch.float64 else torch.float32, "device": device}
    found = {"grad_z": torch.empty(rows, dim, **new), "grad_log_det": torch.empty(rows, **computed)}
    found |= {"z": torch.empty(rows, dim, **new), "u": torch.empty(*sets, steps, dim, **new)}
    found |= {"w": torch.empty(*sets, steps, dim, **new), "b": torch.empty(*sets, steps, **new)}
    return found | {"a": torch.empty(steps, rows, **computed), "formulas": LEAKY, "save": True} | changed


def call(form: str, inverse=False, **args) -> None:
    inputs = tuple(args[name] for name in "zuwb")
    options = {"inverse": inverse} if form == "direct" else {}
    outputs = torch.empty_like(args["z"]), torch.empty_like(args["a"][0]), args["a"]
    forward = direct_forward.launch_direct_forward if form == "direct" else compact_forward.launch_compact_forward
    backward = direct_backward.launch_direct_backward if form == "direct" else compact_backward.launch_compact_backward
    forward(inputs, outputs, args["formulas"], args["save"], **options)
    dz, *gradients = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)
    inputs = (args["grad_z"], args["grad_log_det"], *inputs[:3])
    backward(inputs, args["a"], dz, tuple(args.get("gradients", gradients)), args["formulas"], **options)


# What differs, and which of the launches it has to be told to; the others may keep their plan.
CHANGES = {
    "rows": ({"rows": 2 * ROWS}, "fb"),
    "steps": ({"steps": STEPS + 1}, "fb"),
    "columns": ({"dim": DIM + 1}, "fb"),
    "parameter sets": ({"sets": (ROWS,)}, "fb"),
    "one set": ({"sets": (1,)}, "fb"),
    "dtype": ({"dtype": torch.float64}, "fb"),
    "half precision": ({"dtype": torch.bfloat16}, "fb"),
    "device": ({"device": DEVICE}, "fb"),
    "constraint": ({"formulas": LEAKY._replace(constraint="none")}, "fb"),
    "activation": ({"formulas": LEAKY._replace(activation="elu")}, "fb"),
    "slope": ({"formulas": LEAKY._replace(slope=0.25)}, "fb"),
    "eps": ({"formulas": LEAKY._replace(log_det_eps=1e-4)}, "fb"),
    "nothing saved": ({"save": False}, "f"),
    "z's strides": ({"z": strided(ROWS, DIM, order=(1, 0))}, "fb"),
    "expanded z": ({"z": torch.empty(1, DIM, device="meta").expand(ROWS, DIM)}, "fb"),
    "u's strides": ({"u": torch.empty(STEPS, 2 * DIM, device="meta")[:, :DIM]}, "fb"),
    "w's strides": ({"w": torch.empty(STEPS, 2 * DIM, device="meta")[:, :DIM]}, "fb"),
    "b's strides": ({"b": torch.empty(2 * STEPS, device="meta")[::2]}, "f"),
    "grad_z's strides": ({"grad_z": torch.empty((), device="meta").expand(ROWS, DIM)}, "b"),
    "grad_log_det's strides": ({"grad_log_det": torch.empty((), device="meta").expand(ROWS)}, "b"),
}


@pytest.mark.usefixtures("launched")
def test_equal_calls_are_planned_once(form, made):
    for _ in range(3):
        call(form, **arguments())
    assert made == {"forward": 1, "backward": 1, "gradients": int(form == "compact")}


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("change", CHANGES)
def test_another_signature_is_planned_anew(form, made, change):
    """Both ways, and then both signatures are known."""
    changed, told = CHANGES[change]
    call(form, **arguments())
    before = dict(made)
    call(form, **arguments(**changed))
    after = dict(made)
    assert after["forward"] - before["forward"] == ("f" in told)
    assert after["backward"] - before["backward"] == ("b" in told)
    call(form, **arguments())
    call(form, **arguments(**changed))
    assert made == after


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "device"])
def test_a_plan_is_what_its_signature_says(form, launched, change):
    """The arguments that a kernel gets after another call are those that it gets in a process of its own."""
    changed, _ = CHANGES[change]
    call(form, **arguments(**changed))
    wanted = [(x.kernel, x.programs, x.arguments, x.options, [t.shape for t in tensors]) for x, tensors in launched]
    launch.forget_plans()
    call(form, **arguments())
    launched.clear()
    call(form, **arguments(**changed))
    found = [(x.kernel, x.programs, x.arguments, x.options, [t.shape for t in tensors]) for x, tensors in launched]
    assert found == wanted


def test_the_inverse_has_plans_of_its_own(launched, made):
    call("direct", **arguments())
    flow = [planned for planned, _ in launched]
    launched.clear()
    call("direct", inverse=True, **arguments())
    assert made == {"forward": 2, "backward": 2, "gradients": 0}
    assert [planned.arguments for planned, _ in launched[:2]] != [planned.arguments for planned in flow[:2]]


def test_gradients_in_one_packed_tensor_have_plans_of_their_own(form, launched):
    """Where they lie is part of the signature: with the strides of the call before, sets would be mixed."""
    sets, size = (2,), STEPS * (2 * DIM + 1)
    matrix = STEPS * DIM
    packed = torch.empty(2, size, device="meta")
    parts = packed.split_with_sizes([matrix, matrix, STEPS], 1)
    gradients = [parts[0].unflatten(1, (STEPS, DIM)), parts[1].unflatten(1, (STEPS, DIM)), parts[2]]
    call(form, **arguments(sets=sets))
    alone = launched[-1][0].arguments
    call(form, **arguments(sets=sets, gradients=gradients))
    assert launched[-1][0].arguments != alone
    fixed = next(x for x in launched[-1][0].arguments if isinstance(x, launch.Fixed))
    assert fixed.du.set == fixed.dw.set == fixed.db.set == size


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("which", [0, 1, 2], ids=["du", "dw", "db"])
def test_each_gradients_strides_are_part_of_the_signature(form, made, which):
    gradients = [torch.empty(2, STEPS, DIM, device="meta"), torch.empty(2, STEPS, DIM, device="meta")]
    gradients.append(torch.empty(2, STEPS, device="meta"))
    call(form, **arguments(sets=(2,), gradients=gradients))
    apart = torch.empty(2, 2, *gradients[which].shape[1:], device="meta")[:, 0]
    call(form, **arguments(sets=(2,), gradients=[*gradients[:which], apart, *gradients[which + 1 :]]))
    planned_anew = {"direct": "backward", "compact": "gradients"}[form]
    assert made[planned_anew] == 2
    assert made["forward"] == 1


@pytest.mark.usefixtures("launched")
def test_the_number_of_plans_is_bounded():
    for rows in range(1, launch.MOST_PLANS + 20):
        call("direct", **arguments(rows=rows))
    assert direct_forward._plan.cache_info().currsize == launch.MOST_PLANS
    assert direct_backward._plan.cache_info().currsize == launch.MOST_PLANS


def run(p) -> tuple[torch.Tensor, ...]:
    """The operators' outputs and gradients."""
    z_K, log_det, a = planar.planar_forward(*p.inputs, FlowSpec(), True)
    return z_K, log_det, *planar.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, a, FlowSpec())


def variants(p) -> list:
    """The same numbers in several layouts."""

    def transposed(t):
        return t.mT.contiguous().mT if t.dim() > 1 else t

    def apart(t):
        return torch.stack([t, t], -1)[..., 0]

    return [*(type(p)(*(map(change, p))) for change in (transposed, apart)), p]


def test_results_are_right_when_strides_change_between_calls(form):
    p = random_problem((ROWS,), STEPS, DIM, scale=0.5, dtype=torch.float64).to(DEVICE)
    wanted = run(p)
    for same in variants(p):
        for got, x in zip(run(same), wanted, strict=True):
            torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(DEVICE == "cuda", reason="the benchmark's tensors are on the CPU")
def test_the_benchmark_measures_calls_without_and_with_a_launch(monkeypatch):
    from benchmarks.calls import launch_cost

    ran = []
    monkeypatch.setattr(launch.Launch, "__call__", lambda planned, *tensors: ran.append(planned))
    for call in launch_cost.calls(4, 3, 2, 1).values():
        ran.clear()
        call()
        launches = len(ran)
        with launch_cost.nothing_launched():
            call()
        assert len(ran) == launches > 0
        call()
        assert len(ran) == 2 * launches
    assert min(launch_cost.measure(lambda: None, 0)) > 0


@pytest.mark.usefixtures("launched")
def test_threads_share_the_plans(form):
    """Each thread takes the signatures in an order of its own; what each is told stays its signature's."""
    changes = [changed for name, (changed, _) in CHANGES.items() if name != "device"]
    plan = (direct_forward if form == "direct" else compact_forward)._plan

    def told(plan, changed):
        args = arguments(**changed)
        layouts = launch.layouts(*(args[name] for name in "zuwb"))
        inverse = [False] if form == "direct" else []
        made = plan(layouts, args["z"].dtype, args["z"].device, args["formulas"], args["save"], *inverse)
        of = made[0] if form == "direct" else made.launch
        return of.programs, of.arguments, of.options

    wanted = [told(plan.__wrapped__, changed) for changed in changes]

    def work(start):
        order = [(start + i) % len(changes) for i in range(5 * len(changes))]
        return all(told(plan, changes[i]) == wanted[i] for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(0, 16, 4)))
