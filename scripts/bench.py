"""Measures rows/s from encoded image bytes to text, with the stages' times and the limits.

Runs the labeller in this process over workloads made in memory; see scripts/bench/workloads.py.
People read stderr; a result is a line of JSON on stdout, appended to scripts/bench/results.jsonl.

    python scripts/bench.py --model demo --work caption --rows 64          # on a CPU
    python scripts/bench.py --model demo --check                          # against transformers
    python scripts/bench.py --shape 7b --work caption:3,ocr:1 --roofline
    python scripts/bench.py --shape 7b --work caption --quantization fp8
    python scripts/bench.py --shape 7b --work vqa --peer vllm              # vLLM, then ours
    python scripts/bench.py --shape 7b --work caption --memory-limit 24    # as on a 24 GB card
    python scripts/bench.py --shape 7b --work caption --through job        # Parquet to Parquet
    python scripts/bench.py --shape 7b --ready                            # seconds until it works
    python scripts/bench.py --published llava-next-72b --quantization fp8 --work caption:2
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.bench import checkpoint, published, results, workloads  # noqa: E402

WARMUP_ANSWERS = {"cpu": 8, "cuda": 96}
STARTED = time.perf_counter()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _what(parser.add_argument_group("what runs").add_argument)
    _how(parser.add_argument_group("how it is measured").add_argument)
    _modes(parser.add_argument_group("other measurements").add_argument)
    return parser.parse_args()


def _what(add: Any) -> None:
    add("--model", default="demo", help="demo, or a model folder")
    add("--shape", choices=sorted(checkpoint.SIZES), help="write a model with random weights")
    add("--published", choices=published.names(), help="random weights of its sizes, in no file")
    add("--model-folder", type=Path, default=None, help="where --shape, --published write")
    add("--tokenizer", type=Path, default=ROOT / ".whl/tokenizer", help="for --shape")
    add("--quantization", choices=["none", "fp8"], default="none")
    add("--memory-limit", type=float, metavar="GB", help="pretend the card has this much")
    add("--set", action="append", default=[], metavar="engine.KEY=VALUE", help="as `run --set`")
    names = ", ".join(workloads.NAMES)
    add("--work", default="caption", help=f"of {names}; NAME:REPS; commas between")
    add("--rows", type=int, default=512, help="answers in one repetition")
    add("--through", choices=["labeller", "job"], default="labeller")


def _how(add: Any) -> None:
    add("--reps", type=int, default=3, help="repetitions where --work names none")
    add("--seed", type=int, default=10)
    add("--seconds", type=float, help="start no workload after this time")
    add("--roofline", action="store_true", help="print each stage beside its measured ceiling")
    add("--peer", choices=["vllm"], help="measure it on the same rows, before ours")
    add("--peer-path", default="/tmp/vllm", help="where unpack_vllm.sh put it")
    add("--peer-results", type=Path, help="take the peer's lines from this file instead")
    add("--name", default=None, help="the row's name in results.jsonl")
    add("--results", type=Path, default=results.FILE, help="file that the row is appended to")
    add("--no-record", action="store_true", help="print the row without appending it")


def _modes(add: Any) -> None:
    add("--check", action="store_true", help="beside transformers on a CPU: texts and speed")
    add("--ready", action="store_true", help="seconds from a fresh process to the first answer")
    add("--write-parquet", type=Path, help="only write the first workload's rows to this file")
    add("--adopt", type=Path, metavar="FILE", help="take over result rows measured elsewhere")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def overrides(args: argparse.Namespace, section: str) -> dict[str, Any]:
    """The section's options: of `--set section.key=value`, read as YAML, and of the flags."""
    import yaml

    found: dict[str, Any] = {}
    if section == "engine" and args.memory_limit:
        found["memory_limit_gb"] = args.memory_limit
    if section == "model" and args.quantization != "none":
        found["quantization"] = args.quantization
    for pair in args.set:
        name, _, value = pair.partition("=")
        start, _, key = name.partition(".")
        if start not in {"engine", "model"} or not key:
            raise SystemExit(f"--set takes engine.KEY=VALUE or model.KEY=VALUE, not {pair!r}.")
        if start == section:
            found[key] = yaml.safe_load(value)
    return found


def device_of(args: argparse.Namespace) -> str:
    import torch

    asked = str(overrides(args, "engine").get("device", "auto"))
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def model_folder(args: argparse.Namespace, device: str) -> str:
    if not (args.shape or args.published):
        return args.model
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    folder = args.model_folder or base / f"vlm-batch-{args.shape or args.published}"
    if args.published:
        published.write_small_files(args.published, folder)
        return str(folder)
    say(f"Random weights of {args.shape} shapes in {folder}")
    return str(checkpoint.make(folder, args.shape, args.tokenizer, device))


def run_labeller(
    name: str, reps: int, model: str, device: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure one workload in this process; the row's measured part."""
    from scripts.bench import measure, summary

    seeds = [workloads.repetition_seed(args.seed, number) for number in range(-1, reps)]
    rows = [min(args.rows, WARMUP_ANSWERS[device.split(":")[0]])] + [args.rows] * reps
    loads = [workloads.make(name, n, seed) for n, seed in zip(rows, seeds, strict=True)]
    warmups = [loads.pop(0)]
    if device.startswith("cuda"):
        warmups.append(workloads.thumbnails(warmups[0], args.rows))
    options = overrides(args, "model")
    engine = {"device": device} | overrides(args, "engine")
    chosen = measure.settings(model, warmups + loads, engine, options)
    if args.memory_limit and device.startswith("cuda"):
        measure.cap_memory(args.memory_limit)
    found = measure.measure(chosen, warmups, loads)
    row = summary.row(found, device)
    return row | summary.of_the_limit(found, model, device, options, engine, args.roofline)


def run_job(
    name: str, _reps: int, model: str, device: str, args: argparse.Namespace
) -> dict[str, Any]:
    from scripts.bench import job

    workload = workloads.make(name, args.rows, args.seed)
    sets = [f"engine.device={device}", *args.set]
    for section in ("engine", "model"):
        sets += [f"{section}.{key}={value}" for key, value in overrides(args, section).items()]
    return job.run(workload, model, list(dict.fromkeys(sets)))


def peer_lines(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """The peer's repetitions: read, or measured now, before our engine takes the card."""
    from scripts.bench import peer

    if args.peer_results:
        return peer.read(args.peer_results)
    if not args.peer:
        return []
    say(f"Measuring {args.peer} on the same rows")
    options = ("work", "rows", "reps", "seed")
    asked = [part for key in options for part in (f"--{key}", str(getattr(args, key)))]
    return peer.run(args.peer, model, args.peer_path, asked)


def run_workloads(args: argparse.Namespace) -> int:
    from scripts.bench import peer

    device = device_of(args)
    model = model_folder(args, device)
    lines = peer_lines(args, model)
    run = run_job if args.through == "job" else run_labeller
    for name, reps in workloads.asked(args.work, args.reps):
        if args.seconds and time.perf_counter() - STARTED > args.seconds:
            say(f"No time for {name}.")
            break
        row = about(args, device, model, f"{name}/{args.through}")
        row |= {"work": name, "rows": args.rows, "images": image_kind()}
        row |= run(name, reps, model, device, args)
        row |= peer.beside(row, lines) if "seeds" in row else {}
        say(headline(row))
        write(row, args)
    return 0


def run_published(args: argparse.Namespace) -> int:
    from scripts.bench import random_weights

    with random_weights.installed():
        return run_workloads(args)


def about(args: argparse.Namespace, device: str, model: str, name: str) -> dict[str, Any]:
    made = args.published or args.shape
    return {
        "name": args.name or name,
        **results.surroundings(device),
        "model": f"random {made}" if made else model,
        "quantization": overrides(args, "model").get("quantization", "none"),
        "engine": overrides(args, "engine"),
    }


def image_kind() -> str:
    return "photographs" if workloads.photograph_files() else "drawn scenes"


def headline(row: dict[str, Any]) -> str:
    rate = row["rows_per_s"]
    text = f"{row['work']}: {rate['p50'] if isinstance(rate, dict) else rate} rows/s"
    for name, found in row.items():
        if isinstance(found, dict) and "ratio" in found:
            text += f", {found['ratio']} x {name} ({found['rows_per_s']['p50']} rows/s)"
    return text


def run_check(args: argparse.Namespace) -> int:
    from scripts.bench import check

    device = "cpu"
    found = check.run(
        args.model, min(args.rows, 200), args.seed, args.reps, overrides(args, "model")
    )
    say(check.headline(found))
    write(about(args, device, args.model, "check") | found, args)
    return 0 if found["equal"] == found["answers"] else 1


def run_ready(args: argparse.Namespace) -> int:
    from scripts.bench import ready

    device = device_of(args)
    model = model_folder(args, device)
    engine = {"device": device} | overrides(args, "engine")
    found = ready.run(model, engine, overrides(args, "model"), args.reps)
    say(f"Model open after {found['open_s']} s, first answer after {found['ready_s']} s.")
    write(about(args, device, model, "ready") | found, args)
    return 0


def write(row: dict[str, Any], args: argparse.Namespace) -> None:
    results.append(row, None if args.no_record else args.results)


def write_rows(args: argparse.Namespace) -> int:
    from scripts.bench import job

    workload = workloads.make(args.work.split(",")[0], args.rows, args.seed)
    job.write_parquet(workload, args.write_parquet)
    if args.shape:
        model_folder(args, device_of(args))
    say(f"{len(workload.images)} rows in {args.write_parquet}")
    return 0


def run_adopt(args: argparse.Namespace) -> int:
    from scripts.bench import peer

    lines = peer.read(args.peer_results) if args.peer_results else []
    rows = results.measured_elsewhere(args.adopt)
    for row in rows:
        row |= peer.beside(row, lines) if "seeds" in row else {}
        say(headline(row) if "rows_per_s" in row else row["name"])
        write(row, args)
    return 0


def main() -> int:
    args = arguments()
    if args.published and (args.check or args.ready or args.peer or args.through == "job"):
        raise SystemExit("--published writes no weights, which another process would read.")
    if args.adopt:
        return run_adopt(args)
    if args.write_parquet:
        return write_rows(args)
    if args.check:
        return run_check(args)
    if args.ready:
        return run_ready(args)
    if args.published:
        return run_published(args)
    return run_workloads(args)


if __name__ == "__main__":
    sys.exit(main())
