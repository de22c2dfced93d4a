import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from allocations import largest_allocation
from mikv.errors import CheckpointError, ConfigError
from mikv.ops import lut_matmul
from mikv.weights.embedding import BCQEmbedding, TiedHead
from mikv.weights.linear import BCQLinear
from mikv.weights.module import BCQModule
from mikv.weights.solve import solve
from mikv.weights.weight import BCQWeight

SIZES = [(1, 32, 32), (7, 40, 32), (64, 64, None), (65, 100, 32), (130, 96, 64)]  # M, K, g


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


def coding(rows: int = 65, columns: int = 100, group_size: int | None = 32, method: str = "offset") -> BCQWeight:
    return solve(matrix(rows, columns), 3, group_size, method, None)


def layer(weight: BCQWeight | None = None, *, bias: bool = True) -> BCQLinear:
    weight = weight or coding()
    parameter = nn.Parameter(torch.linspace(-1, 1, weight.out_features)) if bias else None
    return BCQLinear.from_weights({weight.bits: weight}, bias=parameter)


def parts(module: BCQModule) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if name != "bias"}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("method", ["offset", "rtn", "alternating"])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SIZES)
def test_output_is_the_product_with_the_matrix_that_the_coding_stands_for(
    rows: int, columns: int, group_size: int | None, method: str
) -> None:
    weight = coding(rows, columns, group_size, method)
    module = layer(weight)
    x = torch.randn(2, 5, columns)
    expected = nn.functional.linear(x, weight.dequantize(), module.bias)
    # kernels may round activations to 8 bits: a hundredth of the largest output
    assert (module(x) - expected).abs().max() <= 0.02 * expected.abs().max()
    assert module(x).shape == (2, 5, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    assert layer().to(dtype)(torch.randn(3, 100, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("method", ["offset", "rtn", "alternating"])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SIZES)
def test_state_is_the_coding_before_and_after_it_is_arranged(
    rows: int, columns: int, group_size: int | None, method: str
) -> None:
    weight = coding(rows, columns, group_size, method)
    module = layer(weight)
    before = parts(module)
    assert equal(before, {n: t for n in ("planes", "scales", "offset") if (t := getattr(weight, n)) is not None})
    module(torch.randn(1, columns))
    assert module.is_arranged
    assert equal(parts(module), before)
    assert torch.equal(module.coding().dequantize(), weight.dequantize())


def test_weights_exist_once() -> None:
    module = layer(coding(256, 512))
    module(torch.randn(1, 512))
    held = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    assert held - module.bias.nbytes == module.num_bytes == coding(256, 512).num_bytes


def test_a_step_allocates_no_copy_of_the_weights() -> None:
    """True of the native kernels; PyTorch's twin of them unpacks the matrix."""
    from mikv.ops import native

    if native.module is None or not hasattr(native.module, "matmul"):
        pytest.skip("the native kernels are not built")
    module, x = layer(coding(1024, 1024)), torch.randn(1, 1024)
    module(x)
    with torch.no_grad():
        assert largest_allocation(lambda: module(x)) < module.num_bytes / 8


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize(
    "change", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.bfloat16)]
)
def test_changing_the_dtype_changes_the_bias_only(arranged: bool, change: Callable[[nn.Module], nn.Module]) -> None:
    module = layer()
    before = parts(module)
    if arranged:
        module.arrange()
    change(module)
    assert equal(parts(module), before)
    assert parts(module)["scales"].dtype == torch.float16
    assert module.bias.dtype != torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("arranged", [False, True])
def test_a_copy_is_independent_and_equal(copied: Callable[[nn.Module], nn.Module], arranged: bool) -> None:
    module, x = layer(), torch.randn(2, 100)
    if arranged:
        module.arrange()
    twin = copied(module)
    assert torch.equal(twin(x), module(x))
    assert twin.codes.data_ptr() != module.codes.data_ptr()


@pytest.mark.parametrize("arranged", [False, True])
def test_loading_a_state_replaces_the_weights(arranged: bool) -> None:
    module, other = layer(), layer(solve(-matrix(65, 100), 3, 32, "offset", None))
    if arranged:
        module.arrange()
    module.load_state_dict(other.state_dict())
    x = torch.randn(2, 100)
    assert torch.equal(module(x), other(x))


def test_inputs_that_require_gradients_are_multiplied() -> None:
    module, x = layer(), torch.randn(2, 100)
    with torch.enable_grad():
        assert torch.equal(module(x.clone().requires_grad_()), module(x))
    assert not any(p.requires_grad for n, p in layer().named_parameters() if n != "bias")


def test_a_layer_says_what_it_is() -> None:
    assert "in_features=100, out_features=65, bits=3, group_size=32, bias=True" in repr(layer())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scales", lambda t: -t, "negative"),
        ("scales", lambda t: t.float(), "float16"),
        ("planes", lambda t: t.to(torch.int8), "uint8"),
        ("planes", lambda t: t[:, :, :-1], "uint8"),
        ("offset", lambda t: t * float("nan"), "not finite"),
    ],
)
def test_damaged_parts_are_named(part: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    module = layer()
    setattr(module, part, nn.Parameter(change(getattr(module, part).detach()), requires_grad=False))
    with pytest.raises(CheckpointError, match=f"some.layer.*{message}"):
        module.require_sound("some.layer")


def test_embedding_rows_are_rows_of_the_matrix() -> None:
    weight = coding(130, 100)
    embedding = BCQEmbedding.from_weights({3: weight})
    tokens = torch.tensor([[0, 129, 64], [31, 32, 64]])
    expected = weight.dequantize()[tokens]
    assert torch.allclose(embedding(tokens), expected, atol=1e-6)
    assert embedding(tokens[:, :0]).shape == (2, 0, 100)


def test_embedding_answers_in_the_dtype_of_the_model() -> None:
    embedding = BCQEmbedding.from_weights({3: coding()}).to(torch.bfloat16)
    assert embedding(torch.tensor([1])).dtype == torch.bfloat16


def test_a_tied_head_has_no_weights_of_its_own_and_follows_its_copy() -> None:
    embedding = BCQEmbedding.from_weights({3: coding()})
    model = nn.ModuleDict({"embedding": embedding, "head": TiedHead(embedding)})
    assert [name for name in model.state_dict() if name.startswith("head")] == []
    x = torch.randn(2, 100)
    expected = lut_matmul(x, embedding.arrange(), embedding.arranged_scales, None, embedding.shape)
    twin = copy.deepcopy(model)
    assert torch.equal(model["head"](x), expected)
    assert twin["head"]._embedding[0] is twin["embedding"]


def test_bits_that_were_not_quantized_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits=2 is not one of 3"):
        layer().set_bits(2)
