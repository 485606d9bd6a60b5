"""Make up records of compiled programs."""

from experiments.compiled.cases import NONE, Case

X = 4 * 8 * 128 * 2  # bytes of bf16[4,8,128]


def made_up(case: Case, **changes):
    """Return a record that meets every bar."""
    record = {
        "case": case._asdict(),
        "sources": "now",
        "versions": {"jax": "0.12.0.1"},
        "array_bytes": float(X),
        "moved_bytes": (7 if case.ours else 10) * X,
        "moved_bytes_rare": None,
        "temporary_bytes": X,
        "collectives": {} if case.contender == NONE else {"all-reduce": {"number": 2, "bytes": 2560, "largest": 1536}},
        "seconds": 1.0,
    }
    return record | changes
