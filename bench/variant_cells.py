"""The cells of bench/variants.py: a student of bench/compare.py's trainings, on a dial that is chosen in one of three ways."""
from itertools import product

from compare_flux import dialling as dialling_on_flux, judge, scored, trained, world
from plane_cells import COUPLED, dialling, ends, finite, goal_of, measured, references, ruler, settings, student
from scfm.dial import choose
from scfm.lora import load_adapter_state
from scfm.metrics import endpoint_distance

JUDGED = (2, 3, 4, 8)
SCALES = (0., .25, .5, .75, 1., 1.25, 1.5, 2., 2.5, 3.)      # beyond the ends of bench/compare.py's: weak students want more


def switching(first, rest):
    """The field `first` at t = 1, where every walk begins, and `rest` elsewhere."""
    return lambda x, t, *cond: (first if t[0] == 1 else rest)(x, t, *cond)


def chosen(rule, distance, scales):
    """{steps: (scale of the first step, scale of the others)} with small distances. distance(steps, pair); rule: `dial`, `free` or `two scales`."""
    if rule == "dial":                                       # one scale a step count, never rising
        found = choose({(n, s): distance(n, (s, s)) for n in JUDGED for s in scales})
        return {n: (s, s) for n, s in zip(found.steps, found.scales)}
    pairs = list(product(scales, repeat=2)) if rule == "two scales" else [(s, s) for s in scales]
    return {n: min(pairs, key=lambda pair: distance(n, pair)) for n in JUDGED}


def asked(protocol, job):
    """(the job without what only the dial needs, the rule of the dial, the network that is read out)."""
    change = {name: value for name, value in job.change.items() if name != "dial"}
    return job._replace(change=change), job.change.get("dial", "dial"), settings(protocol, change)[2]["read_out"]


def told(pairs):
    """What the record keeps of the chosen scales, and whether one is the largest that was tried."""
    return {"scales": pairs, "at_the_end": any(max(SCALES) in pair for pair in pairs.values())}


def measure_on_plane(cache, protocol, job):
    """quality (SW2) and endpoints (distance to the teacher's), by step count; scales: the pairs that were chosen."""
    job, rule, read_out = asked(protocol, job)
    (speakers, spec), goal = student(cache, protocol, job), goal_of(cache, protocol, job)

    def make():
        (noise, far), measure = dialling(protocol, job, speakers), ruler(protocol, job)
        field = lambda pair: switching(*(speakers.field(read_out, scale) for scale in pair))
        pairs = chosen(rule, lambda n, pair: finite(endpoint_distance(ends(field(pair), noise, n), far)), SCALES)
        mine = references(protocol, job)[1][:COUPLED]        # no dial was chosen on these
        return {"quality": {n: finite(measure(field(pair), n)[0]) for n, pair in pairs.items()},
                "endpoints": {n: finite(endpoint_distance(ends(field(pair), mine, n), goal)) for n, pair in pairs.items()}, **told(pairs)}
    more = measured(protocol, scales=SCALES, noises=protocol.dial_noises, goal=protocol.goal_steps, coupled=COUPLED)
    return cache("variant", {"of": spec, "rule": rule, "read_out": read_out, "steps": JUDGED, **more}, make)


def measure_on_flux(cache, protocol, job):
    """The same on the tiny Flux, where quality is a Frechet distance (not FID); and the accuracy in reading what captions name."""
    job, rule, read_out = asked(protocol, job)
    loras, spec = trained(cache, protocol, job)

    def make():
        place, scorer = world(protocol.drawings), judge(protocol.judged)
        speakers = place.speakers(job.seed)
        load_adapter_state(speakers.transformer, "slow", loras[read_out])
        speakers.transformer.set_adapter("student")
        field = lambda pair: switching(*(speakers.field("slow", scale) for scale in pair))
        walk, far = dialling_on_flux(place, protocol.dial_noises, speakers.teacher)
        pairs = chosen(rule, lambda n, pair: finite(endpoint_distance(walk(field(pair), n), far)), SCALES)
        found = scored(scorer, lambda n: field(pairs[n]), steps=JUDGED)
        return {"quality": found[""], "accuracy": found[" accuracy"], "endpoints": found[" coupling"], **told(pairs)}
    return cache("flux_variant", {"of": spec, "rule": rule, "read_out": read_out, "steps": JUDGED, "scales": SCALES, "judged": protocol.judged,
                                  "noises": protocol.dial_noises}, make)
