"""What a layer with binary-coded weights holds: the coding as files have it, or as kernels read it, never both.

M output rows, K inputs, q planes, N groups. As in `BCQWeight`, these are parameters: planes (q, M, ceil(K / 8)), scales
(q or 1, M, N), offset (1, M, N) or None. `arrange` turns them into buffers in the form of `ops.arrange` and frees them;
`state_dict` gives them back bit for bit. Nested precision: one set of planes, and for every lower number of bits b its
own `scales_b` and `offset_b`. Knows nothing about what is computed with the weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from mikv import ops
from mikv.errors import CacheStateError, CheckpointError, ConfigError
from mikv.ops import MatmulShape
from mikv.weights.weight import BCQWeight, num_groups


class BCQModule(nn.Module):
    """A coding of `shape` and, for layers that add one, a bias (M,). `precisions` are the bits it can be read with."""

    planes: nn.Parameter | None
    bias: nn.Parameter | None
    codes: Tensor | None

    def __init__(
        self, shape: MatmulShape, *, bias: nn.Parameter | None = None, precisions: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.shape = shape
        self.precisions = precisions or (shape.planes,)
        for name, dtype, size in self._parts():
            self.register_parameter(name, _parameter(torch.empty(size, dtype=dtype, device=torch.get_default_device())))
        self.register_parameter("bias", bias)
        self.register_buffer("codes", None, persistent=False)
        for bits in self.precisions:
            self.register_buffer(self._arranged(bits), None, persistent=False)
        self._scales = self._arranged(shape.bits)

    @classmethod
    def from_weights(cls, weights: dict[int, BCQWeight], *, bias: nn.Parameter | None = None) -> Self:
        """The layer of codings by their number of bits, which share the planes of the largest; `bias` is taken over."""
        top = max(weights)
        weight = weights[top]
        with torch.device("meta"):
            module = cls(shape_of(weight), bias=None, precisions=tuple(sorted(weights)))
        module.bias = bias
        module.planes = _parameter(weight.planes)
        for bits, nested in weights.items():
            for part in ("scales", "offset"):
                tensor = getattr(nested, part)
                setattr(module, module._name(part, bits), None if tensor is None else _parameter(tensor))
        return module

    @property
    def is_arranged(self) -> bool:
        """Whether the weights are in the form that kernels read."""
        return self.codes is not None

    @property
    def num_bytes(self) -> int:
        """All that is stored for the matrix, every precision, without padding and bias."""
        return sum(t.nbytes for name, t in self.canonical() if name != "bias")

    def coding(self, bits: int | None = None) -> BCQWeight:
        """The coding that is read with `bits` planes, the present number by default."""
        parts = dict(self.canonical())
        bits = bits or self.shape.bits
        scales, offset = parts[self._name("scales", bits)], parts.get(self._name("offset", bits))
        return BCQWeight(parts["planes"][:bits], scales, offset, self.shape.in_features, self.shape.group_size)

    def require_sound(self, name: str) -> None:
        """Raise CheckpointError, naming the layer `name`, unless all precisions are whole and of this layer's shape."""
        found = dict(self.canonical())
        for part, dtype, size in self._parts():
            of_file = found[part].dtype, tuple(found[part].shape)
            if of_file != (dtype, size):
                raise CheckpointError(
                    f"{name}.{part} is {of_file[0]} {of_file[1]}, but {dtype} {size} by the configuration; the file is "
                    "damaged or its config.json is another's"
                )
        for bits in self.precisions:
            self.coding(bits).require_sound(name)

    def set_bits(self, bits: int) -> None:
        """Read so many planes from now on. Raises ConfigError if there are no scales for that."""
        if bits not in self.precisions:
            raise ConfigError(f"bits={bits} is not one of {', '.join(map(str, self.precisions))} that were quantized")
        self._scales = self._arranged(bits)
        self._fix_shape(bits=bits)

    def arrange(self) -> Tensor:
        """Bring the weights into the form that kernels read, unless they are in it; returns the codes."""
        if self.codes is not None:
            return self.codes
        self._take_local_shard()
        for bits in self.precisions:
            coding = self.coding(bits)
            codes, scales = ops.arrange(
                coding.planes, coding.scales, coding.offset, self.shape.in_features, self.shape.group_size
            )
            setattr(self, self._arranged(bits), scales)
            if bits == self.shape.planes:
                self.codes = codes
        for name, _, _ in self._parts():
            setattr(self, name, None)
        assert self.codes is not None
        self._fix_shape()
        return self.codes

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the parameters as files have them."""
        if self.codes is None:
            yield from ((n, p.detach()) for n, _, _ in self._parts() if (p := self._parameters[n]) is not None)
            return
        for bits in self.precisions:
            scales = getattr(self, self._arranged(bits))
            shape = replace(self.shape, bits=bits)
            planes, numbers, offset = ops.restore(self.codes, scales, shape)
            if bits == self.shape.planes:
                yield "planes", planes
            yield self._name("scales", bits), numbers
            if offset is not None:
                yield self._name("offset", bits), offset

    def extra_repr(self) -> str:
        """Shape, bits and group size."""
        shape = self.shape
        bits = f"bits={shape.bits}" + (f" of {self.precisions}" if len(self.precisions) > 1 else "")
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, {bits}, group_size={shape.group_size}, bias={self.bias is not None}"

    def _parts(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Parameters besides the bias: name, dtype and size."""
        shape = self.shape
        rows, groups = shape.out_features, num_groups(shape.in_features, shape.group_size)
        parts: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
            ("planes", torch.uint8, (shape.planes, rows, -(-shape.in_features // 8)))
        ]
        for bits in self.precisions:
            parts.append((self._name("scales", bits), torch.float16, (1 if shape.uniform else bits, rows, groups)))
            if shape.has_offset:
                parts.append((self._name("offset", bits), torch.float16, (1, rows, groups)))
        return parts

    def _fix_shape(self, **changes: Any) -> None:
        """Change the shape, and compute now what torch.compile cannot trace later."""
        self.shape = replace(self.shape, **changes)
        assert len(self.shape.flat) > 0

    def _name(self, part: str, bits: int) -> str:
        return part if bits == self.shape.planes else f"{part}_{bits}"

    def _arranged(self, bits: int) -> str:
        return self._name("arranged_scales", bits)

    def _take_local_shard(self) -> None:
        """Keep this process's part of weights that transformers has distributed over several."""
        planes: Any = self.planes
        if not hasattr(planes, "to_local"):
            return
        world = planes.device_mesh.size()
        for name, _, _ in self._parts():
            setattr(self, name, _parameter(getattr(self, name).to_local()))
        assert self.planes is not None
        _, rows, num_bytes = self.planes.shape
        inputs, group_size = self.in_features, self.shape.group_size
        if num_bytes < -(-inputs // 8):
            if inputs % (world * group_size):
                raise ConfigError(
                    f"group_size={group_size} cannot be split over {world} processes: a layer has {inputs} inputs, "
                    f"{inputs / world:g} for each; quantize with a group_size that divides that, or use fewer processes"
                )
            inputs //= world
        self._fix_shape(out_features=rows, in_features=inputs)
        self.is_shard = True

    is_shard = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device as everybody else, but keep the dtypes: only the bias is of the model's."""
        kept = {id(t) for ts in (self._parameters, self._buffers) for name, t in ts.items() if name != "bias"}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in kept or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_arranged:
            return
        if self.is_shard:
            raise CacheStateError(
                "this process holds only a part of the weights; save the model in one process, before it is split"
            )
        destination.update({prefix + name: tensor for name, tensor in self.canonical()})

    def _load_from_state_dict(self, *args: Any) -> None:
        was_arranged = self.is_arranged
        if was_arranged:
            for name, tensor in list(self.canonical()):
                setattr(self, name, _parameter(tensor))
            self.codes = None
            for bits in self.precisions:
                setattr(self, self._arranged(bits), None)
        super()._load_from_state_dict(*args)
        if was_arranged:
            self.arrange()


def shape_of(weight: BCQWeight) -> MatmulShape:
    """The shape that kernels are told, all planes being read."""
    return MatmulShape(
        out_features=weight.out_features,
        in_features=weight.in_features,
        group_size=weight.group_size,
        planes=weight.bits,
        bits=weight.bits,
        uniform=weight.is_uniform,
        has_offset=weight.offset is not None,
    )


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
