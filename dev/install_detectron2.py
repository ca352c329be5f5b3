#!/usr/bin/env python3
"""Bring Detectron2 into this Python environment, unless it is already there.

Detectron2 is not on PyPI. Its official installation builds it from source with a compiler:
https://detectron2.readthedocs.io/en/latest/tutorials/install.html. Whoever has done that keeps
what they have: this script then changes nothing.

Everybody else gets the uncompiled Detectron2 0.6 (Apache-2.0) that the PyPI wheel of LabGym 3.1.2
carries as ``LabGym/detectron2``: it is taken out of the wheel, its imports are changed back from
``LabGym.detectron2`` to ``detectron2``, and it is installed as a wheel of its own. It lacks the
compiled operators (rotated boxes, Detectron2's own deformable convolution, the fast COCO
evaluation), of which d2proposals uses none.

Usage: python dev/install_detectron2.py
"""

import base64
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

GUIDE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
REQUIREMENT = "labgym==3.1.2"
SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
PREFIX = "LabGym/detectron2/"
VERSION = "0.6"


def run_pip(*arguments: str) -> None:
    """Run pip of this environment; end with one line if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(
            f"install_detectron2: 'pip {' '.join(arguments[:2])} ...' failed (see above). "
            f"Check the connection to PyPI, or install Detectron2 yourself: {GUIDE}"
        )


def download_wheel(folder: Path) -> Path:
    """Download the wheel that carries Detectron2 into ``folder`` and check its digest."""
    # Its metadata asks for Python < 3.11, which does not concern the part taken from it.
    only_wheel = ("--no-deps", "--only-binary=:all:", "--python-version", "3.10")
    run_pip("download", REQUIREMENT, *only_wheel, "-d", str(folder))
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"install_detectron2: {wheel.name} has sha256 {digest}, expected {SHA256}.")
    return wheel


def repack(source: Path, folder: Path) -> Path:
    """Write the Detectron2 inside the wheel ``source`` as a wheel of its own into ``folder``."""
    info = f"detectron2-{VERSION}.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: detectron2\nVersion: {VERSION}\nLicense: Apache-2.0\n"
        ).encode(),
        f"{info}/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: d2proposals\nRoot-Is-Purelib: true\n"
            b"Tag: py3-none-any\n"
        ),
    }
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            if name.startswith(PREFIX) and not name.endswith("/"):
                data = archive.read(name).replace(b"LabGym.detectron2", b"detectron2")
                files["detectron2/" + name.removeprefix(PREFIX)] = data

    def record(name: str, data: bytes) -> str:
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        return f"{name},sha256={digest},{len(data)}\n"

    rows = "".join(record(name, data) for name, data in files.items())
    files[f"{info}/RECORD"] = (rows + f"{info}/RECORD,,\n").encode()
    target = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target


def main() -> None:
    found = importlib.util.find_spec("detectron2")
    if found is not None:
        print(f"Detectron2: keeping the one at {Path(found.origin).parent}.")
        return
    print("Detectron2: not installed; taking the uncompiled 0.6 that PyPI carries inside LabGym.")
    with tempfile.TemporaryDirectory() as scratch:
        downloaded, repacked = Path(scratch, "downloaded"), Path(scratch, "repacked")
        downloaded.mkdir()
        repacked.mkdir()
        wheel = repack(download_wheel(downloaded), repacked)
        run_pip("install", "--no-deps", str(wheel))
    print(f"Detectron2: installed {VERSION}, uncompiled. The official, compiled one: {GUIDE}")


if __name__ == "__main__":
    main()
