"""What a test does whose extra is not installed."""

import os


def why_missing(extra: str, error: ImportError) -> str:
    """The reason to skip what needs an extra that is not installed.

    Raises:
      ImportError: ``HIRE_REQUIRE_EXTRAS=1`` says that everything has to be there.
    """
    if os.environ.get("HIRE_REQUIRE_EXTRAS", "0") == "1":
        raise error
    return f"needs pip install 'hire-xform[{extra}]': {error}"
