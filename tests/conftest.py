"""How many examples the property tests draw, `pytest --hypothesis-profile=long` for twenty times the usual number; and
one thread, since tests are small: two spend their time waking each other, ten times as long on a busy machine. The
verdicts on a module's Triton kernels, from one other process each. And the order of tests on GPUs."""

import kernel_script
import pytest
import torch
from hypothesis import Phase, settings

torch.set_num_threads(1)

settings.register_profile("usual", max_examples=100, deadline=None)
settings.register_profile("long", max_examples=2000, deadline=None)
# To judge planted bugs: the same examples each time, and the first that fails is enough.
settings.register_profile(
    "mutants", max_examples=100, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("usual")

# Behind all others; what is cheap, and what others rest on, comes first.
ON_GPU = (
    "test_loss_ops_on_gpu", "test_head_on_gpu", "test_operators_on_gpu", "test_head_shapes_on_gpu",
    "test_graphs_on_gpu", "test_streams_on_gpu", "test_engine_on_gpu", "test_pipeline_on_gpu", "test_large_on_gpu",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ON_GPU.index(item.path.stem) if item.path.stem in ON_GPU else -1)


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return kernel_script.run(request, "interpret", tmp_path_factory.mktemp("interpret"))


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return kernel_script.run(request, "compile", tmp_path_factory.mktemp("compile"))
