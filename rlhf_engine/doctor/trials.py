"""What works when it is tried: torch, its devices, the extension, and every op against the reference in float64.

torch is imported inside the functions: where it is broken, that is what has to be told.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from rlhf_engine.doctor.check import Check, attempt, said
from rlhf_engine.doctor.extension import LIBRARY, has_cuda_code
from rlhf_engine.doctor.machine import cores
from rlhf_engine.doctor.packages import hiding, install_again


def checks() -> Iterator[Check]:
    torch = attempt("torch", torch_imports)
    yield torch
    if torch.status == "fail":
        yield Check("the rest", "note", "not tried, since it needs torch")
        return
    for name, look in (("threads", threads), ("CUDA", cuda), ("triton", triton), ("transformers", transformers)):
        yield attempt(name, look)
    ops = attempt("ops", ops_import)
    yield ops
    if ops.status == "ok":
        from rlhf_engine.ops.backends import names

        if LIBRARY.exists():
            yield attempt("extension loads", extension_loads)
        for op in names():
            yield attempt(op, op_is_right)
        yield attempt("CUDA backends", cuda_backends)
    yield attempt("denormals", denormals)  # last: any of the imports above may have switched them off


def torch_imports(name: str) -> Check:
    try:
        import torch

        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
        return Check(name, "ok", f"{torch.__version__}, {build}, {torch.backends.cpu.get_cpu_capability()}")
    except Exception as error:
        stranger = hiding("torch")
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        fix = f"`pip install {'' if missing else '--force-reinstall '}torch`, of the build that fits this machine"
        if stranger:
            fix = f"rename or remove {stranger}, which is not the installed torch"
        return Check(name, "fail", f"import torch raised {said(error)}", fix)


def threads(name: str) -> Check:
    import torch

    count = torch.get_num_threads()
    if count > cores():
        fix = f"set OMP_NUM_THREADS={cores()}: threads that share a core wait for each other"
        return Check(name, "warn", f"{count} threads on {cores()} cores", fix)
    return Check(name, "ok", f"{count} of {cores()} cores")


def cuda(name: str) -> Check:
    import torch

    with warnings.catch_warnings(record=True) as caught:  # torch says there why a device cannot be used
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        seen = ", ".join(f"{d.name} ({d.total_memory / 1e9:.0f} GB, sm_{d.major}{d.minor})" for d in devices)
        return Check(name, "ok", seen)
    if not _has_driver():
        return Check(name, "ok", "no device: everything runs on the CPU")
    if not torch.version.cuda:
        fix = "install a CUDA build of torch (pytorch.org says which), then " + install_again()
        return Check(name, "warn", "there is an NVIDIA driver, but this torch is built for CPUs", fix)
    why = "".join(f" ({' '.join(str(warning.message).split())[:300]})" for warning in caught[:1])
    fix = f"update the driver to one for CUDA {torch.version.cuda}, or look at CUDA_VISIBLE_DEVICES"
    return Check(name, "warn", f"there is an NVIDIA driver, but torch sees no device{why}", fix)


def _has_driver() -> bool:
    return bool(shutil.which("nvidia-smi")) or Path("/dev/nvidiactl").exists()


def triton(name: str) -> Check:
    try:
        import triton
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        seen = "missing" if missing else f"import raised {said(error)}"
        fix = f"`pip install {'' if missing else '--force-reinstall '}triton`, or GPUs run without its kernels"
        return Check(name, "warn", seen, fix)
    return Check(name, "ok", f"{triton.__version__} imports")


def transformers(name: str) -> Check:
    try:
        import transformers
    except Exception as error:  # it also refuses versions of its own dependencies
        return Check(name, "fail", f"import raised {said(error)}", "`pip install --upgrade transformers`")
    return Check(name, "ok", f"{transformers.__version__} imports")


def ops_import(name: str) -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a library that does not load: extension_loads tells it
            from rlhf_engine.ops import backends
    except Exception as error:  # for example operators that an old library lacks
        return Check(name, "fail", f"import rlhf_engine.ops raised {said(error)}", f"build it again: {install_again()}")
    seen = (
        f"{len(backends.names())} ops; below: what runs them, then what was tried here and how far it is from float64"
    )
    return Check(name, "ok", seen)


def extension_loads(name: str) -> Check:
    from rlhf_engine.ops.backends import extension_missing

    why = " ".join(extension_missing().split())
    if why:
        return Check(name, "fail", why, f"build it again for this torch: {install_again()}")
    return Check(name, "ok", "its operators are registered")


def op_is_right(op: str) -> Check:
    """Every backend that this machine can run, on one small input; the reference in float64 is the truth."""
    import torch

    from rlhf_engine.doctor.probes import LIMIT, largest_error
    from rlhf_engine.ops.backends import available, chosen

    errors: dict[str, float] = {}
    wrong = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for backend in available(op, device):
            where = backend if device == "cpu" else f"{backend} on {device}"
            try:
                errors[where] = largest_error(op, backend, device)
                if not errors[where] <= LIMIT:  # so that NaN is wrong too
                    wrong.append(f"{where} is off by {errors[where]:.1g}")
            except Exception as error:
                wrong.append(f"{where} raised {said(error)}")
    if wrong:
        fix = f'{install_again()}, and if that does not help pass backend="reference" and report it'
        return Check(op, "fail", "; ".join(wrong), fix)
    picks = f"CPU {chosen(op, 'cpu'):<9}  CUDA {chosen(op, 'cuda'):<9}"
    return Check(op, "ok", f"{picks}  {', '.join(errors)}: {max(errors.values()):.0e}")


def cuda_backends(name: str) -> Check:
    import torch

    from rlhf_engine.ops.backends import chosen, names

    lacking = [op for op in names() if chosen(op, "cuda") == "reference"]
    if not torch.cuda.is_available() or not lacking:
        return Check(name, "ok", "every op has one" if not lacking else "not needed without a device")
    seen = f"none for {', '.join(lacking)}: plain PyTorch runs there"
    if has_cuda_code():
        return Check(name, "note", seen, "nothing to install: this version chooses none for them")
    return Check(name, "warn", seen, f"install the CUDA toolkit (nvcc on PATH, or CUDA_HOME), then {install_again()}")


def denormals(name: str) -> Check:
    import torch

    tiny = torch.full((1 << 20,), 1e-40)  # large enough for the worker threads to take part
    if (tiny * 1 > 0).all():
        return Check(name, "ok", "1e-40 stays what it is")
    fix = "find the library that was linked with -ffast-math among those imported at start-up, and do without it"
    return Check(name, "warn", "flushed to zero in this process: 1e-40 becomes 0", fix)
