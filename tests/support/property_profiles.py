"""How many examples hypothesis draws: `pytest --hypothesis-profile=` test, which is the default, sanitize or long."""

from hypothesis import HealthCheck, settings

# The machine's speed is no property of the code, and `isa` and the guards are set up once for all examples of a test.
COMMON = {"deadline": None, "print_blob": True, "database": None}
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

# The same examples everywhere and always: a verdict is the code's alone.
settings.register_profile("test", max_examples=100, derandomize=True, suppress_health_check=SUPPRESSED, **COMMON)
# The same under a sanitizer, tests/cpu/sanitized.py, where an example takes longer.
settings.register_profile("sanitize", max_examples=50, derandomize=True, suppress_health_check=SUPPRESSED, **COMMON)
# Others in every run, whose seed is printed.
settings.register_profile("long", max_examples=2000, suppress_health_check=SUPPRESSED, **COMMON)
settings.load_profile("test")
