"""What the globals of a pickle stand for: data of our own, or something inert; never the object they name."""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from isthmus.weights.formats.stored import MAX_DIMS, Span, Stored

__all__ = [
    "Array",
    "Dtype",
    "ForeignError",
    "Inert",
    "Storage",
    "StorageType",
    "Text",
    "call_global",
    "find_global",
    "set_items",
]

NO_BYTES = Span(Path(), 0, 0)
KEYS = (str, int, float, bool, bytes, type(None))  # hashing a deep tuple can exhaust the C stack


OLD_MODULES = (
    ("__builtin__.", "builtins."),
    ("copy_reg.", "copyreg."),
    ("numpy.core.", "numpy._core."),
    ("torch.cuda.", "torch."),
)
STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
}  # fmt: skip
NUMPY = {
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "c8": torch.complex64, "c16": torch.complex128,
    "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64,
    "u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64, "b1": torch.bool,
}  # fmt: skip
INERT = {
    "addict.addict.Dict", "argparse.Namespace", "builtins.bool", "builtins.complex", "builtins.float",
    "builtins.int", "builtins.object", "builtins.slice", "builtins.str", "builtins.range", "builtins.xrange",
    "collections.deque", "datetime.date", "datetime.datetime", "datetime.timedelta", "easydict.EasyDict",
    "fvcore.common.config.CfgNode", "lightning_fabric.utilities.data.AttributeDict",
    "mmengine.config.config.ConfigDict", "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy._core.multiarray.scalar", "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode",
    "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath",
    "pytorch_lightning.utilities.parsing.AttributeDict", "torch.device", "types.SimpleNamespace", "typing.Any",
    "yacs.config.CfgNode",
}  # fmt: skip
"""What training scripts store beside their weights."""

UNREADABLE = {
    "torch._utils._rebuild_qtensor": "a quantised tensor; dequantise() it",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor; call to_dense()",
    "torch._utils._rebuild_nested_tensor": "a nested tensor; call to_padded_tensor()",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no values; load it first",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass; take the tensors it wraps",
}


class ForeignError(Exception):
    """A pickle names an object that is no data; `name` is its global, `mend` what to do where that is known."""

    def __init__(self, name: str, mend: str = "") -> None:
        super().__init__(name)
        self.name, self.mend = name, mend


class Text(str):
    """A string that knows where it is in the file: NumPy's bytes are strings in old protocols."""

    __slots__ = ("span",)
    span: Span


class Known(NamedTuple):
    """A global that we know: what a pickle gets when it calls it."""

    name: str
    make: Callable[..., Any]


class Inert(NamedTuple):
    """What stands for an object that nobody needs: a bag of attributes, a date, a long text."""

    name: str


class StorageType(NamedTuple):
    """The class of a storage, as torch names it in a pickle."""

    dtype: torch.dtype


class Storage(NamedTuple):
    """Elements of `dtype`, from number `first` of `span` on."""

    span: Span
    dtype: torch.dtype
    first: int = 0


class Dtype:
    """A NumPy dtype; `torch` is None for what no tensor can hold (objects, text, records)."""

    def __init__(self, name: Any, *_flags: Any) -> None:
        self.name = name if isinstance(name, str) else ""
        self.order = self.name[:1] if self.name[:1] in ("<", ">", "=", "|") else "<"
        self.torch = NUMPY.get(self.name.lstrip("<>=|"))

    def build(self, state: Any) -> None:
        """Set what `numpy.dtype.__setstate__` would: the second entry is the byte order."""
        self.order = state[1]


class Array:
    """A NumPy array; `stored` is None until it is built, and stays so for what no tensor can hold."""

    def __init__(self, *_arguments: Any) -> None:
        self.stored: Stored | None = None

    def build(self, state: Any) -> None:
        """Set what `numpy.ndarray.__setstate__` would: [version,] shape, dtype, whether Fortran-ordered, bytes."""
        shape, dtype, fortran, content = state[-4:]
        self.stored = _array(content, dtype, shape, fortran=bool(fortran))


def set_items(target: Any, items: list[Any]) -> Any:
    """Put keys and values, which alternate, into a dict."""
    if isinstance(target, Inert):
        return target
    if type(target) is not dict or len(items) % 2:
        raise ForeignError(type(target).__name__)
    for key, value in zip(items[::2], items[1::2], strict=True):
        name = key.name if isinstance(key, Known | Inert) else str(key) if isinstance(key, str) else key
        if type(name) not in KEYS:
            raise ValueError(f"a key of type {type(key).__name__}")
        target[name] = value.stored if isinstance(value, Array) and value.stored else value
    return target


def find_global(name: str) -> Any:
    """What a global stands for; raises ForeignError for what we do not know."""
    for old, new in OLD_MODULES:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    if name in GLOBALS:
        found = GLOBALS[name]
        return Known(name, found) if callable(found) else found
    if name in INERT:
        return Known(name, partial(_inert, name))
    raise ForeignError(name, UNREADABLE.get(name, ""))


def call_global(called: Any, arguments: Any) -> Any:
    """What a call of a global gives; raises ForeignError for anything else that is called."""
    if not isinstance(called, Known):
        raise ForeignError(called.name if isinstance(called, Inert) else type(called).__name__)
    if type(arguments) is not tuple:
        raise ValueError(f"{called.name} called without arguments")
    return called.make(*arguments)


def _inert(name: str, *_arguments: Any) -> Inert:
    return Inert(name)


def _ints(values: Any) -> tuple[int, ...]:
    if type(values) not in (tuple, list):
        raise ValueError("a shape that is no list of numbers")
    return tuple(values)


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any = False, _hooks: Any = None, lazy: Any = None
) -> Stored:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    return _view(storage, storage.dtype, offset, shape, stride, lazy)


def _tensor_with_dtype(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, lazy: Any = None
) -> Stored:
    """torch._utils._rebuild_tensor_v3, for types without a storage class of their own."""
    return _view(storage, dtype, offset, shape, stride, lazy)


def _view(storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any, lazy: Any) -> Stored:
    """`lazy` says what torch has still to do with the numbers in the storage: {"conj": True}, {"neg": True}."""
    if lazy:
        raise ForeignError("torch.Tensor", "a lazily conjugated or negated tensor; call resolve_conj().resolve_neg()")
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor without a storage")
    return Stored(
        span=storage.span, dtype=dtype, shape=_ints(shape), stride=_ints(stride), offset=storage.first + offset
    )


def _parameter(tensor: Any, *_grad: Any) -> Any:
    """torch._utils._rebuild_parameter and what else wraps one tensor."""
    return tensor


def _tensor_of_type(make: Any, _type: Any, arguments: Any, _state: Any = None) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor that has attributes."""
    return call_global(make, arguments)


def _array(content: Any, dtype: Any, shape: Any, *, fortran: bool) -> Stored | None:
    if not isinstance(dtype, Dtype) or dtype.torch is None:
        return None
    if dtype.order == ">" and dtype.torch.itemsize > 1:
        raise ForeignError("numpy", "an array of big-endian numbers; call byteswap() and newbyteorder()")
    span = content.span if isinstance(content, Text) else content
    if not isinstance(span, Span):
        raise TypeError("an array without its bytes, as protocol 0 of pickle writes; newer ones are read")
    sizes = _ints(shape)
    if not fortran:
        return Stored(span=span, dtype=dtype.torch, shape=sizes)
    stride = tuple(prod(sizes[:axis]) for axis in range(min(len(sizes), MAX_DIMS + 1)))
    return Stored(span=span, dtype=dtype.torch, shape=sizes, stride=stride)


def _array_of(shape: Any, dtype: Any = None, content: Any = None, *_more: Any) -> Array:
    """numpy.ndarray itself, called with its bytes."""
    return _array_of_buffer(content, dtype, shape)


def _array_of_buffer(content: Any, dtype: Any, shape: Any, order: Any = "C") -> Array:
    """numpy._core.numeric._frombuffer, of pickle protocol 5."""
    array = Array()
    array.stored = _array(content, dtype, shape, fortran=order == "F")
    return array


def _bytes(text: Any = None, encoding: Any = "latin-1") -> Any:
    """_codecs.encode, which is how protocol 2 writes bytes, and bytes and bytearray themselves."""
    if text is None:
        return NO_BYTES
    if not isinstance(encoding, str) or encoding.replace("-", "") not in ("latin1", "iso88591"):
        raise ValueError("bytes in another encoding than latin-1")
    return text.span if isinstance(text, Text) else text


def _dict(items: Any = (), *_more: Any) -> Any:
    """collections.OrderedDict and its like, of nothing, of a dict or of pairs."""
    if type(items) is dict:
        return items
    made: dict[Any, Any] = {}
    for key, value in items:
        set_items(made, [key, value])
    return made


def _default_dict(_factory: Any = None, *items: Any) -> Any:
    return _dict(*items)


def _list(items: Any = ()) -> Any:
    return items if type(items) is list else list(_ints(items))


def _instance(kind: Any, *_base: Any) -> Any:
    """copyreg._reconstructor: how old protocols write an object without arguments."""
    return call_global(kind, ())


GLOBALS: Mapping[str, Any] = {
    "_codecs.encode": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "builtins.dict": _dict,
    "builtins.frozenset": _list,
    "builtins.list": _list,
    "builtins.set": _list,
    "builtins.tuple": _ints,
    "collections.Counter": _dict,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _default_dict,
    "copyreg._reconstructor": _instance,
    "numpy._core.multiarray._reconstruct": Array,
    "numpy._core.numeric._frombuffer": _array_of_buffer,
    "numpy.dtype": Dtype,
    "numpy.ndarray": _array_of,
    "torch.Size": _ints,
    "torch.Tensor": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.serialization._get_layout": partial(_inert, "layout"),
    "torch.storage.TypedStorage": StorageType(torch.uint8),
    "torch.storage.UntypedStorage": StorageType(torch.uint8),
    **{f"torch.{name}Storage": StorageType(dtype) for name, dtype in STORAGES.items()},
    **{f"torch.{name}Tensor": partial(_inert, name) for name in STORAGES},
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}
