"""Run experiments of the papers, and show what came out.

    python -m experiments [NAME ...] [--scale toy|small|full] [--text FOLDER] [--model HF] [--plan]
    python -m experiments report [--into FOLDER]

Without a name: all, in order. Everything made is kept in build/paper: what was interrupted is continued. Records lie in
build/paper/records; `report` makes a page with figures of them, there or, with --into docs, the one that is published.
"""

import argparse
import hashlib
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import ROOT, commit, machine
from experiments import page, plan
from experiments.experiment import Experiment
from experiments.lab import Lab, Learner
from experiments.memories import Memory, folder
from experiments.records import NotARecord, Record, load, save
from experiments.scale import SCALES, Scale
from experiments.sizes import fitted, sizes_of
from experiments.table import NAMES, experiment
from experiments.texts import DOCSTRINGS, Texts, find_texts
from knnlm.errors import Conflict, ModelError

INTERRUPTED = 128 + 2  # exit code of a program that SIGINT ended
FOLDER = ROOT / "build" / "paper"


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["report"]:
        return page.main(given[1:], FOLDER)
    options = _parser().parse_args(given)
    names = list(dict.fromkeys(options.names)) or list(NAMES)
    experiments = [(name, experiment(name)) for name in names]
    scale = SCALES[options.scale]
    if options.model is not None:
        try:
            sizes = sizes_of(options.model)
        except ModelError as err:
            raise SystemExit(err.message) from err
        print(sizes.line)
        scale = fitted(scale, sizes)
    if options.plan:
        texts = plan.NOMINAL if options.text is None and scale.name == "full" else find_texts(options.text)
        print(plan.table(plan.steps(experiments, texts, scale), scale))
        return 0
    texts = find_texts(options.text)
    records = options.out / "records"
    text = "" if options.text is None else " --text docstrings" if texts.source == DOCSTRINGS else " --text FOLDER"
    try:
        run_all(experiments, scale, texts, options.out, records, model=options.model, said=text, again=options.again)
    except (ModelError, Conflict) as err:  # a model that --model names or the hub does not give; a run beside this one
        raise SystemExit(err.message) from err
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return INTERRUPTED
    try:
        page.write(records, options.out)
    except NotARecord as err:  # another experiment's record is damaged; those that ran have theirs
        raise SystemExit(str(err)) from err
    print(f"{options.out / 'paper.md'}: what came out, of {texts.source}")
    return 0


def run_all(
    experiments: Sequence[tuple[str, Experiment]], scale: Scale, texts: Texts, out: Path, records: Path, *,
    model: str | None = None, said: str = "", again: bool = False,
) -> list[Record]:  # fmt: skip
    """Make what is needed, run each experiment and keep its record, unless it is there from the same commit. said: what
    a command needs beside name and scale."""
    lab = Lab(scale, texts, out / _folder(scale, texts, model), model=model, say=lambda line: print(line, flush=True))
    planned = plan.steps(experiments, texts, scale)
    left = sum(step.seconds for step in planned)
    begun, reckoned = time.monotonic(), 0.0
    found = []
    for number, (name, one) in enumerate(experiments, start=1):
        kept = _kept(records / f"{name}.json", scale, texts, lab) if not again else None
        if kept is not None:
            print(f"== {name}: kept, from commit {kept.commit}", flush=True)
            found.append(kept)
            continue
        print(f"== {name} ({number} of {len(experiments)}): {one.title}", flush=True)
        wanted = plan.steps([(name, one)], texts, scale)
        for step in wanted:
            if isinstance(step.need, Learner):
                lab.weights(step.need)
            elif isinstance(step.need, Memory):
                folder(lab, step.need)
            elif step.need is not None:
                lab.view(step.need)
            if step in planned:
                planned.remove(step)
                reckoned, left = reckoned + step.seconds, left - step.seconds
        found.append(_run(name, one, lab, records, said))
        pace = (time.monotonic() - begun) / reckoned if reckoned else 1.0
        print(f"   {time.monotonic() - begun:.0f} s so far, about {left * min(pace, 3.0):.0f} s left", flush=True)
    return found


def _run(name: str, one: Experiment, lab: Lab, records: Path, said: str) -> Record:
    lab.asked.clear()
    lab.made.clear()
    begun, processor = time.monotonic(), time.process_time()
    findings = one.run(lab)
    for verdict in findings.verdicts:
        print(f"   {verdict.line}", flush=True)
    record = Record(
        name=name, paper=one.paper, title=one.title, scale=lab.scale.name, findings=findings, commit=commit(),
        machine=machine(), command=f"python -m experiments {name} --scale {lab.scale.name}{said}", model=lab.base.name,
        model_sha256=lab.base_sha256, source=lab.texts.source, texts={c.name: c.sha256 for c in lab.texts.all}, seed=0,
        seconds=round(time.monotonic() - begun, 1), prepared_seconds=round(sum(lab.made.values()), 1),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        extra={"processor_seconds": round(time.process_time() - processor, 1), "made": dict(lab.made)},
    )  # fmt: skip
    save(record, records)
    return record


def _kept(path: Path, scale: Scale, texts: Texts, lab: Lab) -> Record | None:
    """The record of `path` where it is of this very commit, scale, text and model."""
    if not path.is_file() or commit().endswith("+"):
        return None
    try:
        record = load(path)
    except NotARecord as err:
        print(f"   {err}", flush=True)
        return None
    same = (record.commit, record.scale, record.texts, record.model_sha256)
    return record if same == (commit(), scale.name, {c.name: c.sha256 for c in texts.all}, lab.base_sha256) else None


def _folder(scale: Scale, texts: Texts, model: str | None) -> str:
    """Where everything lies that follows from this scale, text and model."""
    identity = repr((scale, [(c.name, c.sha256) for c in texts.all], model))
    return f"{scale.name}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; all by default")
    parser.add_argument("--scale", choices=SCALES, default="small", help="sizes, see scale.py (default small)")
    parser.add_argument(
        "--text", type=Path, help="folder with wiki.*.tokens and .jsonl files of domains, or docstrings"
    )
    parser.add_argument("--model", help="Hugging Face folder or hub id (default: the scale's)")
    parser.add_argument("--plan", action="store_true", help="say what would be done, with time and memory; do nothing")
    parser.add_argument("--again", action="store_true", help="run also what was run at this commit")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where everything is kept (default build/paper)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
