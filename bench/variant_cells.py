"""The cells of bench/variants.py: a student of bench/compare.py's trainings, at strengths that are chosen in one of four ways."""
from functools import partial

from compare_flux import dialling as dialling_on_flux, judge, scored, trained, world
from plane_cells import COUPLED, dialling, ends, finite, goal_of, measured, references, ruler, settings, student
from scfm.method.lora_scale import choose_lora_scales
from scfm.method.flow import time_grid
from scfm.models.lora import load_adapter_state
from scfm.method.metrics import endpoint_distance
from scfm.method.scale_schedule import search_per_step, per_step_field
from toy.judge import STOCK

JUDGED = (2, 3, 4, 8)
SCALES = (0., .25, .5, .75, 1., 1.25, 1.5, 2., 2.5, 3.)      # beyond the ends of bench/compare.py's: weak students want more


ROUNDS = {"smooth": 0, "each step": 2}                       # of `search_per_step`, behind the dial


def chosen(rule, distance, scales):
    """{steps: a scale for each step} with small distances. distance(scales of the steps); rule: `dial`, `free` or one of ROUNDS."""
    curve = {(n, s): distance((s,) * n) for n in JUDGED for s in scales}
    if rule == "free":                                       # each step count alone
        return {n: (min(scales, key=lambda s: curve[n, s]),) * n for n in JUDGED}
    dial = choose_lora_scales(curve)                                     # never rising with the step counts
    if rule == "dial":
        return {n: (s,) * n for n, s in zip(dial.steps, dial.scales)}
    return {n: search_per_step(distance, n, s, rounds=ROUNDS[rule]).scales for n, s in zip(dial.steps, dial.scales)}


def asked(protocol, job):
    """(the job without what only the dial needs, the rule of the dial, the network that is read out)."""
    change = {name: value for name, value in job.change.items() if name != "dial"}
    return job._replace(change=change), job.change.get("dial", "dial"), settings(protocol, change)[2]["read_out"]


def told(found):
    """What the record keeps of the chosen scales, and whether one reaches the end of the dial's table."""
    return {"scales": found, "at_the_end": any(max(scales) >= max(SCALES) for scales in found.values())}


def measure_on_plane(cache, protocol, job):
    """quality (SW2) and endpoints (distance to the teacher's), by step count; scales: those that were chosen."""
    job, rule, read_out = asked(protocol, job)
    (models, spec), goal = student(cache, protocol, job), goal_of(cache, protocol, job)

    def make():
        (noise, far), measure = dialling(protocol, job, models), ruler(protocol, job)
        field = lambda scales: per_step_field(partial(models.field, read_out), time_grid(len(scales)), scales)
        found = chosen(rule, lambda scales: finite(endpoint_distance(ends(field(scales), noise, len(scales)), far)), SCALES)
        mine = references(protocol, job)[1][:COUPLED]        # no scale was chosen on these
        return {"quality": {n: finite(measure(field(scales), n)[0]) for n, scales in found.items()},
                "endpoints": {n: finite(endpoint_distance(ends(field(scales), mine, n), goal)) for n, scales in found.items()}, **told(found)}
    more = measured(protocol, scales=SCALES, noises=protocol.dial_noises, goal=protocol.goal_steps, coupled=COUPLED)
    return cache("variant", {"of": spec, "rule": rule, "read_out": read_out, "steps": JUDGED, **more}, make)


def measure_on_flux(cache, protocol, job):
    """The same on the tiny Flux, where quality is a Frechet distance (not FID); and the accuracy in reading what captions name."""
    job, rule, read_out = asked(protocol, job)
    loras, spec = trained(cache, protocol, job)

    def make():
        place, scorer = world(protocol.drawings), judge(protocol.judged)
        models = place.models(job.seed)
        load_adapter_state(models.transformer, "ema_slow", loras[read_out])
        models.transformer.set_adapter("student")
        field = lambda scales: per_step_field(partial(models.field, "ema_slow"), time_grid(len(scales), STOCK), scales)
        walk, far = dialling_on_flux(place, protocol.dial_noises, models.teacher)
        found = chosen(rule, lambda scales: finite(endpoint_distance(walk(field(scales), len(scales)), far)), SCALES)
        scores = scored(scorer, lambda n: field(found[n]), steps=JUDGED)
        return {"quality": scores[""], "accuracy": scores[" accuracy"], "endpoints": scores[" coupling"], **told(found)}
    return cache("flux_variant", {"of": spec, "rule": rule, "read_out": read_out, "steps": JUDGED, "scales": SCALES, "judged": protocol.judged,
                                  "noises": protocol.dial_noises}, make)
