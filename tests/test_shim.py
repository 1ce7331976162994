"""The CUDA kernels, run on the CPU: every thread a fiber, in random order, and under a sanitizer.

The operators are those of csrc/bindings_cuda.cpp under another name, on CPU tensors, so allocation, launch plans and
the order of launches are tested with the kernels.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forks, forks
from native_build import ROOT, compile_all, link, sources
from torch import Tensor

from rlhf_engine import reference

KERNELS = ("gae.cu", "whiten.cu", "losses.cu")
INF = float("inf")
FLAGS = ("-fno-strict-aliasing", "-DRLHF_SHIM")

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the shim with")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return compile_all(sources(tmp_path_factory.mktemp("objects")), ("bindings_cuda.cpp", *KERNELS), *FLAGS)


@pytest.fixture(scope="module")
def library(objects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(objects.values(), tmp_path_factory.mktemp("shim") / "shim.so")


@pytest.fixture(scope="module")
def shim(library: Path) -> Any:
    torch.ops.load_library(library)
    return torch.ops.rlhf_shim


def batch(count: int, length: int, keep: float, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(count, length, generator=g) for _ in range(7)]
    lengths = torch.randint(length // 2, length + 1, (count, 1), generator=g)
    mask = (torch.rand(count, length, generator=g) < keep) & (torch.arange(length) < lengths)
    return tensors, mask


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact.double(), rtol=2e-5, atol=2e-5)


# One tile is 512 positions, a chunk eight of them; the last two are split over several blocks.
SHAPES = [(0, 5), (4, 0), (1, 1), (3, 37), (2, 512), (9, 513), (2, 1500), (2, 4097), (1, 9000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep, decay", [(1.0, False), (0.6, False), (0.6, True), (0.0, False)])
def test_gae(shim: Any, shape: tuple[int, int], keep: float, decay: bool) -> None:
    (r, v, *_), mask = batch(*shape, keep)
    bootstrap, lam = torch.rand(shape[0]), torch.rand(shape[0])
    holes = "decay" if decay else "carry"
    for each, value_lam, two in ((lam.double(), 0.5, False), (None, 0.5, True)):
        got = shim.gae(r, v, mask, each, None, bootstrap, None, 0.99, 0.9, value_lam, two, decay)
        exact = reference.gae(
            r.double(), v.double(), mask, gamma=0.99, lam=0.9 if each is None else lam,
            value_lam=value_lam if two else None, holes=holes, bootstrap=bootstrap.double(),
        )  # fmt: skip
        for a, b in zip(got, exact, strict=True):
            close(a, b)


class Plan(ctypes.Structure):
    _fields_ = [("mode", ctypes.c_int), ("chunks", ctypes.c_long), ("map_bytes", ctypes.c_long)]


def test_no_grid_is_larger_than_a_gpu_takes(library: Path) -> None:
    """More than 65,535 blocks on its second axis are an error there, which fibers know nothing of."""
    plan = ctypes.CDLL(str(library)).rlhf_gae_plan
    plan.restype, plan.argtypes = Plan, (ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_bool)
    split, most = plan(2, 9000, 18_000, False), 65_535 * 4096
    assert (split.chunks, split.map_bytes) == (3, 2 * 3 * 8 * 16)
    assert [plan(2, length, 2 * length, False).chunks for length in (most, most + 1)] == [65_535, 1]


@pytest.mark.parametrize("shape", [(3, 37), (9, 513), (1, 9000)])
@pytest.mark.parametrize("after", [False, True])
def test_kl_gae(shim: Any, shape: tuple[int, int], after: bool) -> None:
    (p, q, v, *_), mask = batch(*shape, 0.8)
    scores = torch.randn(shape[0])
    kinds = {"k1": 0, "abs": 1, "k2": 2, "k3": 3} if shape[1] < 9000 else {"k3": 3}
    for kind, number in kinds.items():
        got = shim.kl_gae(
            scores, p, q, v, mask, None, None, None, number, -2.0, INF, -INF, 3.0, 0.1, 0.5, after, 0.99, 0.95, False,
            True,
        )  # fmt: skip
        exact = reference.kl_gae(
            scores.double(), p.double(), q.double(), v.double(), mask, kl_coef=0.1, kl_kind=kind,
            kl_clamp_diff=(-2.0, None), kl_clamp_value=(None, 3.0), score_clip=0.5, gamma=0.99,
            score_at="after" if after else "last",
        )  # fmt: skip
        for a, b in zip(got, (exact.rewards, exact.advantages, exact.returns, exact.kl, exact.value_mask), strict=True):
            close(a, b)


def gae_bits(shim: Any, r: Tensor, v: Tensor, mask: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return shim.gae(r, v, mask, None, None, None, offsets, 0.99, 0.95, 0.9, True, False)


def test_a_sequence_has_the_same_bits_however_it_is_laid_out(shim: Any) -> None:
    """By a warp, by a block, split over blocks, packed, with more padding: each of these takes another path."""
    (r, v, *_), mask = batch(2, 4200, 0.7)
    mask[0, 400:], mask[1, 4150:] = False, False
    split = gae_bits(shim, r, v, mask)
    others = torch.zeros(298, 4200, dtype=torch.bool)  # empty ones are enough for a block to each
    one_block = gae_bits(shim, r.repeat(150, 1), v.repeat(150, 1), torch.cat([mask, others]))
    for whole, again in zip(split, one_block, strict=True):
        assert torch.equal(whole, again[:2])
    (by_warp, by_warp_returns) = gae_bits(shim, r[:1, :500], v[:1, :500], mask[:1, :500])
    assert torch.equal(by_warp, split[0][:1, :500]) and torch.equal(by_warp_returns, split[1][:1, :500])
    lengths = [450, 4180]
    offsets = torch.tensor([0, 450, 4630])
    packed = gae_bits(shim, *(torch.cat([x[0, :450], x[1, :4180]]) for x in (r, v, mask)), offsets)
    for whole, flat in zip(split, packed, strict=True):
        assert torch.equal(torch.cat([whole[i, :n] for i, n in enumerate(lengths)]), flat)


def test_whitened_advantages_have_the_same_bits_padded_and_packed(shim: Any) -> None:
    (p, q, v, *_), mask = batch(6, 700, 0.8)
    scores, common = torch.randn(6), (None, None)
    rest = (0, -INF, INF, -INF, INF, 0.1, INF, False, 0.99, 0.95, False, True)
    inside = torch.arange(700) < torch.tensor([700, 650, 690, 700, 701, 660])[:, None]
    mask &= inside
    padded = shim.kl_gae(scores, p, q, v, mask, *common, None, *rest)
    offsets = torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0))
    packed = shim.kl_gae(scores, *(x[inside] for x in (p, q, v, mask)), *common, offsets, *rest)
    for a, b in zip(padded, packed, strict=True):
        assert torch.equal(a[inside], b)


@pytest.mark.parametrize("size", [0, 1, 255, 4097, 20_000])
def test_whiten_and_kl(shim: Any, size: int) -> None:
    (x, y, *_), mask = batch(1, size, 0.7)
    for ddof, add, center, zero in ((0, True, True, True), (1, False, False, False)):
        exact = reference.whiten(
            x.double(), mask, ddof=ddof, eps_mode="add" if add else "max", center=center, zero_masked=zero
        )
        close(shim.whiten(x, mask, ddof, 1e-8, add, center, zero), exact)
    for number, kind in enumerate(("k1", "abs", "k2", "k3")):
        leaf = x.double().requires_grad_()
        exact = reference.kl_estimate(leaf, y.double(), kind=kind, clamp_diff=(-2.0, None))
        exact.sum().backward()
        value, derivative = shim.kl_estimate(x, y, number, False, -2.0, INF, -INF, INF, True)
        close(value, exact.detach())
        close(derivative, leaf.grad)


@pytest.mark.parametrize("size", [0, 1, 255, 2049, 5000])
@pytest.mark.parametrize("denom", [None, 7.0, torch.tensor(3.0)])
def test_losses(shim: Any, size: int, denom: float | Tensor | None) -> None:
    (new, old, advantages, ref, entropy, weights, importance), mask = batch(1, size, 0.8)
    given, number = (denom, -1.0) if isinstance(denom, Tensor) else (None, -1.0 if denom is None else denom)
    leaf, entropy_leaf = new.double().requires_grad_(), entropy.double().requires_grad_()
    exact, exact_metrics = reference.ppo_loss(
        leaf, old.double(), advantages.double(), mask, dual_clip=1.5, is_weights=importance.double(),
        entropy=entropy_leaf, entropy_coef=0.1, ref_logprobs=ref.double(), kl_coef=0.2, kl_kind="k3",
        weights=weights.double(), denom=denom,
    )  # fmt: skip
    exact.backward()
    loss, gradient, entropy_gradient, metrics = shim.ppo_loss(
        new, old, advantages, mask, importance, entropy, ref, weights, given, number, 0.2, 0.2, 1.5, 0.1, 0.2, 3, False,
        True,
    )  # fmt: skip
    close(loss, exact.detach())
    close(gradient, leaf.grad)
    close(entropy_gradient, entropy_leaf.grad)
    names = ("policy_tokens", "clip_fraction_sum", "clip_fraction_low_sum", "approx_kl_k1_sum", "approx_kl_k3_sum",
             "ratio_mean_sum", "log_ratio_max_abs", "entropy_sum")  # fmt: skip
    close(metrics, torch.stack([exact_metrics[name] for name in names]))
    leaf = new.double().requires_grad_()
    exact, _ = reference.value_loss(leaf, old.double(), ref.double(), mask, clip=0.5, denom=denom)
    exact.backward()
    loss, gradient, _ = shim.value_loss(new, old, ref, mask, None, given, number, 0.5, True)
    close(loss, exact.detach())
    close(gradient, leaf.grad)


PROBE = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
ops, inf = torch.ops.rlhf_shim, float("inf")
torch.manual_seed(0)
def run(count, length):
    r, v, p, q = (torch.randn(count, length) for _ in range(4))
    mask = torch.rand(count, length) < 0.8
    for x in (*ops.gae(r, v, mask, None, None, None, None, 0.99, 0.9, 0.8, True, False),
              *ops.kl_gae(r[:, 0].clone(), p, q, v, mask, None, None, None, 0, -inf, inf, -inf, inf, 0.1, inf, True,
                          0.99, 0.9, False, True),
              ops.whiten(r, mask, 0, 1e-8, True, True, True),
              *ops.ppo_loss(p, q, r, mask, None, None, None, None, None, -1.0, 0.2, 0.2, inf, 0.0, 0.0, 0, False,
                            True)):
        yield float(x.double().nan_to_num(0).square().sum())
print(json.dumps([x for shape in ((3, 37), (2, 700), (1, 5000)) for x in run(*shape)]))
"""


@pytest.fixture(scope="module")
def probes() -> Iterator[Forks]:
    with forks() as process:
        yield process


@pytest.fixture(scope="module")
def sound(library: Path, probes: Forks) -> list[float]:
    done = probes.run(PROBE, str(library))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


BARRIER = "own[warp] = map;\n    __syncthreads();"
STORES = (
    "  for (int k = 0; k < kItems; ++k) {\n    const int i = k * kWarp + lane;\n"
    "    if (i >= count) continue;\n    op.adv"
)
MUTANTS = {
    "no barrier before the maps are read": ("gae.cu", BARRIER, "own[warp] = map;"),
    "a barrier that one warp misses": ("gae.cu", BARRIER, "own[warp] = map;\n    if (warp) __syncthreads();"),
    "no barrier after a warp's loads": ("gae.cu", "0.f;\n  __syncwarp();\n  bool any", "0.f;\n  bool any"),
    "no barrier before a warp's stores": ("gae.cu", "  __syncwarp();\n" + STORES, STORES),
    "gamma for lambda": ("gae.cu", "compose(map, {s.decay, delta", "compose(map, {gamma, delta"),
    "the wrong lane's map": ("gae.cu", "(kAllLanes, inclusive.shift, 1)", "(kAllLanes, inclusive.shift, 2)"),
    "mask shifted by one": ("losses.cu", "if (op.mask[i]) token", "if (op.mask[i ? i - 1 : 0]) token"),
    "wrong denominator": ("losses.cu", "1.0 : 1.0 / total", "1.0 : 1.0 / (total + 1.0)"),
    "no barrier in the last block": ("losses.cu", "();\n  }\n  __syncthreads();", "();\n  }"),
    "whitening over all positions": ("whiten.cu", "if (i < size && mask[i]) sum", "if (i < size) sum"),
}
# In every run of the tests; the others for `make mutants`.
ALWAYS = ("no barrier before the maps are read", "mask shifted by one", "whitening over all positions")


@pytest.mark.parametrize("name", [x if x in ALWAYS else pytest.param(x, marks=pytest.mark.long) for x in MUTANTS])
def test_planted_bugs_are_seen(
    name: str, objects: dict[str, Path], sound: list[float], probes: Forks, tmp_path: Path
) -> None:
    changed = compile_all(sources(tmp_path, [MUTANTS[name]]), MUTANTS[name][:1], *FLAGS)
    done = probes.run(PROBE, str(link((objects | changed).values(), tmp_path / "shim.so")))
    if done.returncode == 0:
        same = [abs(a - b) <= 1e-4 * (1 + abs(b)) for a, b in zip(json.loads(done.stdout), sound, strict=True)]
        assert not all(same), "not seen"
    else:
        assert "barrier" in done.stderr, done.stderr


def test_no_access_out_of_bounds(objects: dict[str, Path], tmp_path: Path) -> None:
    """Under AddressSanitizer; with a planted overrun too, so that silence means something."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    options, watched = "detect_leaks=0:detect_stack_use_after_return=0", ("-g1", "-fsanitize=address")
    kernels = compile_all(sources(tmp_path), KERNELS, *FLAGS, *watched)
    library = link((objects | kernels).values(), tmp_path / "shim.so", *watched)
    overrun = sources(tmp_path / "overrun", [("gae.cu", "if (i >= count) continue;\n    op.adv", "op.adv")])
    kernels |= compile_all(overrun, KERNELS[:1], *FLAGS, *watched)
    broken = link((objects | kernels).values(), tmp_path / "broken.so", *watched)
    with forks(LD_PRELOAD=runtime, ASAN_OPTIONS=options) as process:
        done = process.run(PROBE, str(library))
        assert done.returncode == 0, done.stderr[-3000:]
        done = process.run(PROBE, str(broken))
        assert done.returncode != 0 and "AddressSanitizer" in done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc to compile the kernels with")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", ["90a", *(pytest.param(target, marks=pytest.mark.long) for target in ("80", "100"))])
def test_registers_do_not_spill(name: str, target: str, tmp_path: Path) -> None:
    flags = ("-std=c++20", "-O3", "--fmad=false", "-Xptxas", "-v", f"-gencode=arch=compute_{target},code=sm_{target}")
    files = ("-c", str(ROOT / "csrc" / name), "-o", str(tmp_path / "out.o"))
    done = subprocess.run(["nvcc", *flags, *files], capture_output=True, text=True, check=True)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and all(set(found) == {"0"} for found in spills), done.stderr
    print(sorted({int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)}), "registers")
