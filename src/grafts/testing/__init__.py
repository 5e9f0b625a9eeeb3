"""Checks that every method has to stand: `check_method` runs a method through all that its record claims.

For authors of methods, in this package or in another one::

    from grafts.testing import check_method

    def test_vera() -> None:
        print(check_method("vera"))
"""

from grafts.testing.matrix import MethodReport, check_method

__all__ = ["MethodReport", "check_method"]
