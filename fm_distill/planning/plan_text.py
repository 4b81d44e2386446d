"""A plan as text."""

from fm_distill.planning.plan import Plan
from fm_distill.planning.recording_plan import RecordingPlan


def _amount(value: float) -> str:
    """Three digits and a prefix, for a unit to follow."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


def _recording(found: RecordingPlan) -> str:
    command = " ".join(["fm-distill record", *(["--taps", *found.taps] if found.taps else [])])
    size = f"with `{command}` the teacher runs once: {_amount(found.bytes)}B"
    if found.hours is None or found.student_hours is None:
        return size
    return f"{size}, {found.hours:,.1f} hours, then {found.student_hours:,.1f} for each student"


def text(plan: Plan, max_hours: float, weekly_hours: float) -> str:
    """What `fm-distill plan` prints."""
    memory, flops = plan.memory_bytes, plan.flops
    lines = [
        f"{plan.topology}: {plan.devices} devices, {plan.feeding} feeding, "
        f"{plan.steps_per_dispatch} steps per dispatch"
    ]
    if not plan.compiles:
        lines.append(f"DOES NOT COMPILE: {plan.compiler_said}")
    else:
        assert memory.arguments is not None and memory.temporaries is not None
        limit = f" of {_amount(memory.capacity)}B" if memory.capacity else ""
        total = memory.arguments + memory.temporaries + memory.resident_data
        lines += [
            f"memory per device: {_amount(total)}B{limit}: arguments {_amount(memory.arguments)}B, "
            f"temporaries {_amount(memory.temporaries)}B, data {_amount(memory.resident_data)}B",
            "fits" if plan.fits else "DOES NOT FIT",
            f"{_amount(flops['total'])}FLOP per step: "
            + ", ".join(f"{part} {flops[part] / flops['total']:.1%}" for part in list(flops)[1:]),
            f"{_amount(plan.hbm_bytes or 0)}B of HBM moved per step and device",
            "a step has "
            + (
                ", ".join(f"{count:g} {name}" for name, count in sorted(plan.collectives.items()))
                or "no"
            )
            + ("" if plan.collectives else " collectives")
            + f" and {plan.host_transfers} host transfers",
        ]
    seconds = plan.step_seconds
    if seconds.expected and seconds.lower_bound and plan.hours is not None:
        lines += [
            f"a step takes at least {1e3 * seconds.lower_bound:.1f} ms, expected "
            f"{1e3 * seconds.expected:.1f} ms: {plan.images_per_second:,.0f} images a second, "
            f"{plan.epochs_per_hour:,.1f} epochs per hour",
            f"{plan.total_steps:,} steps: {plan.hours:,.1f} hours, {plan.sessions:,} sessions "
            f"of {max_hours:g} hours, {plan.weeks:,.1f} weeks of {weekly_hours:g} hours",
        ]
    if plan.recording:
        lines.append(_recording(plan.recording))
    lines += [*plan.notes, plan.disk]
    if plan.fits_with:
        options = " ".join(f"--{name} {value}" for name, value in plan.fits_with.items())
        lines.append(f"it fits with {options}")
    elif not plan.fits:
        lines.append("none of the variants that were tried fits; see --memory.* and --batch-size")
    return "\n".join(lines)


def movers_text(plan: Plan) -> str:
    """A table of what moves the most memory, for `--by-operation`."""
    if not plan.movers:
        return "which operations move the most memory is known only for a program that compiles"
    lines = ["what moves the most memory in a step on one device, by line of code:"]
    for mover in plan.movers:
        size, times = f"{_amount(mover.bytes)}B", f"{mover.count:,.0f}x"
        description = f"{mover.part or '-':<20} {mover.operation:<24} {times:>6}"
        lines.append(f"  {size:>9} {mover.share:6.1%}  {description}  {mover.place or '-'}")
    return "\n".join(lines)
