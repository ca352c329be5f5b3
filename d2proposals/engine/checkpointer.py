"""Checkpoints: Detectron2's, but interrupted saves leave no half file and pickles run no code."""

import codecs
import collections
import os
import pickle
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

# Stands before the suffix of a checkpoint that is being written.
_PARTIAL = ".partial"


class ProposalCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with three guards.

    * A file appears under its own name, and in ``last_checkpoint``, only when it is complete.
    * Files are read as tensors, numpy arrays, numbers, strings and plain containers. A file that
      asks for anything else is refused: a pickle can run any code.
    * A file that is missing, cut off or refused gets one line that says which and how to go on.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Save to ``<save_dir>/<name>.pth``, atomically, and make it the last checkpoint.

        Args:
            name: file name without suffix.
            kwargs: further data to save.
        """
        # Detectron2 writes the file, then calls ``tag_last_checkpoint``, which names it rightly.
        super().save(name + _PARTIAL, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write ``last_checkpoint``, atomically.

        Args:
            last_filename_basename: name of the checkpoint file in ``save_dir``.
        """
        basename = last_filename_basename.replace(f"{_PARTIAL}.pth", ".pth")
        if basename != last_filename_basename:
            written = os.path.join(self.save_dir, last_filename_basename)
            os.replace(written, os.path.join(self.save_dir, basename))
        tag_file = os.path.join(self.save_dir, "last_checkpoint")
        with open(tag_file + _PARTIAL, "w", encoding="utf-8") as f:
            f.write(basename)
        os.replace(tag_file + _PARTIAL, tag_file)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load from ``path``, as ``DetectionCheckpointer`` does.

        Args:
            path: file or address; "" for none, which leaves the model as it is.

        Raises:
            FileNotFoundError: when there is no such file, or it cannot be downloaded.
            ValueError: when the file is cut off, or holds more than a checkpoint's data.
        """
        if path:
            self._check_exists(path)
        return super().load(path, *args, **kwargs)

    def _check_exists(self, path: str) -> None:
        file = urlparse(path)._replace(query="").geturl()
        try:
            if os.path.isfile(self.path_manager.get_local_path(file)):
                return
            reason = "is missing"
        except OSError as error:  # also what a failed download raises
            reason = f"cannot be fetched ({error})"
        raise FileNotFoundError(
            f"Checkpoint {file} {reason}. Set MODEL.WEIGHTS to a file that exists ('' starts from "
            f"random weights); with --resume, {os.path.join(self.save_dir, 'last_checkpoint')} "
            "names the file: correct or remove it."
        )

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            # Read once with the safe unpickler before Detectron2 reads it with the plain one.
            if filename.endswith(".pkl"):
                with PathManager.open(filename, "rb") as f:
                    _NumpyUnpickler(f, encoding="latin1").load()
            elif filename.endswith(".pyth"):
                self._torch_load(filename)
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
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"Checkpoint {filename} ({os.path.getsize(filename)} bytes) cannot be read: "
                f"{first_line} It is cut off, or not a checkpoint of plain tensors or arrays. "
                f"Remove it, and name a whole one in MODEL.WEIGHTS or, for --resume, in "
                f"{os.path.join(self.save_dir, 'last_checkpoint')}."
            ) from error

    def _torch_load(self, f: str) -> dict[str, Any]:
        return torch.load(f, map_location=torch.device("cpu"), weights_only=True)


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
