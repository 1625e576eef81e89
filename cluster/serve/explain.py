"""Why a request went where it went, from its record as `GET /caravan/requests/{id}` gives it. Pure."""

from typing import Any

_TERMS = {
    "missing_s": ("missing_tokens", "tokens to compute"),
    "pending_s": ("pending_prefill_tokens", "tokens waiting before it"),
    "decode_s": ("decode_context_tokens", "tokens of running context"),
}


def why(attempt: dict[str, Any]) -> str:
    """The reason for an attempt's replica, in one line: against the next best, the term of the cost that decided."""
    scores, chosen = attempt["scores"], attempt["replica"]
    if not scores:
        return "the router was not asked"
    if chosen is None:
        return "no replica took it"
    place = next((place for place, score in enumerate(scores) if score["replica"] == chosen), None)
    if place is None:
        return "the router did not know it yet"
    if place > 0:
        return f"{scores[0]['replica']} came first and did not take it"
    if len(scores) == 1:
        return "the only one there was"
    return _against(scores[0], scores[1])


def _against(best: dict[str, Any], other: dict[str, Any]) -> str:
    name, saved = other["replica"], other["cost_s"] - best["cost_s"]
    if other["draining"] and not best["draining"]:
        return "the only one that is not draining" if saved < 0 else f"{name}, the next, is draining"
    if saved < 0:
        return f"{name}, the next, costs less and had failed it before"
    if saved == 0:
        if best["active_requests"] < other["active_requests"]:
            return f"costs as much as {name}, with {best['active_requests']} requests to its {other['active_requests']}"
        return f"costs as much as {name}; the hash of the first missing block decides"
    gains = {term: other[term] - best[term] for term in (*_TERMS, "shortage_s")}
    gain, loss = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
    text = f"{_seconds(saved)} cheaper than {name}: {_reason(gain, best, other)}"
    return f"{text}, though {_reason(loss, other, best, more=True)}" if gains[loss] < 0 else text


def _reason(term: str, less: dict[str, Any], more_: dict[str, Any], *, more: bool = False) -> str:
    """What one of two replicas has less of in a term, or the other `more` of."""
    if term == "shortage_s":
        return "fewer free blocks" if more else "more free blocks"
    tokens, what = _TERMS[term]
    difference = more_[tokens] - less[tokens]
    if difference <= 0:  # of as many tokens, on a machine of another speed
        return "it is slower" if more else "it is faster"
    return f"{difference:,} {'more' if more else 'fewer'} {what}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
