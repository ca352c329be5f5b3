"""Checkpoints: Detectron2's, but failed saves leave no half file and pickles run no code."""

import codecs
import collections
import os
import pickle
import re
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

# Stands before the suffix of a checkpoint that is being written.
_PARTIAL = ".partial"
# What a training calls its checkpoints.
_OF_TRAINING = re.compile(r"model_(\d+|final)\.pth")


class ProposalCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with four guards.

    * A file appears under its own name, and in ``last_checkpoint``, only when it is complete.
    * Files are read as tensors, numpy arrays, numbers, strings and plain containers. A file that
      asks for anything else is refused: a pickle can run any code.
    * Checkpoints of a training of which none is said to be the last are not written over.
    * A file that is missing, cut off or refused gets one line that says which and how to go on.

    Attributes:
        weights_key: the key of the configuration that names the file, for these lines.
        without_weights: what the model has when the key is "", for the same lines.
        missing_keys: names of the model's parameters and buffers that no checkpoint has set yet.
        loaded_path: the file of the last :meth:`load`, "" before it or when it had none.
        last_saved: name of the last file that this checkpointer has written, "" before it.
        other_shapes: of the last :meth:`load`, names of parameters that are of another shape in the
            file, with both shapes, the file's first.
    """

    weights_key = "MODEL.WEIGHTS"
    without_weights = "starts from random weights"

    def __init__(self, model: nn.Module, save_dir: str = "", **kwargs: Any):
        """Take the arguments of ``DetectionCheckpointer``."""
        super().__init__(model, save_dir, **kwargs)
        self.missing_keys = set(self.model.state_dict())
        self.loaded_path = ""
        self.last_saved = ""
        self.other_shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def save(self, name: str, **kwargs: Any) -> None:
        """Save to ``<save_dir>/<name>.pth``, atomically, and make it the last checkpoint.

        Args:
            name: file name without suffix.
            kwargs: further data to save.

        Raises:
            OSError: in one line, if the disk is full or does not let it be written. The unfinished
                file is removed.
        """
        try:
            # Detectron2 writes the file and calls ``tag_last_checkpoint``, which names it rightly.
            super().save(name + _PARTIAL, **kwargs)
            self.last_saved = name
        except BaseException as error:
            for unfinished in (
                f"{name}{_PARTIAL}.pth",
                os.path.basename(self._tag_file) + _PARTIAL,
            ):
                with suppress(OSError):
                    os.remove(os.path.join(self.save_dir, unfinished))
            reason = _why_not_written(error)
            if reason is None:
                raise
            last = "--resume goes on from the last one" if self.has_checkpoint() else "start again"
            raise OSError(
                f"Checkpoint {name}.pth cannot be written to {self.save_dir} ({reason}). Make "
                f"room, then {last}."
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write ``last_checkpoint``, atomically.

        Args:
            last_filename_basename: name of the checkpoint file in ``save_dir``.
        """
        basename = last_filename_basename.replace(f"{_PARTIAL}.pth", ".pth")
        if basename != last_filename_basename:
            written = os.path.join(self.save_dir, last_filename_basename)
            os.replace(written, os.path.join(self.save_dir, basename))
        with open(self._tag_file + _PARTIAL, "w", encoding="utf-8") as f:
            f.write(basename)
        os.replace(self._tag_file + _PARTIAL, self._tag_file)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the last checkpoint of ``save_dir`` if asked to and there is one, else ``path``.

        Raises:
            ValueError: ``save_dir`` has checkpoints of a training, and does not say which is the
                last: a training from the beginning would overwrite them.
            FileNotFoundError: as :meth:`load`.
        """
        if resume and self.save_dir and self.save_to_disk and not self.has_checkpoint():
            self._check_has_no_training(path)
        return super().resume_or_load(path, resume=resume)

    def _check_has_no_training(self, path: str) -> None:
        """``path`` is what a training from the beginning would start from, and no matter of it."""
        names = self.path_manager.ls(self.save_dir) if os.path.isdir(self.save_dir) else []
        start = os.path.realpath(path) if path else ""
        names = [
            name
            for name in names
            if _OF_TRAINING.fullmatch(name)
            and os.path.realpath(os.path.join(self.save_dir, name)) != start
        ]
        if names:
            newest = max(
                names, key=lambda name: os.path.getmtime(os.path.join(self.save_dir, name))
            )
            raise ValueError(
                f"{self.save_dir} has checkpoints, the newest is {newest}, but no file "
                f"'last_checkpoint', which says where to go on: write {newest} into "
                f"{self._tag_file}, or take another folder for the output."
            )

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load from ``path``, as ``DetectionCheckpointer`` does.

        Args:
            path: file or address; "" for none, which leaves the model as it is.

        Raises:
            FileNotFoundError: when there is no such file, or it cannot be downloaded.
            ValueError: when the file is cut off, or holds more than a checkpoint's data, or none.
        """
        if path:
            self._check_exists(path)
        content = super().load(path, *args, **kwargs)
        self.loaded_path = path
        return content

    def _check_exists(self, path: str) -> None:
        file = urlparse(path)._replace(query="").geturl()
        try:
            if os.path.isfile(self.path_manager.get_local_path(file)):
                return
            reason = "is missing"
        except OSError as error:  # also what a failed download raises
            reason = f"cannot be fetched ({error})"
        resumed = f"; with --resume, {self._tag_file} names the file: correct or remove it"
        raise FileNotFoundError(
            f"Checkpoint {file} {reason}. Set {self.weights_key} to a file that exists ('' "
            f"{self.without_weights}){resumed if self.save_dir else ''}."
        )

    @property
    def _tag_file(self) -> str:
        return os.path.join(self.save_dir, "last_checkpoint")

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            # Read once with the safe unpickler before Detectron2 reads it with the plain one.
            if filename.endswith(".pkl"):
                with PathManager.open(filename, "rb") as f:
                    _NumpyUnpickler(f, encoding="latin1").load()
            elif filename.endswith(".pyth"):
                self._torch_load(filename)
            with _numpy_allowed():
                return super()._load_file(filename)
        # Unpicklers raise all of these on damaged files; torch has RuntimeError for bad archives.
        except (
            pickle.UnpicklingError,
            EOFError,
            RuntimeError,
            OSError,
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
            UnicodeDecodeError,
        ) as error:
            raise ValueError(self._why_not_read(filename, error)) from error

    def _why_not_read(self, filename: str, error: Exception) -> str:
        mend = self.mend
        # torch's words for it, and those of the unpickler below.
        refused = re.search(r"(?:GLOBAL|[Uu]nsupported class|asks for) ([\w.]+\w)", str(error))
        if refused:
            return (
                f"Checkpoint {filename} is not read: it holds {refused[1]}, which may run code. If "
                "you trust it, save its tensors alone (torch.load with weights_only=False, then "
                f"torch.save of its 'model'), or {mend}"
            )
        if isinstance(error, OSError) and error.errno:
            return f"Checkpoint {filename} cannot be read ({error.strerror}): mend that, or {mend}"
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        # An unpickler's bare key says nothing, and torch's advice not to be safe is not ours.
        says_nothing = " " not in first_line or "weights_only" in first_line
        return (
            f"Checkpoint {filename} ({os.path.getsize(filename)} bytes) cannot be read"
            f"{'' if says_nothing else f' ({first_line})'}: it is cut off, or not a checkpoint of "
            f"plain tensors or arrays. Remove it, and {mend}"
        )

    @property
    def mend(self) -> str:
        """What to do about a file that cannot be used."""
        resumed = f" or, for --resume, in {self._tag_file}" if self.save_dir else ""
        return f"name a whole one in {self.weights_key}{resumed}."

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        wrong = _what_is_no_weight(checkpoint["model"])
        if wrong is not None:
            file = self._parsed_url_during_load._replace(query="").geturl()
            raise ValueError(
                f"{file} is no checkpoint: {wrong} where tensors or "
                f"arrays by their names belong; {self.mend}"
            )
        incompatible = super()._load_model(checkpoint)
        self.other_shapes = {
            name: (tuple(of_file), tuple(of_model))
            for name, of_file, of_model in incompatible.incorrect_shapes
        }
        self.missing_keys &= {*incompatible.missing_keys, *self.other_shapes}
        return incompatible

    def _torch_load(self, f: str) -> dict[str, Any]:
        with _numpy_allowed():
            return torch.load(f, map_location=torch.device("cpu"), weights_only=True)


def _what_is_no_weight(state: Any) -> str | None:
    """What a model's weights in a file have that is none; None where all are weights."""
    if not isinstance(state, dict):
        return f"it holds a {type(state).__name__}"
    for name, value in state.items():
        if not isinstance(name, str):
            return f"it holds a name {name!r}"
        if not isinstance(value, torch.Tensor | np.ndarray):
            return f"its {name!r} is of type {type(value).__name__}"
    return None


def _why_not_written(error: BaseException) -> str | None:
    """The reason of an error about a disk; None for any other error."""
    for cause in (error, error.__context__):
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
    # torch's own writer, when the end of its file cannot be written.
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return "the disk is full"
    return None


class _NumpyUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in builtin containers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which may run code.")
        return _SAFE_GLOBALS[module, name]


def _safe_globals() -> dict[tuple[str, str], Any]:
    """What pickles of numpy arrays name; numpy < 2 called "numpy._core" "numpy.core"."""
    array = np.zeros(1)
    functions = {
        ("multiarray", "_reconstruct"): array.__reduce__()[0],
        ("multiarray", "scalar"): array[0].__reduce__()[0],
        ("numeric", "_frombuffer"): array.__reduce_ex__(5)[0],
    }
    found = {
        (f"numpy.{core}.{module}", name): function
        for (module, name), function in functions.items()
        for core in ("core", "_core")
    }
    found["numpy", "ndarray"] = np.ndarray
    found["numpy", "dtype"] = np.dtype
    found["collections", "OrderedDict"] = collections.OrderedDict
    found["_codecs", "encode"] = codecs.encode  # bytes, in the pickles of Python 2
    return found


_SAFE_GLOBALS = _safe_globals()


def _numpy_allowed() -> AbstractContextManager[None]:
    """Let torch read NumPy's numbers and arrays beside tensors, within this context."""
    names = [function for function in _SAFE_GLOBALS.values() if function is not codecs.encode]
    # NumPy's types of numbers have classes of their own, to which an element type is restored.
    names += {type(np.dtype(code)) for code in "?bBhHiIlLqQefdSU"}
    if not hasattr(torch.serialization, "safe_globals"):  # torch < 2.5
        torch.serialization.add_safe_globals(names)
        return nullcontext()
    # The functions under the names of both versions of NumPy.
    names += [(function, f"{module}.{name}") for (module, name), function in _SAFE_GLOBALS.items()]
    return torch.serialization.safe_globals(names)
