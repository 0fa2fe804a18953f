"""Measures rows/s from encoded image bytes to text, with the stages' times and the limits.

Runs the labeller in this process over workloads made in memory; see scripts/bench/workloads.py.
People read stderr; the last line of stdout is the result as JSON, which is also appended to
scripts/bench/results.jsonl.

    python scripts/bench.py --model demo --work caption --rows 64          # on a CPU
    python scripts/bench.py --random-weights 7b --work caption --rows 512 --roofline
    python scripts/bench.py --random-weights 7b --work vqa --peer vllm     # both in one run
    python scripts/bench.py --model demo --check                          # against transformers
    python scripts/bench.py --model DIR --work caption --through job       # Parquet to Parquet
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.bench import checkpoint, results, workloads  # noqa: E402

WARMUP_ANSWERS = {"cpu": 8, "cuda": 96}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="demo, or a model folder")
    add("--random-weights", choices=sorted(checkpoint.SIZES), help="write such a model and use it")
    add("--model-folder", type=Path, default=None, help="where --random-weights writes")
    add("--tokenizer", type=Path, default=ROOT / ".whl/tokenizer", help="for --random-weights")
    add("--work", default="caption", help=f"of {', '.join(workloads.NAMES)}; commas between")
    add("--rows", type=int, default=512, help="answers in one repetition")
    add("--reps", type=int, default=2)
    add("--seed", type=int, default=10)
    add("--set", action="append", default=[], metavar="engine.KEY=VALUE", help="as `run --set`")
    add("--through", choices=["labeller", "job"], default="labeller")
    add("--roofline", action="store_true", help="print each stage beside its limit")
    add("--peer", choices=["vllm"], help="measure it on the same rows in the same run")
    add("--peer-path", default=str(ROOT / ".vllm"), help="where unpack_vllm.sh put it")
    add("--check", action="store_true", help="compare with transformers, texts and speed")
    add("--name", default=None, help="the row's name in results.jsonl")
    add("--results", type=Path, default=results.FILE, help="file that the row is appended to")
    add("--no-record", action="store_true", help="print the row without appending it")
    add("--write-parquet", type=Path, help="only write the first workload's rows to this file")
    return parser.parse_args()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def overrides(pairs: list[str], section: str) -> dict[str, Any]:
    """The values of `--set section.key=value`, read as YAML."""
    import yaml

    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        start, _, key = name.partition(".")
        if start not in {"engine", "model"} or not key:
            raise SystemExit(f"--set takes engine.KEY=VALUE or model.KEY=VALUE, not {pair!r}.")
        if start == section:
            found[key] = yaml.safe_load(value)
    return found


def device_of(args: argparse.Namespace) -> str:
    import torch

    asked = str(overrides(args.set, "engine").get("device", "auto"))
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def model_folder(args: argparse.Namespace, device: str) -> str:
    if not args.random_weights:
        return args.model
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    folder = args.model_folder or base / f"vlm-batch-{args.random_weights}"
    say(f"Random weights of {args.random_weights} shapes in {folder}")
    return str(checkpoint.make(folder, args.random_weights, args.tokenizer, device))


def make_workloads(name: str, args: argparse.Namespace, warmups: int) -> list[workloads.Workload]:
    """The warm-up's workload, then one for each repetition."""
    rows = [warmups] + [args.rows] * args.reps
    return [workloads.make(name, n, args.seed + 977 * i) for i, n in enumerate(rows)]


def run_labeller(name: str, model: str, device: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one workload in this process; the row's measured part."""
    from scripts.bench import measure

    loads = make_workloads(name, args, WARMUP_ANSWERS[device.split(":")[0]])
    model_options = overrides(args.set, "model")
    engine = {"device": device} | overrides(args.set, "engine")
    chosen = measure.settings(model, loads, engine, model_options)
    peer = run_peer(args, model, loads) if args.peer else {}
    found = measure.measure(chosen, loads[0], loads[1:])
    row = summary(found, model, device, model_options)
    if args.roofline:
        print_roofline(found, row, model, model_options)
    return row | peer


def summary(found: Any, model: str, device: str, options: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of a measurement: rates, stages, shares, failures."""
    from scripts.bench import limits, measure

    peaks = limits.peaks(device)
    reps = found.repetitions
    rates = [len(rep.answers) / rep.seconds for rep in reps]
    tokens = [(r.num_prompt_tokens + r.num_output_tokens) / r.seconds for r in reps]
    last = reps[-1]
    needed = measure.needed_work(last, model, options)
    prompts = max(1, last.num_prompt_tokens)
    return {
        "rows_per_s": results.quantiles(rates),
        "tokens_per_s": round(sorted(tokens)[len(tokens) // 2]),
        "images_per_s": round(len(last.workload.images) / last.seconds, 2),
        "seconds": [round(rep.seconds, 3) for rep in reps],
        "start_s": round(found.start_seconds, 1),
        "warmup_s": round(found.warmup_seconds, 1),
        "share_of_peak": round(measure.limit_share(last, needed, peaks), 4) if needed else None,
        "peak_tflops": round(peaks.flops / 1e12, 1),
        "peak_gb_s": round(peaks.bytes_per_s / 1e9),
        "cached_share": round(last.num_cached_tokens / prompts, 4),
        "padding_share": round(last.padding_share, 4),
        "slot_occupancy": round(last.slot_occupancy, 4),
        "failed": sum(rep.num_failed for rep in reps),
        "prompt_tokens": last.num_prompt_tokens,
        "output_tokens": last.num_output_tokens,
        "memory": results.peak_memory(device),
        "stats": {key: value for key, value in last.stats.items() if value},
    }


def print_roofline(found: Any, row: dict[str, Any], model: str, options: dict[str, Any]) -> None:
    from scripts.bench import measure

    last = found.repetitions[-1]
    needed = measure.needed_work(last, model, options)
    if needed is None:
        say("No roofline: the family's work is not known.")
        return
    say(f"{'stage':12}{'TFLOP':>10}{'ideal s':>10}{'took s':>10}{'share':>8}")
    for stage in ("vision", "prefill", "decode"):
        flops = getattr(needed, stage)
        ideal = flops / row["peak_tflops"] / 1e12
        if stage == "decode":
            ideal = max(ideal, needed.decode_bytes / row["peak_gb_s"] / 1e9)
        took = sum(s for key, s in last.stats.items() if key.endswith(f"seconds.{stage}"))
        share = f"{ideal / took:8.1%}" if took else "       -"
        say(f"{stage:12}{flops / 1e12:10.2f}{ideal:10.3f}{took:10.3f}{share}")
    ideal = needed.flops / row["peak_tflops"] / 1e12
    say(
        f"{'all':12}{needed.flops / 1e12:10.2f}{ideal:10.3f}{last.seconds:10.3f}"
        f"{ideal / last.seconds:8.1%}"
    )


def run_peer(
    args: argparse.Namespace, model: str, loads: list[workloads.Workload]
) -> dict[str, Any]:
    from scripts.bench import peer

    say(f"Measuring {args.peer} on the same rows")
    return {args.peer: peer.run(args.peer, model, loads, args.peer_path)}


def run_job(name: str, model: str, device: str, args: argparse.Namespace) -> dict[str, Any]:
    from scripts.bench import job

    workload = workloads.make(name, args.rows, args.seed)
    return job.run(workload, model, ["engine.device=" + device, *args.set])


def run_check(model: str, args: argparse.Namespace) -> int:
    from scripts.bench import check

    found = check.run(model, min(args.rows, 64), args.seed, overrides(args.set, "model"))
    say(
        f"{found['equal']} of {found['rows']} texts are equal to transformers' "
        f"({found['rows_per_s']} rows/s against {found['transformers_rows_per_s']})"
    )
    write({"name": "check", **results.surroundings("cpu"), **found}, args)
    return 0 if found["equal"] == found["rows"] else 1


def write(row: dict[str, Any], args: argparse.Namespace) -> None:
    results.append(row, None if args.no_record else args.results)


def write_rows(args: argparse.Namespace) -> int:
    from scripts.bench import job

    workload = workloads.make(args.work.split(",")[0], args.rows, args.seed)
    job.write_parquet(workload, args.write_parquet)
    if args.random_weights:
        model_folder(args, device_of(args))
    say(f"{len(workload.images)} rows in {args.write_parquet}")
    return 0


def main() -> int:
    args = arguments()
    if args.write_parquet:
        return write_rows(args)
    if args.check:
        return run_check(args.model, args)
    for name in args.work.split(","):
        device = device_of(args)
        model = model_folder(args, device)
        run = run_job if args.through == "job" else run_labeller
        found = run(name, model, device, args)
        row = {
            "name": args.name or f"{name}/{args.through}",
            **results.surroundings(device),
            "model": f"random {args.random_weights}" if args.random_weights else model,
            "work": name,
            "rows": args.rows,
            "images": "photographs" if workloads.photograph_files() else "drawn scenes",
            **found,
        }
        rate = row["rows_per_s"]
        say(f"{name}: {rate['p50'] if isinstance(rate, dict) else rate} rows/s on {row['device']}")
        write(row, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
