"""A plan as text."""

from fm_distill.planning.plan import Plan


def _amount(value: float) -> str:
    """Three digits and a prefix, for a unit to follow."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


def text(found: Plan, max_hours: float, weekly_hours: float) -> str:
    """What `fm-distill plan` prints."""
    memory, flops = found.memory_bytes, found.flops
    lines = [
        f"{found.topology}: {found.devices} devices, {found.feeding} feeding, "
        f"{found.steps_per_dispatch} steps a dispatch"
    ]
    if not found.compiles:
        lines.append(f"DOES NOT COMPILE: {found.compiler_said}")
    else:
        assert memory.arguments is not None and memory.temporaries is not None
        have = f" of {_amount(memory.capacity)}B" if memory.capacity else ""
        need = memory.arguments + memory.temporaries + memory.resident_data
        lines += [
            f"memory a device: {_amount(need)}B{have}: arguments {_amount(memory.arguments)}B, "
            f"temporaries {_amount(memory.temporaries)}B, data {_amount(memory.resident_data)}B",
            "fits" if found.fits else "DOES NOT FIT",
            f"{_amount(flops['total'])}FLOP a step: "
            + ", ".join(f"{k} {flops[k] / flops['total']:.1%}" for k in list(flops)[1:]),
            f"{_amount(found.hbm_bytes or 0)}B of HBM moved a step, each device",
            "a step has "
            + (", ".join(f"{v:g} {k}" for k, v in sorted(found.collectives.items())) or "no")
            + ("" if found.collectives else " collectives")
            + f" and {found.host_transfers} host transfers",
        ]
    seconds = found.step_seconds
    if seconds.expected and seconds.lower_bound and found.hours is not None:
        lines += [
            f"a step takes at least {1e3 * seconds.lower_bound:.1f} ms, expected "
            f"{1e3 * seconds.expected:.1f} ms: {found.images_per_second:,.0f} images a second, "
            f"{found.epochs_per_hour:,.1f} epochs an hour",
            f"{found.total_steps:,} steps: {found.hours:,.1f} hours, {found.sessions:,} sessions "
            f"of {max_hours:g} hours, {found.weeks:,.1f} weeks of {weekly_hours:g} hours",
        ]
    lines += [*found.notes, found.disk]
    if found.fits_with:
        options = " ".join(f"--{name} {value}" for name, value in found.fits_with.items())
        lines.append(f"it fits with {options}")
    elif not found.fits:
        lines.append("none of the variants that were tried fits; see --memory.* and --batch-size")
    return "\n".join(lines)
