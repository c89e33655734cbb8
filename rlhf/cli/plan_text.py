"""The plan for people to read."""

from collections.abc import Iterator, Mapping

from rlhf.planning.devices import Device
from rlhf.planning.memory import GIB, MIB
from rlhf.planning.plan import Given, Plan, RoleMemory

TITLES: Mapping[str, str] = {
    "held": "held",
    "update": "in passes",
    "score": "in passes of its own",
    "step": "in the optimizer's step",
    "publish": "when published",
    "decode": "while decoding",
    "load": "when weights come",
    "away": "while others have the GPU",
}

WHOSE = {"train": "trained on by", "sample": "sampled on by"}


def in_words(given: Given, plan: Plan) -> str:
    """All of it: placement, batches, memory, time, assumptions, problems."""
    parts = [_model(given), _placement(plan), _batches(given, plan), _memory(plan), _time(given, plan), _verdict(plan)]
    return "\n\n".join(parts)


def _model(given: Given) -> str:
    shape, lengths = given.models.policy, given.lengths
    return (
        f"model      {given.config.model.name}: {shape.family}, {shape.parameters:,} parameters\n"
        f"lengths    prompts of {lengths.prompt} tokens, completions of {lengths.mean} on average, the longest "
        f"{lengths.longest} (assumed)"
    )


def _placement(plan: Plan) -> str:
    lines = ["placement"]
    for placed in plan.placement:
        count = f"{placed.replicas}" if placed.needed == placed.replicas else f"{placed.needed} to {placed.replicas}"
        takes = ", ".join(f"{name} {amount:g}" for name, amount in placed.takes.items()) or "nothing"
        together = f", placed together ({placed.together})" if placed.together and placed.replicas > 1 else ""
        together += f", on the GPUs of {', '.join(placed.shares_with)}" if placed.shares_with else ""
        threads = f"{placed.threads} threads"
        if placed.processes > 1:
            threads = f"{placed.processes} processes of {threads}, on one node"
        lines.append(f"  {placed.role:<10} {count} x ({takes}), {threads}{together}")
    lines.append("  together   " + ", ".join(f"{name} {amount:g}" for name, amount in plan.demand.items()))
    return "\n".join(lines)


def _batches(given: Given, plan: Plan) -> str:
    b, budget = plan.batches, given.config.learner.tokens_per_microbatch
    taken = f"{b.prompts_per_step} prompts"
    if b.rows_of_data_per_step:
        taken += f" + {b.rows_of_data_per_step} rows of data"
    if b.samples_per_step:
        taken += f" x {b.samples_per_prompt} samples = {b.samples_per_step} samples"
    lines = {
        "a step": f"{taken}; trained on: {b.sequences_per_step} sequences in {b.units_per_step} units",
        "optimizer steps": f"{b.minibatches} minibatches x {b.epochs} epochs: {b.optimizer_steps_per_step} a step, "
        f"{b.optimizer_steps:,} in {b.steps:,} steps",
        "global batch": f"{b.sequences_per_optimizer_step} sequences an optimizer step, on {b.ranks} ranks at most "
        f"{b.sequences_per_rank} each",
        "accumulation": f"{b.microbatches_per_optimizer_step} micro-batches of at most {budget} tokens (the largest: "
        f"{b.largest_microbatch_tokens}); {b.microbatches_per_step} passes a step and rank",
        "data": f"{b.prompts_in_data:,} prompts: {b.steps_per_epoch:.1f} steps an epoch; the run takes "
        f"{b.prompts_used:,}, {b.epochs_of_data:.2f} epochs",
    }
    return "\n".join(["batches", *(f"  {name:<17} {text}" for name, text in lines.items())])


def _memory(plan: Plan) -> str:
    lines = ["memory, of each actor"]
    for role in plan.memory:
        lines += _role_memory(role)
    for turn in plan.turns:
        whose = f"{WHOSE[turn.turn]} {', '.join(turn.roles)}"
        lines.append(f"  in turn    {_size(turn.device_peak)} of a GPU while it is {whose}")
    versions = "the version in use and the next" if plan.object_store > plan.published else "one version"
    lines.append(f"  object store {_size(plan.object_store)}: published weights of {_size(plan.published)}, {versions}")
    return "\n".join(lines)


def _role_memory(role: RoleMemory) -> Iterator[str]:
    peaks = f"{_size(role.host_peak)}"
    if role.device_peak:
        where = "the GPU" if role.processes == 1 else f"each of its {role.processes} GPUs"
        peaks = f"{_size(role.device_peak)} on {where}, {_size(role.host_peak)} in the host's memory"
    yield f"  {role.role:<10} {peaks} ({role.replicas} x, {role.device})"
    phases: dict[str, list[str]] = {}
    for part in role.parts:
        if part.size:
            phases.setdefault(part.phase, []).append(f"{part.name} {_size(part.size)}")
    for phase, parts in phases.items():
        yield f"    {TITLES[phase]}: {', '.join(parts)}"


def _time(given: Given, plan: Plan) -> str:
    time, decoding = plan.time, plan.time.decoding
    lines = ["time of a step"]
    if decoding is not None:
        lines.append(
            f"  generate   {_seconds(time.generate_s)}: prompts {_seconds(decoding.prefill_s)}, decoding "
            f"{_seconds(decoding.body_s)} (bound by {decoding.bound}; {decoding.sequences_at_once} sequences at once), "
            f"tail {_seconds(decoding.tail_s)}"
        )
    lines += [
        f"  judge      {_seconds(time.judge_s)}{_unknown(given)}",
        f"  annotate   {_seconds(time.annotate_s)}",
        f"  update     {_seconds(time.update_s)}: {plan.update_flops / 1e12:,.1f} TFLOP",
        f"  sync       {_seconds(time.sync_s)}: {_size(plan.published)}",
        f"  step       {_seconds(time.step_s)}; the run {_seconds(time.run_s)}",
        f"  bound by   {time.bound}",
        "assumed",
    ]
    devices: dict[str, tuple[Device, list[str]]] = {}
    for placed in plan.placement:
        if placed.role in ("trainer", "critic", "rollout", "reference"):
            device = given.device_of(placed.settings)
            devices.setdefault(device.name, (device, []))[1].append(placed.role)
    lines += [_device(device, roles, given) for device, roles in devices.values()]
    return "\n".join(lines)


def _device(device: Device, roles: list[str], given: Given) -> str:
    dtype = given.config.learner.dtype
    peak = device.flops[dtype] / 1e12
    return (
        f"  {device.name} ({', '.join(roles)}; {device.source}): {peak:,.3g} TFLOP/s in {dtype}, of which training "
        f"reaches {device.training:.0%}, other passes {device.forward:.0%}, decoding {device.decode_flops:.0%}; "
        f"{device.bytes_per_s / 1e9:,.0f} GB/s, of which decoding reaches {device.decode:.0%}"
    )


def _unknown(given: Given) -> str:
    reward = given.config.reward
    kinds = {source.kind for source in reward.sources().values()} if reward is not None else set()
    asked = sorted(kind for kind in kinds if kind in ("function", "server", "llm"))
    return f" (the time of reward {' and '.join(asked)} is not known)" if asked else ""


def _verdict(plan: Plan) -> str:
    if not plan.problems:
        return "fits: nothing speaks against it"
    return "\n".join(["does not fit", *(f"  {problem}" for problem in plan.problems)])


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def _seconds(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2g} s"
