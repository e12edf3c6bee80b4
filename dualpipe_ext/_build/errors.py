"""The one error that the build can end in."""


class BuildError(RuntimeError):
    """The native extension cannot be built or loaded; the text says why and what to do."""
