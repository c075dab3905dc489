from imgaug import __getattr__  # noqa: F401
