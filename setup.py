"""Packaging of robust_tf. The lower bounds are the versions that the tests have been run with."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "robust_tf" / "__init__.py").read_text(encoding="utf-8"))[1]

SERVE = ["uvicorn>=0.30", "starlette>=0.40", "orjson>=3.10.7", "httpx>=0.27", "grpcio-health-checking>=1.60"]
# For --format=onnx. tf2onnx 1.17 is the first release since 2024; earlier ones need an older protobuf than TensorFlow.
ONNX = ["tf2onnx>=1.17", "onnxruntime>=1.32"]
LITERT = ["ai-edge-litert>=2.3"]  # the runtime; TensorFlow has the converter
TEST = ["pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.17", "mypy>=2.0", "build>=1.2", "pdoc>=15.0"]
TEST += ["hypothesis>=6.100", "pyyaml>=6.0", "kubernetes-validate>=1.30", "selenium>=4.20"]  # for serving/

setup(
    name="robust_tf",
    version=VERSION,
    description="Adversarially robust image classifiers that transfer: PGD training, transfer and serving in Keras 3.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["robust_tf", "robust_tf.*"]),
    package_data={"robust_tf": ["models/weights/*", "serving/server/*.html", "py.typed"]},
    install_requires=[
        "tensorflow>=2.21",
        "keras>=3.15",
        "tensorflow-datasets>=4.9.10",
        "etils[epath]>=1.9",  # paths that may be gs://; tensorflow-datasets needs it too
        "importlib_resources>=6.0",  # tensorflow-datasets 4.9.10 imports it without declaring it
        "keras-cv>=0.9.0",
        "absl-py>=2.1",
        "tensorboard>=2.20",
        "numpy>=2.1",
        "ml_dtypes>=0.5.1",  # bfloat16 in NumPy, for checkpoints; tensorflow needs it too
        "scikit-learn>=1.5.2",
        "threadpoolctl>=3.1",  # scikit-learn needs it too
        "scipy>=1.13",
        "pillow>=10.1",
        "matplotlib>=3.9.2",
        "pycocotools>=2.0.11",  # the average precision of detectors
        "rich>=13.7",
        "huggingface_hub>=1.0",
        "grpcio>=1.60",
        "tensorflow-serving-api>=2.19",  # the protos of warm-up requests, which every export holds
    ],
    extras_require={
        "serve": SERVE,
        "onnx": ONNX,
        "litert": LITERT,
        "test": TEST + SERVE + ONNX + LITERT,
        "and-cuda": ["tensorflow[and-cuda]>=2.21"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
