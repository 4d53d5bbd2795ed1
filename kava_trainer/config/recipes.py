"""The recipes that come with KAVA: where they lie, and which of them a name stands for."""

from pathlib import Path

_PACKAGE, _NAME = Path(__file__).parents[1], "training_args"


def recipes_folder() -> Path:
    """The folder of the recipes: within the package where it was installed from a wheel, beside it in a checkout."""
    inside = _PACKAGE / _NAME
    return inside if inside.is_dir() else _PACKAGE.parent / _NAME


def recipe_names() -> list[str]:
    """The names of all recipes, such as `quickstart`, in the order of the alphabet."""
    return sorted(path.stem for path in recipes_folder().glob("*.json"))


def find_recipe(path: str | Path) -> Path | None:
    """The file of a recipe that is named in one of three ways, or None where nothing is named so.

    Args:
        path: `NAME`, `NAME.json` or `training_args/NAME.json`. Any other folder is the user's own, and a mistake in it
            must not start a recipe instead.
    """
    path = Path(path)
    name = path.name.removesuffix(".json")
    is_ours = path.parent in (Path(), Path(_NAME)) and name in recipe_names()
    return recipes_folder() / f"{name}.json" if is_ours else None


def accelerate_config(name: str) -> str:
    """The path of a configuration for `accelerate launch`, `ddp.yaml` or `fsdp2.yaml`, to be told to the user.

    It is written as in the README where KAVA runs from a checkout.
    """
    inside = recipes_folder() / "accelerate" / name
    return str(inside) if recipes_folder().parent == _PACKAGE else f"{_NAME}/accelerate/{name}"
