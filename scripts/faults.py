"""Interrupts kvprofile at random moments and at single steps of its file work, and looks at what is left.

Each run of a command is stopped by SIGKILL, SIGINT or SIGTERM: at a random moment of its life, or right before the
n-th time that it opens, makes, renames or removes something in its output folder. Afterwards every output is absent or
whole, and nothing lies about that the next run does not use. The next run is stopped too; every few runs one is
let through, and its files must equal those of a run that nobody disturbed. Prints a table; exits 1 where anything
was otherwise.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from kvprofile.records import run_files

ROOT = Path(__file__).resolve().parents[1]
POCKET = str(ROOT / "models" / "pocket")
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
SMALL = ["--context-tokens", "320", "--chunk-tokens", "80", "--dtype", "float32", "--device", "cpu"]
CORPUS = ["--corpus", "generate:prose:1:6000", "--corpus", "generate:tables:2:6000"]

STEPS = """
import os, sys
place, number, signal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
names = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
count = 0
def step(name, arguments):
    global count
    if name in names and arguments and place in str(arguments[0]):
        count += 1
        if count == number:
            os.kill(os.getpid(), signal)
sys.addaudithook(step)
try:
    from kvprofile.cli import main
    main(sys.argv[4:])
finally:
    print(f"STEPS{count}", file=sys.stderr)
"""
"""Runs kvprofile and signals itself before a step of its file work; says how many there were."""


@dataclass
class Command:
    """A command line with PLACE for its folder, the files it leaves, and what of them a stop may leave besides."""

    name: str
    arguments: list[str]
    files: tuple[str, ...]
    resuming: tuple[str, ...] = ()
    steps: int = 0
    seconds: float = 0.0
    expected: dict[str, bytes] = field(default_factory=dict)

    def run(self, place: Path, number: int = 0, sent: int = 0) -> subprocess.Popen[str]:
        """Start it in a place; with ``number`` it signals itself before that step."""
        arguments = [each.replace("PLACE", str(place)) for each in self.arguments]
        if not number:
            return popen(["-m", "kvprofile", *arguments])
        return popen(["-c", STEPS, str(place), str(number), str(sent), *arguments])

    def measure(self, place: Path) -> None:
        """Run it undisturbed: its files, its steps, its seconds."""
        began = time.monotonic()
        process = self.run(place, -1)
        errors = process.communicate()[1]
        if process.returncode:
            sys.exit(f"{self.name}: {errors}")
        self.seconds = time.monotonic() - began
        self.steps = int(errors.rpartition("STEPS")[2])
        self.expected = {name: (place / name).read_bytes() for name in self.files}

    def problems(self, place: Path, finished: bool, killed: bool) -> list[str]:
        """What is wrong in a place where the command was stopped, or let through."""
        found = []
        for name in self.files:
            path = place / name
            if path.exists() and (finished or name not in self.resuming) and path.read_bytes() != self.expected[name]:
                found.append(f"{name} is not whole")
            if finished and not path.exists():
                found.append(f"{name} is missing")
        folders = {str(parent) for name in self.files for parent in Path(name).parents}
        for path in place.rglob("*"):
            name = str(path.relative_to(place))
            known = name in self.files or (name in folders and path.is_dir())
            temporary = killed and path.name.startswith(".") and path.name.endswith((".partial", ".lock"))
            kept = not finished and any(name.startswith(each) for each in self.resuming)
            if not known and not temporary and not kept:
                found.append(f"{name} lies about")
        return found


class Bench(Command):
    """Its times are never the same twice: the record must be valid, and legs that were done must stay as they were."""

    legs: tuple[str, ...] = ()
    kept: dict[str, str] = {}  # noqa: RUF012 - one bench at a time

    def measure(self, place: Path) -> None:
        """Run it undisturbed, and keep the answers."""
        super().measure(place)
        self.answers = self._answers(place)

    def _answers(self, place: Path) -> dict[str, list[tuple[int | None, str | None]]]:
        record = run_files.load(place / "run/record.json")
        return {leg.name: sorted((row.seed, row.output) for row in leg.requests) for leg in record.legs}

    def problems(self, place: Path, finished: bool, killed: bool) -> list[str]:
        """As of other commands."""
        path = place / "run/record.json"
        servers = left_running(place)
        found = [f"process {each} still runs" for each in servers]
        if not path.exists():
            return [*found, "no record"] if finished else found
        record = run_files.load(path)
        found += [f"{leg.name}: {leg.reason}" for leg in record.legs if finished and leg.status != "ok"]
        done = {leg.name: leg.model_dump_json(exclude={"requests": {"__all__": {"verdicts"}}, "bound": True})
                for leg in record.legs if leg.status == "ok"}  # fmt: skip
        found += [f"{name} was measured again" for name, leg in self.kept.items() if done.get(name) != leg]
        self.kept = {} if finished else done
        if finished and self._answers(place) != self.answers:
            found.append("other answers than undisturbed")
        for each in place.rglob("*"):
            temporary = each.name.startswith(".") and each.name.endswith((".partial", ".lock"))
            if (temporary and not killed) or (finished and each.suffix == ".rows"):
                found.append(f"{each.relative_to(place)} lies about")
        return found


def left_running(place: Path) -> list[int]:
    """Processes that have a file of a place open, after some time to end."""
    deadline = time.monotonic() + 90
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                found += [process.pid for opened in process.open_files() if opened.path.startswith(str(place))]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def popen(arguments: list[str]) -> subprocess.Popen[str]:
    """Python with arguments, in the project's folder and without network."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


Stop = tuple[signal.Signals, int]
"""What is sent before which step; before step 0: at a random moment."""


def random_stops(command: Command, rng: random.Random) -> Iterator[Stop]:
    """Half of them at moments, half before steps, for ever."""
    while True:
        yield rng.choice(SIGNALS), rng.choice((0, rng.randint(1, command.steps)))


def every_step(command: Command) -> Iterator[Stop]:
    """SIGKILL before each step of an undisturbed run."""
    yield from ((signal.SIGKILL, number) for number in range(1, command.steps + 1))


def interrupted(command: Command, place: Path, stop: Stop, rng: random.Random) -> tuple[str, str, str]:
    """Start a command and stop it. Gives the signal, how the moment was chosen, and how it ended."""
    sent, step = stop
    process = command.run(place, step, sent)
    if not step:
        time.sleep(rng.uniform(0.05, command.seconds))
        process.send_signal(sent)
    errors = process.communicate(timeout=900)[1].partition("STEPS")[0]
    return sent.name, "step" if step else "moment", ending(sent, process.returncode, errors)


def ending(sent: signal.Signals, code: int, errors: str) -> str:
    """How a process ended after a signal. Python ends itself by SIGINT where that came in the middle of an exec()."""
    if code == 0:
        return "finished before"
    if code in (130, -signal.SIGINT) and "interrupted; finished work is kept" in errors and "Traceback" not in errors:
        return "said so"
    if code in (-sent, -signal.SIGINT) and "interrupted" not in errors:  # the two others before the command began
        return "ended at once"
    return f"WRONG: exit code {code}: {errors.strip()[-700:]}"


def trial(
    command: Command, kills: int, chain: int, stops: Iterator[Stop], rng: random.Random, table: collections.Counter
) -> list[str]:
    """Stop a command so often, or as long as there are stops, letting it through after every ``chain`` of them."""
    problems: list[str] = []
    done = 0
    while done < kills and (some := list(itertools.islice(stops, chain))):
        with tempfile.TemporaryDirectory(prefix="faults-") as name:
            place = Path(name).resolve()
            killed = False
            for stop in some:
                sent, how, ended = interrupted(command, place, stop, rng)
                killed = killed or ended == "ended at once"
                found = command.problems(place, False, killed)
                if ended.startswith("WRONG"):
                    found.append(ended)
                    ended = "wrong"
                table[command.name, sent, how, ended, "bad" if found else "good"] += 1
                problems += [f"{command.name}, {sent} by {how}, {ended}: {each}" for each in found]
                done += ended != "finished before"
            process = command.run(place)
            errors = process.communicate(timeout=900)[1]
            found = [f"run again: {errors[-500:]}"] if process.returncode else command.problems(place, True, False)
            problems += [f"{command.name}, run to its end: {each}" for each in found]
            table[command.name, "-", "run to its end", "finished", "bad" if found else "good"] += 1
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="of each command")
    parser.add_argument("--chain", type=int, default=4, help="stops before a run is let through")
    parser.add_argument("--every-step", action="store_true", help="SIGKILL before each step, and nothing at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of commands")
    parser.add_argument(
        "--bench-url", help="a vLLM server of pocket, whose answers bench asks for; key in VLLM_API_KEY"
    )
    parser.add_argument("--vllm", action="store_true", help="bench with servers of its own too, a minute each time")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would children
    score = ["score", POCKET, *CORPUS, *SMALL, "--output", "PLACE/out.json"]
    profile = ["--profile", "models/kv_budget/pocket.json", "--sink-tokens", "16", "--recent-tokens", "64"]
    evaluate = ["evaluate", POCKET, *profile, "--tasks", "needle", "--context-tokens", "400", "--contexts", "2",
                "--questions", "2", "--retention", "0.5", "--random-seeds", "1", "--output", "PLACE/run"]  # fmt: skip
    export = ["export", "models/kv_budget/pocket.json", "--retention", "0.5", "--output"]
    duo = ["export", "models/kv_budget/pocket.json", "--format", "duo-attention", "--output", "PLACE/duo"]
    commands = [
        Command("score", score, ("out.json",), ("out.json.partial",)),
        Command(
            "score --shard",
            [*score, "--shard", "1/2"],
            ("out.json.shard-1-of-2.safetensors",),
            ("out.json.shard-1-of-2.safetensors.partial",),
        ),
        Command(
            "score --save-token-scores",
            [*score, "--save-token-scores", "PLACE/tokens.safetensors"],
            ("out.json", "tokens.safetensors"),
            ("out.json.partial",),
        ),
        Command("evaluate", evaluate, ("run/items.jsonl", "run/run.json", "run/summary.json"), ("run/items.jsonl",)),
        Command("export", [*export, "PLACE/out.json", "--format", "vllm"], ("out.json",)),
        Command("export of a folder", duo, ("duo/full_attention_heads.tsv", "duo/config.json"), (".duo.partial/",)),
    ]
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        if arguments.bench_url:
            commands.append(bench(arguments.bench_url, Path(name)))
        if arguments.vllm:
            commands.append(bench_with_servers())
        if arguments.only:
            commands = [each for each in commands if each.name in arguments.only]
        table: collections.Counter = collections.Counter()
        problems = []
        for command in commands:
            command.measure(Path(name).resolve() / command.name)
            print(f"{command.name}: {command.steps} steps, {command.seconds:.1f} s undisturbed", flush=True)
            rng = random.Random(f"{arguments.seed}:{command.name}")
            if arguments.every_step:
                problems += trial(command, command.steps, 1, every_step(command), rng, table)
            else:
                problems += trial(command, arguments.kills, arguments.chain, random_stops(command, rng), rng, table)
    for row, count in sorted(table.items()):
        print(f"{count:5}  {'  '.join(f'{cell:<16}' for cell in row)}")
    print("\n".join(problems) or "nothing lost, nothing half-written, nothing lies about")
    sys.exit(bool(problems))


def bench(url: str, place: Path) -> Bench:
    """Three legs of twelve answers each, at one server."""
    table = place / "providers.toml"
    names = ("one", "two", "three")
    table.write_text("".join(f'[{each}]\nbase_url = "{url}/v1"\nkey_env = "VLLM_API_KEY"\n' for each in names))
    legs = [word for each in names for word in ("--provider", each)]
    options = ["--model", POCKET, "--remote-only", "--providers", str(table), "--documents", "pocket", "--requests",
               "12", "--concurrency", "2", "--warmup-requests", "1", "--max-output-tokens", "16"]  # fmt: skip
    return Bench("bench", ["bench", *options, *legs, "--output", "PLACE/run"], ("run/record.json",))


def bench_with_servers() -> Bench:
    """A leg with budgets and one without, each with a server that the command starts."""
    options = ["--model", POCKET, "--profile", "models/kv_budget/pocket.json", "--dtype", "float32", "--max-model-len",
               "4096", "--block-tokens", "32", "--pool-memory", "64MiB", "--enforce-eager", "--no-attention",
               "--documents", "pocket", "--requests", "12", "--concurrency", "2", "--max-output-tokens", "16",
               "--retention", "0.5"]  # fmt: skip
    return Bench("bench with vLLM", ["bench", *options, "--output", "PLACE/run"], ("run/record.json",))


if __name__ == "__main__":
    main()
