"""Tests that studies share tell what they compared when they fail."""

import pytest

pytest.register_assert_rewrite("every_study")
