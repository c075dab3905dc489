"""Stands for imgaug: every name is there, and says when it is used that it is not."""


class Missing:
    def __init__(self, *args: object, **kwargs: object) -> None:
        raise ImportError("this augmentation needs the package imgaug, for which only a stand-in is installed")


def __getattr__(name: str) -> type[Missing]:
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing
