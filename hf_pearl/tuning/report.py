"""A `Tuning` in words."""

from __future__ import annotations

from .tuning import ENGINE, PLAIN, Tuning, Way

WORTH = 1.1  # an ideal speed-up below this is lost to what is not ideal
HEADINGS = ("tokens/s", "speed-up", "slowest to fastest run", "tokens per forward")


def report(tuning: Tuning) -> str:
    """What was found, what to expect, and what to pass to `generate`."""
    parts = [_measured(tuning), _table(tuning), _advice(tuning), f"    {tuning.best.call}", _why(tuning), _same(tuning)]
    return "\n\n".join(parts)


def _measured(tuning: Tuning) -> str:
    mode = f"temperature {tuning.temperature:g}" if tuning.temperature else "greedy"
    prompts = f"{tuning.num_prompts} prompt{'s' if tuning.num_prompts > 1 else ''}"
    return f"Measured on {prompts}, {tuning.batch_size} per call, up to {tuning.max_new_tokens} new tokens, {mode}."


def _table(tuning: Tuning) -> str:
    rows = [("", *HEADINGS, "settings"), *(_cells(tuning, way) for way in tuning.ways)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *figures, setting in rows:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:-1], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells, setting]).rstrip())
    return "\n".join(lines)


def _cells(tuning: Tuning, way: Way) -> tuple[str, ...]:
    if way.error is not None:
        return (way.name, *["-"] * len(HEADINGS), f"({way.error})")
    plain = tuning.way(PLAIN).tokens_per_second
    return (
        way.name,
        f"{way.tokens_per_second:.1f}",
        f"{tuning.speedup_of(way):.2f}",
        f"{min(way.rates) / plain:.2f} to {max(way.rates) / plain:.2f}",
        f"{way.mean_accepted_tokens:.2f}",
        way.call.removeprefix("target.generate(**inputs").removeprefix(", ").removesuffix(")"),
    )


def _advice(tuning: Tuning) -> str:
    """Whether to use PEARL, and what to expect of it."""
    best, speedup = tuning.best, tuning.speedup
    if tuning.best_with_draft.error is not None:
        return f"With the draft PEARL is not right here ({tuning.best_with_draft.error}). Leave it out:"
    if tuning.pays:
        return f"Use PEARL: expect {speedup:.2f} times the speed of `generate`."
    said = f"The draft does not pay: with it, PEARL has {speedup:.2f} times the speed of `generate`."
    if best.uses_draft:
        return (
            f"The draft does not pay. PEARL has {speedup:.2f} times the speed of `generate`, but by guesses that are "
            f"looked up in the text so far: the draft wrote {best.drafted:.0%} of the tokens. With any small draft:"
        )
    if best.name == ENGINE:
        return f"{said} Leave it out: our engine without a draft has {tuning.speedup_of(best):.2f} times its speed."
    return f"{said} No way is clearly faster than `generate`:"


def _why(tuning: Tuning) -> str:
    """The figures behind it; where the draft does not pay, what it lacks."""
    draft, target = 1e3 * tuning.draft_step_seconds, 1e3 * tuning.target_forward_seconds
    found = (
        f"The draft's likeliest guess is the target's token {tuning.acceptance_rate:.0%} of the time. A step of the "
        f"draft takes {draft:.2f} ms, a forward of the target {target:.2f} ms."
    )
    ideal = (
        f"If nothing but the models took time, PEARL would be {tuning.ideal_speedup:.2f} times as fast as the target "
        f"alone, one row at a time. The draft's guesses alone would allow {tuning.bound:.2f} if they took no time."
    )
    return "\n".join([found, ideal] if tuning.pays else [found, ideal, _lack(tuning)])


def _lack(tuning: Tuning) -> str:
    """Why a draft does not pay."""
    times = tuning.simulated
    drafting = times.plain / min(times.sequential, times.lockstep)  # Nothing is looked up in these.
    if drafting >= WORTH:
        return (
            f"By these times its guesses alone could give {drafting:.2f}. What is lost goes to everything else: models "
            "that share cores or memory slow each other down, and beside short forwards every hand-over counts."
        )
    # What it would give if it took no time, against what it would if it were always right.
    if tuning.bound < tuning.target_forward_seconds / tuning.draft_step_seconds:
        return (
            "Its guesses are too seldom right. Take a draft of the same family, trained or distilled on such text, and "
            "see that both models have one tokenizer."
        )
    share = tuning.draft_step_seconds / tuning.target_forward_seconds
    return f"It is too slow: a step takes {share:.0%} of a target forward. Take a smaller draft, or a larger target."


def _same(tuning: Tuning) -> str:
    """Whether every text was right."""
    reference = "our engine's without a draft" if tuning.temperature else "`generate`'s own"
    num_parted = tuning.num_first_differences
    if not num_parted:
        return f"All {tuning.num_texts} texts are {reference}."
    said = (
        f"{num_parted} of {tuning.num_texts} texts part from {reference}, {tuning.num_near_ties} of them where the "
        "target finds both tokens equally good (rounding)."
    )
    if num_parted > tuning.num_near_ties:
        said += " A difference that is not of rounding is a bug: please report it."
    return said
