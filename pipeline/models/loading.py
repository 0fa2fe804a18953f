"""Reads a checkpoint's tensors straight to the device, and builds the model that they belong to.

Knows file formats and how to complain about a tensor by its name. Knows no architecture: a family's
`model.py` takes the tensors it wants from `Weights` and puts them together.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.models.base import Model
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.family import Family

Rename = Sequence[tuple[str, str]]  # (pattern, replacement): the first pattern that matches wins
Change = Callable[[torch.Tensor], torch.Tensor]

# Buffers that old checkpoints carry and every model computes for itself.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|position_ids)$")


def _read_safetensors(path: Path, device: torch.device, stack: ExitStack) -> Any:
    return stack.enter_context(safe_open(path, framework="pt", device=str(device)))


class _TorchFile:
    """A `.bin` file behind the two methods of `safe_open` that are used here."""

    def __init__(self, path: Path) -> None:
        self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class Weights:
    """A checkpoint's tensors by name, to be taken once each, on the device in the model's dtype.

    With `float8`, who takes a layer quantises it before the next is taken, so that no more than
    one layer is there in the model's dtype.
    """

    float8 = False

    def __init__(
        self,
        files: Sequence[Path],
        device: torch.device | str,
        dtype: torch.dtype,
        rename: Rename = (),
        float8: bool = False,
    ) -> None:
        self.float8 = float8
        self.device = torch.device(device)
        self.dtype = dtype
        self._stack = ExitStack()
        self._places: dict[str, tuple[Any, str]] = {}  # our name -> open file, its own name
        self._used: set[str] = set()
        self._changes: list[tuple[re.Pattern[str], Change]] = []
        rules = [(re.compile(pattern), new) for pattern, new in rename]
        for path in files:
            self._add(Path(path), rules)
        if not self._places:
            raise UserError("The checkpoint has no weight files (*.safetensors or *.bin).")

    def _add(self, path: Path, rules: list[tuple[re.Pattern[str], str]]) -> None:
        try:
            if path.suffix == ".safetensors":
                file = _read_safetensors(path, self.device, self._stack)
            else:
                file = _TorchFile(path)
        except Exception as error:  # torch.load raises whatever the pickle module does
            raise UserError(f"The weight file {path} cannot be read: {_reason(error)}") from error
        for own_name in file.keys():
            name = _renamed(own_name, rules)
            if name in self._places:
                raise UserError(
                    f"The checkpoint holds the tensor {own_name!r} twice, also in {path}."
                )
            self._places[name] = (file, own_name)

    def has(self, name: str) -> bool:
        return name in self._places

    def take(
        self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return the tensor `name`, contiguous on the device.

        Raises: UserError when it is missing or has another shape.
        """
        if name not in self._places:
            raise UserError(f"The checkpoint lacks the tensor {name!r} of shape {tuple(shape)}.")
        file, own_name = self._places[name]
        try:
            tensor = file.get_tensor(own_name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"The tensor {own_name!r} cannot be read: {_reason(error)}") from error
        if tuple(tensor.shape) != tuple(shape):
            found = tuple(tensor.shape)
            raise UserError(
                f"The tensor {own_name!r} has shape {found}, its config says {tuple(shape)}."
            )
        self._used.add(name)
        for pattern, change in self._changes:
            if pattern.search(name):
                tensor = change(tensor)
        return tensor.to(self.device, dtype or self.dtype).contiguous()

    def change(self, pattern: str, change: Change) -> None:
        """Pass tensors whose names match through `change`, which keeps their shape, when taken."""
        self._changes.append((re.compile(pattern), change))

    def take_rows(
        self, names: Sequence[str], rows: Sequence[int], columns: int | None, pad: int = 0
    ) -> torch.Tensor:
        """Return several tensors stacked by rows, each followed by zero rows up to `pad`."""
        tail = () if columns is None else (columns,)
        heights = [max(pad, n) for n in rows]
        merged = torch.zeros((sum(heights), *tail), dtype=self.dtype, device=self.device)
        start = 0
        for name, count, height in zip(names, rows, heights, strict=True):
            merged[start : start + count] = self.take(name, (count, *tail))
            start += height
        return merged

    def drop(self, name: str) -> None:
        """Count `name` as used, whether or not it is there."""
        self._used.add(name)

    def drop_all(self, prefix: str) -> int:
        """Count every tensor whose name starts with `prefix` as used; return how many there are."""
        found = [name for name in self._places if name.startswith(prefix)]
        self._used.update(found)
        return len(found)

    def finish(self) -> None:
        """Close the files.

        Raises: UserError that names the tensors which nobody took.
        """
        self._stack.close()
        left = [n for n in self._places if n not in self._used and not _BUFFERS.search(n)]
        if left:
            own = sorted(self._places[n][1] for n in left)
            more = f" and {len(own) - 3} more" if len(own) > 3 else ""
            raise UserError(
                "The checkpoint holds tensors that its config has no place for: "
                + ", ".join(map(repr, own[:3]))
                + more
                + "."
            )


def _reason(error: Exception) -> str:
    # NOTE: torch's own text advises to load the file unsafely.
    if type(error).__name__ == "UnpicklingError":
        return "it holds something else than plain tensors"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, new in rules:
        if pattern.search(name):
            return pattern.sub(new, name, count=1)
    return name


def open_weights(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    rename: Rename,
    float8: bool,
) -> Weights:
    return Weights(checkpoint.weight_files(), device, dtype, rename, float8)


# Where `load_model` takes tensors from: the seam for a benchmark of sizes that no disk holds.
WEIGHTS: ContextVar[Callable[[Checkpoint, torch.device, torch.dtype, Rename, bool], Weights]] = (
    ContextVar("weights", default=open_weights)
)


def load_model(
    checkpoint: Checkpoint,
    family: Family,
    device: torch.device | str,
    dtype: torch.dtype,
    quantization: str = "none",
) -> Model:
    """Build the checkpoint's model on the device.

    The torch half of a family is the module `model` beside its `spec`; it has `RENAME` and
    `build(checkpoint, family, weights)`.

    Raises: UserError when the files do not fit the config, naming the tensor.
    """
    from pipeline.models.fp8 import check_device

    module = importlib.import_module(type(family).__module__.rpartition(".")[0] + ".model")
    build: Callable[[Checkpoint, Family, Weights], Model] = module.build
    device, float8 = torch.device(device), quantization == "fp8"
    if float8:
        check_device(device)
    weights = WEIGHTS.get()(checkpoint, device, dtype, module.RENAME, float8)
    try:
        model = build(checkpoint, family, weights)
    except KeyError as error:
        key = error.args[0]
        raise UserError(f"model.id {checkpoint.id!r}: config.json lacks the key {key!r}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"model.id {checkpoint.id!r}: the weights do not fit {weights.device}; "
            "take a larger device or a smaller model"
        ) from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise checkpoint.describes_no(family.name, error) from error
    weights.finish()
    return model
