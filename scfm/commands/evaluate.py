"""`scfm evaluate`: the student, its teacher and their rivals by one protocol."""
import argparse
from pathlib import Path

from scfm.commands import add_options
from scfm.commands.dial import captions_of_run
from scfm.data.prompts import read_prompts
from scfm.evaluation.evaluate import EvaluateConfig, evaluate
from scfm.evaluation.report import text_table, write_report
from scfm.evaluation.samplers import read_peer


def main(argv):
    """`scfm evaluate`: a flag for every field of EvaluateConfig, and the peers."""
    parser = argparse.ArgumentParser(
        prog="scfm evaluate", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Paints the same captions from the same noises with the teacher at its steps, and with the student and its "
                    "rivals at each step count; measures endpoint distance, FID, CLIP score and latency; writes a report "
                    "that opens from disk. Run it again to resume, or to add step counts, peers and weights.")
    add_options(parser, EvaluateConfig)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH,...", help="another step LoRA for the same base or "
                        "another pipeline, with its scale=, steps= (as 4+8), guidance=, shift=; may be given several times")
    args = vars(parser.parse_args(argv))
    peers = [read_peer(text) for text in args.pop("peer")]
    twice = sorted({p.name for p in peers if [q.name for q in peers].count(p.name) > 1})
    if twice:
        raise ValueError(f"two peers are called {', '.join(twice)}: give each its own name")
    config = EvaluateConfig(**args)
    config.check()
    captions = read_prompts(config.prompts) if config.prompts else captions_of_run(config.lora)
    captions = (captions * -(-config.count // len(captions)))[:config.count]
    record = evaluate(config, captions, peers)
    page = write_report(record, config.out, captions)
    print("\n" + text_table(record) + "\n")
    for name, why in record["missing"].items():
        print(f"missing: {name}: {why}")
    for text in record["warnings"]:
        print(f"note: {text}")
    print(f"{page}, with grid.png and report.json in {Path(config.out)}")
    return 0
