"""The packages of a wheel: all folders of `kava_trainer`, and the recipes, which lie beside it in a checkout.

All else is in setup.cfg.
"""

from setuptools import find_namespace_packages, setup

RECIPES = {
    "kava_trainer.training_args": "training_args",
    "kava_trainer.training_args.accelerate": "training_args/accelerate",
}

setup(
    packages=[*find_namespace_packages(include=["kava_trainer*"], exclude=["*__pycache__*"]), *RECIPES],
    package_dir=RECIPES,
)
