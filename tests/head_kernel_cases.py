"""Cases of kernels/head.py in the interpreter, against PyTorch in float64. Part of test_head_kernels.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from advantage_kernel_cases import same_bits
from head_kernel_truth import (
    DEAD,
    STATISTICS,
    close,
    close_gradient,
    close_statistics,
    compare,
    every_option,
    every_result,
    fenced,
    gradient,
    module,
    options,
    poisoned,
    random_rows,
    score,
    true_gradient,
    true_statistics,
)

DTYPES = ("float32", "bfloat16")
VOCABULARIES = (32000, 50257, 128256, 129920, 151936, 262144)


def case_every_vocabulary(dtype: str) -> None:
    """1 to 300, a row each, whose alignment alternates, NaN around it. The errors of all rows are compared together."""
    head, warm = module(), dict(inverse_temperature=1.4)
    rows = [(V, *random_rows(dtype, V, rows=1)) for V in range(1, 301)]
    views = [fenced(x, aligned=V // 8 % 2 == 0)[0] for V, x, _ in rows]
    folds = [head.head_fold(v, y, *options(**warm), 0, DEAD, True) for v, (*_, y) in zip(views, rows, strict=True)]
    statistics = head.head_combine(torch.cat(folds, -1), torch.cat([y for *_, y in rows]), 0, 300, DEAD)
    exact_ones, gradients = [true_statistics(x, y, **warm) for _, x, y in rows], []
    close_statistics(statistics, *(torch.cat(found, -1) for found in zip(*exact_ones, strict=True)))
    for view, (V, x, y), ours in zip(views, rows, statistics.split(1, dim=1), strict=True):
        grads, (out, memory) = torch.randn(2, 1).unbind(), fenced(torch.zeros_like(x), aligned=V // 8 % 2 == 0)
        gradient(view, y, ours, grads, out, **warm)
        assert memory.isnan().sum() == memory.numel() - V, f"V={V}: wrote beside the row"
        gradients.append((out, *true_gradient(x, y, grads, **warm)))
    close_gradient(*(torch.cat(found, -1) for found in zip(*gradients, strict=True)))


def case_block_edges(dtype: str) -> None:
    head = module()
    for V in (head.GRADIENT_BLOCK - 1, head.GRADIENT_BLOCK + 1, head.SEGMENT - 1, head.SEGMENT, head.SEGMENT + 1):
        x, y = random_rows(dtype, V, rows=2)
        y[0] = V - 1
        compare(x, y)
        compare(fenced(x, aligned=True)[0], y)


def case_real_vocabularies(dtype: str) -> None:
    """Their neighbours, too, in bfloat16."""
    head = module()
    real, head.GRADIENT_BLOCK = head.GRADIENT_BLOCK, 2**16  # fewer programs, each of them as slow as a smaller one
    for number, real_V in enumerate(VOCABULARIES):
        for V in range(real_V - 1, real_V + 2) if dtype == "bfloat16" else [real_V]:
            x, y = random_rows(dtype, V, rows=1)
            statistics = score(x, y)
            close_statistics(statistics, *true_statistics(x, y))
            if dtype != "bfloat16" or V == real_V - 1 + number % 3:
                grads = torch.randn(1), torch.randn(1)
                close_gradient(gradient(x, y, statistics, grads), *true_gradient(x, y, grads))
    head.GRADIENT_BLOCK = real


def case_options(dtype: str) -> None:
    """One at a time, and all of them. The target is banned in one row; inverse_temperature yields to a tensor."""
    V = module().SEGMENT + 5
    every = every_option(3, V)
    for names in (*([name] for name in every), list(every)):
        x, y = random_rows(dtype, V)
        y[:] = torch.tensor([7, 8, V - 1])
        compare(x, y, largest=every["softcap"] if "softcap" in names else 1.0, **{name: every[name] for name in names})


def case_every_option_on_short_rows() -> None:
    for V in (1, 2, 9, 64, 129):
        x, y = random_rows("float16", V, rows=2)
        compare(x, y, largest=8.0, **every_option(2, V, banned=False))  # the cap: of it tanh is right to an ulp or two


def case_tanh() -> None:
    """The cap keeps its relative precision near 0, and is as flat as PyTorch's far away; -inf passes."""
    x = torch.cat([torch.logspace(-20, 2.5, 25), torch.linspace(0.5, 0.7, 15), torch.tensor([0.0, 1e30])])
    for z, cap in ((x, 1.0), (-x, 1.0), (x, 50.0)):
        z = torch.cat([z, torch.tensor([-torch.inf])])[:, None]
        y = torch.zeros(len(z), dtype=torch.long)
        parts = module().head_fold(z, y, *options(softcap=cap), 0, DEAD, False)
        exact = torch.where(z == -torch.inf, z, cap * torch.tanh(z.double() / cap)).squeeze()
        torch.testing.assert_close(parts[0, 0].double(), exact, rtol=2.5 * 2.0**-23, atol=0.0)
        assert torch.equal(parts[0, 3], parts[0, 0])


def case_confident() -> None:
    """The target at p in bfloat16 logits: where its exact logit takes the place of the rounded one, never above 0."""
    p = torch.tensor([0.5, 0.9, 0.99, 0.999, 0.9999])
    exact = torch.randn(5, 129)
    y = torch.randint(0, 129, (5,))
    others = exact.scatter(1, y[:, None], -torch.inf).logsumexp(-1)
    z_y = others + (p / (1 - p)).log()
    x = exact.scatter(1, y[:, None], z_y[:, None]).bfloat16()
    compare(x, y, target_logits=z_y)
    compare(x, y)
    statistics = score(x, y, target_logits=z_y)
    torch.testing.assert_close(statistics[0].exp(), p, rtol=0.0, atol=2e-3)  # what rounding the others leaves
    for lead in (30.0, 100.0, 1000.0):  # probability 1 to the last bit, and large numbers to lose digits in
        x, y = random_rows("float32", 129)
        x.scatter_add_(1, y[:, None], torch.full((3, 1), lead))
        compare(x, y)
        compare(x, (y + 1) % 129)


def case_shifted(dtype: str) -> None:
    """Logits far from 0, one segment far below the other; a temperature rounds them once."""
    V = module().SEGMENT + 300
    for shift in (1000.0, -1000.0, -3e4):
        x, y = random_rows(dtype, V)
        x = (x.float() + shift).to(x.dtype)
        compare(x, y)
        x[0, : module().SEGMENT] -= 500
        x[1, module().SEGMENT :] -= 500
        compare(x, y, largest=abs(shift) / 2, inverse_temperature=1 / 0.7)  # half a unit of d, z' and m


def case_banned(dtype: str) -> None:
    """Logits of -inf: a whole first segment, a whole last one, the target; a gradient in entropy alone."""
    segment = module().SEGMENT
    x, y = random_rows(dtype, segment + 300, rows=4)
    x[0, :segment] = -torch.inf
    x[1, segment:] = -torch.inf
    x[2, ::2] = -torch.inf
    x[3, 3:] = -torch.inf
    y[:] = torch.tensor([segment + 5, 7, 0, 1])
    compare(x, y)
    statistics, grads = score(x, y), (None, torch.randn(4))
    close_gradient(gradient(x, y, statistics, grads), *true_gradient(x, y, grads))


def case_dead_rows(ignore_index: int) -> None:
    """What dead rows hold, in logits, temperatures, exact logits and gradients, reaches nothing."""
    V, kept = module().SEGMENT + 9, torch.tensor([True, False, True, False])
    x, y = random_rows("bfloat16", V, rows=4)
    y.clamp_(min=2)
    every, grads = every_option(4, V), (torch.randn(4), torch.randn(4))
    clean = score(x, y, **every)
    clean_dx = gradient(x, y, clean, grads, **every)
    y = y.where(kept, ignore_index)
    every |= {name: poisoned(every[name], kept) for name in ("temperature", "target_logits")}
    x, grads = poisoned(x, kept), (poisoned(grads[0], kept), poisoned(grads[1], kept))
    parts = module().head_fold(x, y, *options(**every), 0, ignore_index, True)
    assert not parts[..., ~kept].any()
    statistics = score(x, y, ignore_index=ignore_index, **every)
    same_bits((statistics[:, kept],), (clean[:, kept],))
    assert not statistics[:, ~kept].any()
    dx = torch.empty_like(x)
    module().head_gradient(x, y, poisoned(clean.T, kept).T.contiguous(), *grads, *options(**every), 0, ignore_index, dx)
    same_bits((dx[kept],), (clean_dx[kept],))
    assert not dx[~kept].any() and dx[kept].any(-1).all()


def case_no_gradient() -> None:
    """Rows whose gradients are exactly 0 get exactly 0, unread; so do all where none is given."""
    x, y = random_rows("float32", 129, rows=4)
    statistics, g_l, g_e = score(x, y), torch.tensor([0.0, 1.0, 0.0, -0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    clean = gradient(x, y, statistics, (g_l, g_e))
    kept = torch.tensor([False, True, True, False])
    assert clean[kept].any(-1).all() and not clean[~kept].any()
    y[3] = 999  # and out of the vocabulary
    same_bits((gradient(poisoned(x, kept), y, poisoned(statistics.T, kept).T.contiguous(), (g_l, g_e)),), (clean,))
    assert not gradient(x, y, statistics, (None, None)).any()
    same_bits((gradient(x, y, statistics, (g_l, None))[1],), (clean[1],))  # None is 0
    same_bits((gradient(x, y, statistics, (None, g_e))[2],), (clean[2],))


def case_visible_mistakes() -> None:
    """NaN, inf, -inf alone, a wild target or temperature: NaN in that row alone, and never a plausible number."""
    x, y = random_rows("float32", 129, rows=10)
    temperature = torch.ones(10)
    x[1, 7], x[2], x[3, 5], y[4], y[5] = torch.nan, -torch.inf, torch.inf, 129, -1
    temperature[6:9] = torch.tensor([0.0, torch.nan, -1.0])
    wrong = torch.tensor([False] + [True] * 8 + [False])
    statistics = score(x, y, temperature=temperature)
    for name in ("logprob", "entropy"):
        assert torch.equal(statistics[STATISTICS.index(name)].isnan(), wrong), name
    top, p2, z_y = (statistics[STATISTICS.index(name)] for name in ("top", "p2", "z_y"))
    unscored = wrong & (y >= 0) & (y < 129)
    assert torch.equal(top.isnan(), unscored) and torch.equal(p2.isnan(), unscored)
    # A wild target may be a token of another rank's: all but its own statistics are right.
    assert (z_y[4:6] == -torch.inf).all()
    same_bits((statistics[2:5, 4:6],), (score(x[4:6], y[4:6] * 0)[2:5],))
    dx = gradient(x, y, statistics, (torch.ones(10), torch.ones(10)), temperature=temperature)
    assert torch.equal(dx.isnan().any(-1), wrong)


def case_layouts() -> None:
    """A (B, T, V) view without its last token, aligned or not, gives the bits of a flat copy, and so does each row."""
    for V, left in ((8200, 0), (8201, 3)):
        wide = torch.randn(2, 3, V + left).bfloat16()
        view, before = wide[:, :-1, left:], wide.clone()
        flat = view.reshape(4, V).contiguous()
        y, every = torch.randint(0, V, (4,), dtype=torch.int32), every_option(4, V)
        grads = torch.ones(1).expand(4), torch.randn(8)[::2]  # stride 0, as of a sum, and 2
        expected = every_result(flat, y, grads, **every)
        same_bits(every_result(view, y, grads, **every), expected)
        same_bits(every_result(view, y.long(), (torch.ones(4), grads[1].clone()), **every), expected)
        same_bits((wide,), (before,))
        backwards = torch.arange(3, -1, -1)
        rows = {name: every[name][backwards] for name in ("temperature", "target_logits")}
        turned = every_result(flat[backwards], y[backwards], (grads[0], grads[1][backwards]), **every | rows)
        same_bits((turned[0][:, backwards], turned[1][backwards]), expected)
        row = {name: every[name][2:3] for name in ("temperature", "target_logits")}
        alone = every_result(flat[2:3], y[2:3], (grads[0][:1], grads[1][2:3]), **every | row)
        same_bits(alone, (expected[0][:, 2:3], expected[1][2:3]))


def case_alignment() -> None:
    """Wide loads are promised only where all that is given begins, and every stride is, at a multiple of 16 bytes."""
    from rlhf_engine.kernels.rows import vector_of

    memory, bias = torch.zeros(4000).bfloat16(), torch.zeros(9)

    def view(first: int, stride_b: int, stride_t: int) -> torch.Tensor:
        return memory.as_strided((2, 3, 5), (stride_b, stride_t, 1), first)

    aligned = view(16, 800, 8)
    assert vector_of(aligned, None) == vector_of(aligned, bias) == 8
    assert vector_of(view(16, 801, 8)[:1]) == 8 and vector_of(aligned.float()[:, :, :4].contiguous()) == 4
    for wrong in (view(17, 800, 8), view(20, 800, 8), view(16, 804, 8), view(16, 800, 9), aligned[..., 1:]):
        assert vector_of(wrong) == vector_of(aligned, wrong) == 1
    assert vector_of(aligned, bias[1:]) == vector_of(bias[1:]) == 1


def case_out() -> None:
    """Into the logits themselves, views of them too, into a flat place, and into another dtype, unrounded."""
    wide = torch.randn(2, 4, 300).bfloat16()
    y, grads = torch.randint(0, 296, (6,)), (torch.randn(6), torch.randn(6))
    for last in (296, 295):
        x = wide[:, :-1, :last]
        statistics = score(x, y.clamp_max(last - 1))
        expected = gradient(x, y, statistics, grads)
        flat, float32 = torch.empty(6, last, dtype=x.dtype), torch.empty(2, 3, last)
        same_bits((gradient(x, y, statistics, grads, flat).view(2, 3, last),), (expected,))
        same_bits((gradient(x, y, statistics, grads, float32).bfloat16(),), (expected,))
        memory = wide.clone()
        place = memory[:, :-1, :last]
        gradient(place, y, statistics, grads, place)
        same_bits((place,), (expected,))
        place.copy_(x)
        same_bits((memory,), (wide,))


def case_parts() -> None:
    """Each of the six numbers of a segment by its formula; a segment of banned tokens has sums of 0."""
    segment = module().SEGMENT
    x, y = random_rows("float32", 2 * segment + 77)
    y[:] = torch.tensor([segment, 5, segment - 1])
    x[1, segment : 2 * segment] = -torch.inf
    x[2, [20, 3000]] = 25.0  # two maxima: the first counts
    parts = module().head_fold(x, y, *options(), 0, DEAD, True)
    assert parts.shape == (3, 6, 3) and parts.dtype == torch.float32
    same_bits((module().head_fold(x, y, *options(), 0, DEAD, False),), (parts[:, :4],))
    for k, z in enumerate(x.double().split(segment, dim=1)):
        m = z.amax(-1)
        d = (z - m[:, None]).nan_to_num(nan=-torch.inf)
        e = d.exp()
        z_y = torch.where(y // segment == k, x.gather(1, y[:, None]).squeeze(1), 0.0)
        sums = [e.sum(-1), (e * d.clamp_min(-1e3)).sum(-1), e.square().sum(-1)]
        torch.testing.assert_close(parts[k, [1, 2, 4]].double(), torch.stack(sums), rtol=2e-6, atol=2e-6)
        same_bits((parts[k, [0, 3, 5]],), (torch.stack([m.float(), z_y, (z.argmax(-1) + k * segment).float()]),))


def case_rounded_sum() -> None:
    """An exp that rounds down, as those of GPUs may, leaves s below 1; a logprob is not above 0 for that."""
    parts = torch.tensor([0.0, 0.9999, 0.0, 0.0])[None, :, None]
    assert module().head_combine(parts, torch.tensor([3]), 0, 7, DEAD)[0] == 0


def case_chunks(dtype: str) -> None:
    """Chunks of whole segments, the last one narrower, have the bits of the whole; so has the gradient of each."""
    segment = module().SEGMENT
    V = 3 * segment + 3000
    x, y = random_rows(dtype, V)
    y[:] = torch.tensor([segment, 3 * segment + 99, 5])
    every, grads = every_option(3, V, banned=False), (torch.randn(3), torch.randn(3))

    def columns(begin: int, end: int) -> dict[str, Any]:
        return every | {"bias": every["bias"][begin:end]}

    whole = module().head_fold(x, y, *options(**every), 0, DEAD, True)
    statistics = module().head_combine(whole, y, 0, V, DEAD)
    dx, parts, pieces = gradient(x, y, statistics, grads, **every), [], []
    for begin, end in ((0, segment), (segment, 3 * segment), (3 * segment, V)):
        piece = columns(begin, end)
        parts.append(module().head_fold(x[:, begin:end], y, *options(**piece), begin, DEAD, True))
        pieces.append(gradient(x[:, begin:end], y, statistics, grads, start=begin, **piece))
    same_bits((torch.cat(parts), torch.cat(pieces, -1)), (whole, dx))
    # A rank whose columns begin in the middle: targets count from there, and some are not its own.
    ours = module().head_combine(whole[1:].clone(), y, segment, V - segment, DEAD)
    own = y >= segment
    assert torch.equal(ours[0].isnan(), ~own) and torch.equal(ours[1].isnan(), ~own) and not ours[6].isnan().any()
    same_bits((ours[5],), (statistics[5].where(own, -torch.inf),))
    ours[6] -= segment
    its_own = columns(segment, V) | {name: every[name][own] for name in ("temperature", "target_logits")}
    close_statistics(ours[:, own], *true_statistics(x[own, segment:], y[own] - segment, **its_own))


def case_neutral_options() -> None:
    """What other rows of a batch need changes no bit of a row that does not: zeros, ones, its own logit in float32."""
    x, y = random_rows("bfloat16", module().SEGMENT + 17)
    grads = torch.randn(3), None
    temperature = torch.tensor([0.7, 1.0, 1.3])
    neutral = dict(
        bias=torch.zeros(x.shape[1]), temperature=temperature, target_logits=x.gather(1, y[:, None]).squeeze(1).float()
    )  # fmt: skip
    together = every_result(x, y, grads, **neutral)
    for row, number in enumerate(temperature.tolist()):
        one = slice(row, row + 1)
        alone = every_result(x[one], y[one], (grads[0][one], torch.zeros(1)), inverse_temperature=1 / number)
        same_bits(alone, (together[0][:, one], together[1][one]))
    same_bits((score(x, y, extras=False),), (score(x, y)[:6],))


def case_beyond_int32() -> None:
    """The last row of five lies 2**32 numbers from the first; where 32 bits overflow there is another one's memory."""
    stride, V = 2**30 + 16, 300
    with tempfile.NamedTemporaryFile() as file:  # sparse: only the pages that are written exist
        memory = torch.from_file(file.name, shared=True, size=4 * stride + V, dtype=torch.bfloat16)
        x = memory.as_strided((5, V), (stride, 1))
        row, y = random_rows("bfloat16", V, rows=1)
        x[4] = row[0]
        targets = torch.tensor([DEAD] * 4 + y.tolist())
        statistics, grads = score(x, targets), (torch.ones(5), torch.ones(5))
        same_bits((statistics[:, 4:],), (score(row, y),))
        expected = gradient(row, y, statistics[:, 4:], (grads[0][4:], grads[1][4:]))
        gradient(x, targets, statistics, grads, x)
        same_bits((x[4:],), (expected,))
        assert not x[:4].any()


def case_target_logits(dtype: str) -> None:
    """Dots of chosen rows in float32, the same bits wherever they lie; 0 for dead and wild targets."""
    block = module().WIDTH_BLOCK
    for width in (1, 7, block - 1, block, 2 * block + 9):
        hidden, weight = (torch.randn(rows, width).to(getattr(torch, dtype)) for rows in (6, 10))
        y = torch.tensor([0, 9, 10, -1, DEAD, 3])
        ours = module().target_logits(hidden, weight, y, DEAD)
        assert ours.dtype == torch.float32 and not ours[2:5].any()
        kept = torch.tensor([0, 1, 5])
        exact, float32 = ((hidden.to(d)[kept] * weight.to(d)[y[kept]]).sum(-1) for d in (torch.float64, torch.float32))
        close("logit", ours[kept], exact, float32)
        apart = module().target_logits(fenced(hidden, True)[0], fenced(weight, False)[0], y.int(), DEAD)
        alone = module().target_logits(hidden[5:], weight, y[5:], DEAD)
        same_bits((apart, alone), (ours, ours[5:]))


def case_scale() -> None:
    head = module()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for size in (0, 1, head.SCALE_BLOCK, head.SCALE_BLOCK + 3):
            x = torch.randn(size).to(dtype)
            ours, same, bad = x.clone(), x.clone(), x.clone()
            head.head_scale(ours, torch.tensor(0.3))
            same_bits((ours,), ((x.double() * torch.tensor(0.3).double()).to(dtype),))
            head.head_scale(same, torch.tensor(1.0))
            same_bits((same,), (x,))
            head.head_scale(bad, torch.tensor(torch.nan))
            assert bad.isnan().all()
    x, head.MOST_SCALERS = torch.ones(3, head.SCALE_BLOCK), 2  # a second round of the first program
    head.head_scale(x, torch.tensor(2.0))
    assert (x == 2).all()


def case_empty() -> None:
    head, none = module(), torch.zeros(0, dtype=torch.long)
    for shape in ((0, 7), (2, 0, 9000)):
        x = torch.empty(shape)
        parts = head.head_fold(x, none, *options(), 0, DEAD, False)
        assert parts.shape == (-(-shape[-1] // head.SEGMENT), 4, 0)
        statistics = head.head_combine(parts, none, 0, shape[-1], DEAD)
        assert statistics.shape == (6, 0) and gradient(x, none, statistics, (none.float(), None)).shape == shape
    assert head.target_logits(torch.empty(0, 7), torch.empty(3, 7), none, DEAD).shape == (0,)


CASES: dict[str, Callable[[], None]] = {
    **{
        f"{case.__name__.removeprefix('case_').replace('_', '-')}-{dtype}": partial(case, dtype)
        for case in (
            case_every_vocabulary, case_block_edges, case_real_vocabularies, case_options, case_shifted, case_banned,
            case_chunks, case_target_logits,
        )
        for dtype in DTYPES
    },
    **{f"dead-rows-{ignore_index}": partial(case_dead_rows, ignore_index) for ignore_index in (DEAD, 1)},
    **{
        case.__name__.removeprefix("case_").replace("_", "-"): case
        for case in (
            case_every_option_on_short_rows, case_tanh, case_confident, case_no_gradient, case_visible_mistakes,
            case_layouts, case_alignment, case_out, case_parts, case_rounded_sum, case_neutral_options,
            case_beyond_int32, case_scale, case_empty,
        )
    },
}  # fmt: skip
