"""Every kernel a few times at small awkward sizes, for tools under which a launch takes a hundred times as long.

Answers are compared with the reference, loosely: what is looked for here is what the tool finds.
"""

from __future__ import annotations

import argparse

import torch

from rlhf_engine import ops
from rlhf_engine.bench import head_cases, ops_cases
from rlhf_engine.bench.case import Case, errors, wrong

# One that fits a warp, one in the middle, one split over several blocks; with a row that is nothing but padding.
SHAPES = ((3, 7), (5, 300), (2, 9001))


def cases(device: torch.device) -> list[Case]:
    found = [
        ops_cases.loss_side(op, "reduced", *shape, device) for op in ops_cases.BYTES for shape in SHAPES
    ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        found += ops_cases.logprobs("reduced", 5, 1013, dtype, device)
        for op in head_cases.NHV:
            found.append(head_cases.head(op, "reduced", 70, 24, 1013, dtype, device))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    count = 0
    for case in cases(device):
        tensors = case.make(torch.Generator(device).manual_seed(0))
        truth = case.truth(tensors)
        for way in case.ways:
            if way.name.startswith("ours"):
                off = wrong(errors(way.run(tensors), truth), case.bounds)
                if off:
                    raise SystemExit(f"{case.name}, {way.name}: {off}")
                count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    backends = sorted({name for op in ops.backends.names() for name in ops.available(op, device.type)})
    print(f"{count} answers of {', '.join(backends)} are right")


if __name__ == "__main__":
    main()
