"""Compare a generated solution with the solution in MATH. lm-evaluation-harness calls this function."""

from collections.abc import Mapping, Sequence

from fedelta.learning.tasks.answers import ANSWERS


def exact_match(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    r"""Score 1 if the generated answer, in \boxed{…} or after "answer is", is the one in the solution, else 0."""
    read = ANSWERS["boxed"]
    answer = read(results[0])
    return {"exact_match": float(answer is not None and answer == read(doc["solution"]))}
