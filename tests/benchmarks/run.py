"""Runs the benchmarks: every arm in turns, each in a process of its own; leaves bench.json and bench.md.

make bench                                                # the CPU set
python tests/benchmarks/run.py --only startup --quick     # one of them, small: to try it, not to quote it
python tests/benchmarks/run.py --only dp-step-8x64 --profile  # where the time of each arm goes, instead of how much
make bench-gpu                                            # the GPU set; needs a GPU
"""

import argparse
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))

from harness import Benchmark, BenchmarkResult, Report, Scale, discover  # noqa: E402
from harness.machine import gpu_name, machine, versions  # noqa: E402
from harness.measure import measure  # noqa: E402
from harness.profiling import profile_of  # noqa: E402


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    """Exit code: 0 everything was measured, 1 something failed (the rest is in the results), 2 bad input."""
    known = discover(folder)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_listing(known)
    )
    parser.add_argument("--only", metavar="NAME", action="append", help="only this benchmark; repeatable")
    parser.add_argument("--quick", action="store_true", help="small sizes and few turns: seconds instead of minutes")
    parser.add_argument("--gpu", action="store_true", help="the GPU set instead of the CPU set")
    parser.add_argument("--profile", action="store_true", help="profile each arm instead; leaves profile-NAME.md")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the results (default: %(default)s)"
    )
    given = parser.parse_args(arguments)

    unknown = sorted(set(given.only or ()) - {one.name for one in known})
    if unknown:
        print(
            f"bench: unknown benchmark {', '.join(unknown)}; there are {', '.join(o.name for o in known)}.",
            file=sys.stderr,
        )
        return 2
    if given.gpu and gpu_name() is None:
        print(
            "bench: the GPU set needs a GPU and torch sees none here. Run 'make bench' for the CPU set.",
            file=sys.stderr,
        )
        return 2
    chosen = [one for one in known if (one.name in given.only if given.only else one.gpu if given.gpu else one.cpu)]
    scale = Scale(quick=given.quick, gpu=given.gpu)
    return _profile(chosen, scale, given.out) if given.profile else _run(chosen, scale, given.out)


def _profile(chosen: list[Benchmark], scale: Scale, out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    for one in chosen:
        path = out / f"profile-{one.name}.md"
        path.write_text(profile_of(one.name, one.plan(scale)), encoding="utf-8")
        print(path.read_text(encoding="utf-8"))
        print(path, file=sys.stderr)
    return 0


def _run(chosen: list[Benchmark], scale: Scale, out: Path) -> int:
    host, packages = machine(), versions()
    results: list[BenchmarkResult] = []
    started = time.monotonic()
    for place, one in enumerate(chosen):
        print(f"{place + 1} of {len(chosen)}  {one.name}: {one.title}", file=sys.stderr)
        expected = sum(other.minutes for other in chosen[place + 1 :]) * 60 * (0.1 if scale.quick else 1.0)
        begun = time.monotonic()

        def tell(what: str, done: float, one: Benchmark = one, begun: float = begun, after: float = expected) -> None:
            took = time.monotonic() - begun
            own = took / done - took if done > 0.1 else one.minutes * 60 * (0.1 if scale.quick else 1.0)
            print(f"   {what}; about {_clock(own + after)} left", file=sys.stderr, flush=True)

        results.append(measure(one, scale, tell))
        for problem in results[-1].problems:
            print(f"   FAILED {problem}", file=sys.stderr)
        paths = Report(host, packages, results).write(out)
    if not results:
        print("bench: no benchmark is in this set.", file=sys.stderr)
        return 2
    print(paths[1].read_text(encoding="utf-8"))
    print(f"{_clock(time.monotonic() - started)}; {paths[0]} and {paths[1]}", file=sys.stderr)
    return 1 if any(result.problems for result in results) else 0


def _listing(known: list[Benchmark]) -> str:
    lines = [f"  {one.name:<16} {'GPU, ' if one.gpu else ''}{one.minutes:g} min  {one.title}" for one in known]
    return "\n".join(["benchmarks:", *lines])


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
