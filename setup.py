"""recipes/ and scripts/ stay at the top of the repository; in a wheel they lie inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mllm_vision*"]), "mllm_vision.recipes", "mllm_vision.scripts"],
    package_dir={"mllm_vision.recipes": "recipes", "mllm_vision.scripts": "scripts"},
)
