"""Arguments of a call changed into others: of any dtype, shape, stride, kind and place that PyTorch knows."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_POWERS = (2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**31), -(2**63))
_INTEGERS = (-1, 0, 1, 2, 3, 7, 31, 32, 33, 64, 192, 1000, *_POWERS)
_FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-45, 1e30, 1e308)
_STRANGERS: tuple[Any, ...] = (None, "x", 1.5, True, (), [], {}, object(), float("nan"))
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = (*_FLOATING, torch.int64, torch.int32, torch.uint8, torch.bool)


class Subclass(Tensor):
    """A tensor of another type."""


class Temporaries:
    """A sequence whose items live as long as one looks at them."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        item = self._items[index]
        return item.clone() if isinstance(item, Tensor) else item


def places(arguments: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Where the arguments are, those inside of lists and tuples, too."""
    for i, argument in enumerate(arguments):
        yield (*path, i)
        if isinstance(argument, list | tuple):
            yield from places(argument, (*path, i))


def at(arguments: Any, path: tuple[int, ...]) -> Any:
    return at(arguments[path[0]], path[1:]) if path else arguments


def put(arguments: Any, path: tuple[int, ...], new: Any) -> Any:
    """The arguments with another one at `path`."""
    if not path:
        return new
    changed = list(arguments)
    changed[path[0]] = put(changed[path[0]], path[1:], new)
    return tuple(changed) if isinstance(arguments, tuple) else changed


def changed(value: Any, everything: list[Any], choose: random.Random) -> Any:
    """Something else in the place of an argument."""
    if choose.random() < 0.08:
        return choose.choice(_STRANGERS)
    if choose.random() < 0.08:
        return at(everything, choose.choice(list(places(everything))))  # another argument
    if isinstance(value, Tensor):
        return choose.choice(_TENSOR_CHANGES)(value, everything, choose) if is_plain(value) else value
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return choose.choice((*_STRANGERS, 2, -1, torch.zeros(3), "avx2", "scalar"))
    if isinstance(value, int):
        return choose.choice((*_INTEGERS, value - 1, value + 1, value * 2, 1.0))
    if isinstance(value, float):
        return choose.choice((*_FLOATS, "x", 10**400))
    return changed_sequence(value, choose)


def is_plain(x: Any) -> bool:
    """Whether PyTorch itself can be asked to change a tensor: it crashes on copies of those without memory."""
    plain = type(x) is Tensor and x.device.type == "cpu" and x.layout == torch.strided and not x.is_nested
    return plain and not x.is_quantized and (x.numel() == 0 or x.untyped_storage().nbytes() > 0)


def changed_sequence(value: Any, choose: random.Random) -> Any:
    items = list(value)
    choose.choice(
        (
            items.reverse,
            items.clear,
            lambda: items and items.pop(choose.randrange(len(items))),
            lambda: items and items.append(items[0]),
            lambda: items and items.insert(0, choose.choice(items)),
            lambda: choose.shuffle(items),
        )
    )()
    if choose.random() < 0.2:
        return Temporaries(list(value))
    return tuple(items) if isinstance(value, tuple) else items


def _axis(x: Tensor, choose: random.Random) -> int:
    return choose.randrange(x.dim()) if x.dim() else 0


def _of_another_dtype(x: Tensor, _: Any, choose: random.Random) -> Any:
    return x.to(choose.choice(_DTYPES))


def _bits_of_another_dtype(x: Tensor, _: Any, choose: random.Random) -> Any:
    return x.contiguous().view(choose.choice(_DTYPES))


def _transposed(x: Tensor, _: Any, choose: random.Random) -> Any:
    first, second = _axis(x, choose), _axis(x, choose)
    return choose.choice((x.transpose(first, second), x.transpose(first, second).contiguous().transpose(first, second)))


def _strided(x: Tensor, _: Any, choose: random.Random) -> Any:
    axis = _axis(x, choose)
    return torch.cat((x, x), axis).unflatten(axis, (-1, 2)).select(axis + 1, 0)


def _expanded(x: Tensor, _: Any, choose: random.Random) -> Any:
    axis = _axis(x, choose)
    size = choose.choice((x.shape[axis], x.shape[axis] + 1, 2**20, 2**31, 2**40))
    return x.narrow(axis, 0, 1).expand(*x.shape[:axis], size, *x.shape[axis + 1 :])


def _cut(x: Tensor, _: Any, choose: random.Random) -> Any:
    axis = _axis(x, choose)
    piece = x.narrow(axis, 0, choose.randrange(x.shape[axis] + 1))
    return choose.choice((piece, piece.contiguous()))


def _longer(x: Tensor, _: Any, choose: random.Random) -> Any:
    return torch.cat((x, x), _axis(x, choose))


def _of_other_axes(x: Tensor, _: Any, choose: random.Random) -> Any:
    return choose.choice((x[None], x[..., None], x.flatten(), x.reshape(1, 1, 1, 1, 1, 1, -1), x.flatten()[0]))


def _empty_but_huge(x: Tensor, _: Any, choose: random.Random) -> Any:
    sizes = list(x.shape) or [1]
    sizes[choose.randrange(len(sizes))] = 0
    sizes[choose.randrange(len(sizes))] = choose.choice((0, 2**31, 2**40, 2**61))
    return torch.empty(0, dtype=x.dtype).as_strided(sizes, [1] * len(sizes)) if 0 in sizes else x


def _filled(x: Tensor, _: Any, choose: random.Random) -> Any:
    if x.is_floating_point():
        return torch.full_like(x, choose.choice((*_FLOATS[:7], 7e4 if x.dtype == torch.float32 else 6e4)))
    if x.dtype in (torch.bool, torch.uint8):
        return torch.full_like(x, choose.choice((0, 1)))
    top = torch.iinfo(x.dtype).max
    return torch.full_like(x, choose.choice([n for n in (*_INTEGERS, top, -top - 1) if -top - 1 <= n <= top]))


def _one_number_else(x: Tensor, _: Any, choose: random.Random) -> Any:
    other, new = x.clone().contiguous(), _filled(x.new_empty(1), _, choose)
    if other.numel():
        other.view(-1)[choose.randrange(other.numel())] = new[0]
    return other


def _random_bits(x: Tensor, _: Any, choose: random.Random) -> Any:
    generator = torch.Generator().manual_seed(choose.randrange(1 << 30))
    return torch.randint(256, (x.nbytes,), generator=generator, dtype=torch.uint8).view(x.dtype).view(x.shape)


def _elsewhere_in_memory(x: Tensor, _: Any, choose: random.Random) -> Any:
    """As it is, but from any byte on: NumPy allows it."""
    shift = choose.choice((1, 2, 3, 4, 8, 20))
    memory = np.zeros(x.nbytes + 64, dtype=np.uint8)
    whole = x.contiguous().view(-1).view(torch.uint8).numpy() if x.numel() else memory[:0]
    memory[shift : shift + len(whole)] = whole
    return torch.frombuffer(memory, dtype=x.dtype, count=max(1, x.numel()), offset=shift)[: x.numel()].view(x.shape)


def _in_anothers_memory(x: Tensor, everything: Any, choose: random.Random) -> Any:
    others = [o for path in places(everything) if is_plain(o := at(everything, path)) and o.is_contiguous()]
    others = [o for o in others if o.nbytes >= max(1, x.nbytes) and o.nbytes % max(1, x.element_size()) == 0]
    if not others:
        return x
    return choose.choice(others).view(-1).view(torch.uint8)[: x.nbytes].view(x.dtype).view(x.shape)


def _fake(x: Tensor, _: Any, __: Any) -> Any:
    return FakeTensorMode().from_tensor(x.clone())


def _without_memory(x: Tensor, _: Any, __: Any) -> Any:
    other = x.clone()
    other.untyped_storage().resize_(0)
    return other


def _from_numpy(x: Tensor, _: Any, choose: random.Random) -> Any:
    array = x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()
    flipped = np.flip(array, _axis(x, choose)) if x.dim() else array
    return choose.choice((array, flipped, array.astype(">f4"), array.tolist()))


def _of_another_kind(x: Tensor, _: Any, choose: random.Random) -> Any:
    makers: tuple[Callable[[], Any], ...] = (
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        lambda: x.as_subclass(Subclass),
        lambda: torch.nn.Parameter(x, requires_grad=False),
        lambda: x.clone().requires_grad_(),
        lambda: x.clone().requires_grad_() * 1,
        lambda: torch._neg_view(x),
        lambda: x.to(torch.complex64),
        lambda: x.tolist(),
        lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([x, x]),
        lambda: x.to_mkldnn(),
    )
    return choose.choice(makers)()


_TENSOR_CHANGES: tuple[Callable[[Tensor, Any, random.Random], Any], ...] = (
    _of_another_dtype,
    _bits_of_another_dtype,
    _transposed,
    _strided,
    _expanded,
    _cut,
    _longer,
    _of_other_axes,
    _empty_but_huge,
    _filled,
    _one_number_else,
    _one_number_else,
    _random_bits,
    _elsewhere_in_memory,
    _in_anothers_memory,
    _fake,
    _without_memory,
    _from_numpy,
    _of_another_kind,
)
