"""Install d2proposals: ``pip install -e .`` beside your own torch, torchvision and Detectron2."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="d2proposals",
    version="0.1.0",
    description="Region proposal generators for Detectron2, after their papers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["d2proposals", "d2proposals.*"]), "d2proposals.configs"],
    # The configurations travel inside the package, where d2proposals.model_zoo finds them.
    package_dir={"d2proposals.configs": "configs"},
    package_data={
        "d2proposals": ["weights/*/*.pth"],
        "d2proposals.configs": ["*.yaml", "*/*.yaml", "lazy/*.py", "lazy/*/*.py"],
        "d2proposals.pictures": ["*.html", "*.css", "*.js"],
    },
    python_requires=">=3.10",
    # torch, torchvision and Detectron2 are chosen by whoever installs them: builds differ by CUDA
    # version, and Detectron2 is not on PyPI.
    install_requires=[
        "fvcore>=0.1.5",
        "matplotlib",
        "numpy",
        "opencv-python-headless",
        "pillow",
        "pycocotools>=2.0.6",
        "scikit-image",
        "scipy",
        "tabulate",
    ],
    extras_require={
        # Feature boosting of ZIP's detector (tools/boost_detector.py). AdaBoostClassifier of older
        # versions is SAMME.R by default.
        "boosting": ["scikit-learn>=1.6"],
        # ONNX files (tools/export_model.py). Older versions of onnxruntime have no DeformConv.
        "export": ["onnx", "onnxruntime>=1.25"],
        "dev": [
            "hypothesis",
            "onnx",
            "onnxruntime>=1.25",
            "oxlint",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-learn>=1.6",
            "selenium",
        ],
    },
)
