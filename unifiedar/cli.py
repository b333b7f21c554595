"""The command `unifiedar`: draw, describe and reconstruct pictures, and the way in to training, data and benchmarks.

Results go to stdout, everything said about them to stderr. Exit codes: 0 all went well; 1 something failed, with one
line on stderr for each failure (of several inputs the others are still done); 2 the command line is wrong;
130 interrupted. UNIFIEDAR_DEBUG=1 shows tracebacks.

With ``--json``, stdout is one JSON document::

    {"command": "generate" | "describe" | "reconstruct",
     "model": str, "device": str | null,          as asked for; where it ran, null if nothing did
     "results": [...],                            one object an input, in order, without those that failed
     "errors": [{"input": str | null, "error": str}],     null: it concerns the whole run
     "grid": str | null}                          the contact sheet's file

    generate:     {"prompt": str, "seed": int, "output": str | null}
    describe:     {"input": str, "notes": [str], "answers": [{"text": str, "log_probability": float}]}, best first
    reconstruct:  {"input": str, "notes": [str], "output": str | null, "psnr": float | null, "codes": [h][w][D] int}

`notes` say how a picture was changed to fit the model; `psnr` is in dB, null if the pictures are equal; `output` is
null if only a contact sheet was asked for. A picture's `seed`, given as ``--seed``, draws that picture alone again.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unifiedar.devices import DeviceError, add_device_argument, usable_device

if TYPE_CHECKING:
    from torch import Tensor

    from unifiedar.models import VAR

__all__ = ["main"]

DEFAULT_MODEL = "emoji"
MAX_SEED = 2**32 - 1

# From this size on, weights are held as bfloat16 to fit. Below it they are float32, which is fastest on a CPU.
LARGE_CHECKPOINT_BYTES = 2_000_000_000

_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class CommandError(Exception):
    """What the user is told, in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments, `sys.argv[1:]` by default.

    Returns:
        The exit code (see the module's docstring). Nothing is raised for what a user can do wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            code = _dispatch(argv)
        except SystemExit as stop:  # argparse's way to end
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = 1 if isinstance(stop.code, str) else stop.code or 0
        sys.stdout.flush()  # a closed pipe shows here and not at exit, where it could not be caught
        return code
    except KeyboardInterrupt:
        print("unifiedar: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return 1
    except Exception as error:
        _print_error(_explain(error))
        return 1


def _dispatch(argv: list[str]) -> int:
    """Commands with parsers of their own get the rest of the line as it is; the others are parsed here."""
    if argv[:1] == ["info"]:
        from unifiedar import info

        return info.main(argv[1:])
    if argv[:1] == ["train"]:
        from unifiedar import train

        return train.main(argv[1:])
    if argv[:1] == ["data"]:
        from unifiedar import data

        return data.main(argv[1:])
    if argv[:2] == ["bench", "quality"]:
        from unifiedar import quality

        return quality.main(argv[2:])
    parser, commands = _parsers()
    command = commands.get(argv[0]) if argv else None
    if command is None:
        parser.parse_args(argv)  # --help, --version, or an error
        return 2
    if argv[0] == "bench":
        args = command.parse_args(argv[1:2])
        command.error(f"must be 'quality', got {args.name!r}; speed is measured in a checkout: python -m bench")
    args = command.parse_intermixed_args(argv[1:])  # options may stand between the inputs
    # Read when torch is first imported. Its threads otherwise spin between the thousands of small operations of a
    # picture: with other work on the same two cores one took 31 s, and 2 s like this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    report = _Report(args)
    try:
        args.run(args, report)
    except BrokenPipeError:
        raise
    except Exception as error:
        report.fail(None, _explain(error, args))
    return report.finish()


# ------------------------------------------------------------------------------------------------------------ arguments


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser that knows all commands by name, and the parser of each."""
    import unifiedar

    parser = argparse.ArgumentParser(
        prog="unifiedar",
        description="Visual autoregression: draw, describe and reconstruct pictures.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"unifiedar {unifiedar.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = _command(commands, "generate", _generate, "draw pictures from prompts")
    text = 'such as "red apple, noto style"; for a VAR the name, or the number, of a class'
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help=text)
    generate.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line; - is stdin")
    _add_output(generate)
    _add_model(generate)
    generate.add_argument("--vae", metavar="FOLDER|FILE", help="tokenizer of a published VAR, or of one saved without")
    generate.add_argument("--count", type=_integer(1, 10_000), default=1, metavar="K", help="pictures per prompt (1)")
    generate.add_argument(
        "--seed", type=_integer(0, MAX_SEED), default=0, help="of the first picture, the next ones count up (0)"
    )
    generate.add_argument("--guidance", type=_number(0, 100), help="strength of the prompt, 1 is without guidance")
    # What is not given is what suits the model (`sampling` in its config.json).
    generate.add_argument("--temperature", type=_number(0, 100), help="0 always takes the likeliest")
    generate.add_argument("--top-k", type=_integer(0, 1_000_000), help="draw from the K likeliest, 0: all")
    generate.add_argument("--top-p", type=_number(0, 1), help="draw from this much probability, 0 or 1: all")

    describe = _command(commands, "describe", _describe, "say what pictures show")
    _add_pictures(describe)
    _add_model(describe)
    describe.add_argument("--answers", type=_integer(1, 100), default=1, metavar="K", help="texts per picture (1)")

    reconstruct = _command(commands, "reconstruct", _reconstruct, "pass pictures through the model's codes")
    _add_pictures(reconstruct)
    _add_output(reconstruct)
    _add_model(reconstruct)

    for name, text in (
        ("info", "which backends exist, which are usable here, and why others are not"),
        ("train", "train a model (tower, unified, vae, var, export)"),
        ("data", "build a data set (emoji)"),
    ):
        commands.add_parser(name, help=text, add_help=False)
    bench = _command(commands, "bench", None, "measure a model's quality")
    bench.add_argument("name", metavar="NAME", help="quality")
    return parser, commands.choices


def _command(commands: Any, name: str, run: Callable | None, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.set_defaults(command=name, run=run, parser=parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|FOLDER|FILE",
        help=f"a model that ships, or a checkpoint ({DEFAULT_MODEL})",
    )
    add_device_argument(parser)
    parser.add_argument("--batch", type=_integer(1, 4096), default=16, metavar="N", help="pictures at a time (16)")
    parser.add_argument("--json", action="store_true", help="print one JSON document, for machines")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, notes or names of files written")


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="picture files, or folders of them")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="OUT", help="FILE.png for one picture, or a folder")
    parser.add_argument("--grid", metavar="FILE", help="also write one contact sheet, FILE.png")


def _integer(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return value

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: numbers from low to high."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # nan included
            raise argparse.ArgumentTypeError(f"must be a number from {low} to {high}, got {text!r}")
        return value

    return parse


# ------------------------------------------------------------------------------------------------------------ reporting


class _Report:
    """What a command has to say: results for stdout, line by line or as JSON; errors, notes and progress for stderr."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device: str | None = None
        self.grid: str | None = None
        self.results: list[dict[str, Any]] = []
        self.errors: list[dict[str, Any]] = []
        self._bar: Any = None

    def result(self, entry: dict[str, Any], line: str | None) -> None:
        """One finished input; `line` is what a person reads."""
        self.results.append(entry)
        if line is not None and not self.args.json:
            self._write(line, sys.stdout)

    def note(self, text: str) -> None:
        if not self.args.quiet:
            self._write(f"unifiedar: note: {_one_line(text)}", sys.stderr)

    def fail(self, source: str | None, text: str) -> None:
        """A failure of one input, or of the run if `source` is None; `text` names the input itself."""
        self.errors.append({"input": source, "error": _one_line(text)})
        self._write(f"unifiedar: error: {_one_line(text)}", sys.stderr)

    def progress(self, total: int) -> Any:
        """A tqdm bar over `total` pictures, visible where someone can see it."""
        from tqdm import tqdm

        hidden = total < 2 or self.args.json or self.args.quiet or not sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=self.args.command, unit=" pictures", disable=hidden, file=sys.stderr)
        return self._bar

    def finish(self) -> int:
        """Prints the JSON document if one was asked for; returns the exit code."""
        if self.args.json:
            document = {
                "command": self.args.command,
                "model": self.args.model,
                "device": self.device,
                "results": self.results,
                "errors": self.errors,
                "grid": self.grid,
            }
            print(json.dumps(document, indent=1, allow_nan=False))
        return 1 if self.errors else 0

    def _write(self, line: str, stream: Any) -> None:
        encoding = stream.encoding or "utf-8"  # file names may hold bytes that are no text
        line = line.encode(encoding, "backslashreplace").decode(encoding)
        if self._bar is not None and not self._bar.disable:
            self._bar.write(line, file=stream)  # above the bar
        else:
            print(line, file=stream)


def _one_line(text: str) -> str:
    """Text without line breaks and control characters, which file names and prompts may hold."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _print_error(text: str) -> None:
    print(f"unifiedar: error: {_one_line(text)}", file=sys.stderr)


def _explain(error: Exception, args: argparse.Namespace | None = None) -> str:
    """One line for any exception; with UNIFIEDAR_DEBUG=1 its traceback is printed too."""
    if os.environ.get("UNIFIEDAR_DEBUG") == "1":
        traceback.print_exception(error)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        batch = f" with --batch {args.batch}" if args is not None else ""
        return f"the GPU ran out of memory{batch}; try a smaller --batch, or --device cpu"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "out of memory; try a smaller --batch"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else text
    # Ours say what is wrong; of others the type is half of the message.
    if isinstance(error, (CommandError, ValueError, TypeError)):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text[:300]} (UNIFIEDAR_DEBUG=1 shows where)"


# ------------------------------------------------------------------------------------------------------------- commands


def _generate(args: argparse.Namespace, report: _Report) -> None:
    if not args.prompts and args.prompts_file is None:
        args.parser.error("a PROMPT or --prompts-file FILE is needed")
    prompts = list(args.prompts)
    if args.prompts_file is not None:
        prompts += _read_prompts(args.prompts_file)
    repeated = [prompt for prompt in prompts for _ in range(args.count)]
    if args.seed + len(repeated) - 1 > MAX_SEED:
        args.parser.error(f"argument --seed: counts past {MAX_SEED} for {len(repeated)} pictures, got {args.seed}")
    outputs = _outputs(args, [_slug(prompt) for prompt in repeated])

    problems = {prompt: problem for prompt in prompts if (problem := _prompt_problem(prompt))}
    model = None
    if any(prompt not in problems for prompt in prompts):
        model = _load(args, report)
        problems |= {prompt: text for prompt in prompts if prompt not in problems and (text := _misfit(model, prompt))}
    for prompt in prompts:
        if prompt in problems:
            report.fail(prompt.encode(errors="replace").decode(), problems[prompt])
    jobs = [
        (prompt, args.seed + i, output)
        for i, (prompt, output) in enumerate(zip(repeated, outputs, strict=True))
        if prompt not in problems
    ]
    if model is None or not jobs:
        return

    drawn: list[Tensor] = []
    with report.progress(len(jobs)) as bar:
        for batch in _batches(jobs, args.batch):
            pictures = model.generate(
                [prompt for prompt, _, _ in batch],
                guidance=args.guidance,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                seed=[seed for _, seed, _ in batch],
                progress=_steps(bar, len(batch), model.image_tokens),
            )
            for (prompt, seed, output), picture in zip(batch, pictures, strict=True):
                if _write(report, prompt, picture, output):
                    name = None if output is None else str(output)
                    line = None if name is None or args.quiet else name
                    report.result({"prompt": prompt, "seed": seed, "output": name}, line)
            if args.grid:
                drawn.extend(pictures)
    if args.grid:
        _write_grid(args, report, drawn, [prompt for prompt, _, _ in jobs])


def _describe(args: argparse.Namespace, report: _Report) -> None:
    paths = _expand(args.paths, report)
    if not paths:
        return
    model = _load(args, report)
    with report.progress(len(paths)) as bar:
        for batch in _batches(_read_pictures(paths, model.image_size, report, bar), args.batch):
            found = model.describe(_stack(batch), answers=args.answers, beams=max(5, args.answers))
            for (path, picture), answers in zip(batch, found, strict=True):
                # A beam search over a small vocabulary may end with fewer texts than asked for: the rest is impossible.
                answers = [
                    {"text": text, "log_probability": round(value, 6)}
                    for text, value in answers
                    if math.isfinite(value)
                ]
                entry = {"input": str(path), "notes": list(picture.notes), "answers": answers}
                report.result(entry, _answer_lines(path, answers, len(paths)))
            bar.update(len(batch))


def _reconstruct(args: argparse.Namespace, report: _Report) -> None:
    paths = _expand(args.paths, report)
    if not paths:
        return
    outputs = dict(zip(paths, _outputs(args, [path.stem for path in paths]), strict=True))
    sources = {path.resolve() for path in paths}
    for output in (*outputs.values(), args.grid and Path(args.grid)):
        if output is not None and output.resolve() in sources:
            args.parser.error(f"{output} would replace a picture that is read; write to another folder")
    model = _load(args, report)
    pairs: list[Tensor] = []
    labels: list[str] = []
    with report.progress(len(paths)) as bar:
        for batch in _batches(_read_pictures(paths, model.image_size, report, bar), args.batch):
            originals = _stack(batch)
            pictures, codes = model.reconstruct(originals)
            for (path, read), original, picture, code in zip(batch, originals, pictures, codes, strict=True):
                psnr, output = _psnr(original, picture), outputs[path]
                if _write(report, str(path), picture, output):
                    name = None if output is None else str(output)
                    entry = {"input": str(path), "notes": list(read.notes), "output": name}
                    line = None if name is None or args.quiet else name
                    report.result({**entry, "psnr": psnr, "codes": code.tolist()}, line)
                if args.grid:
                    pairs += [original, picture]
                    labels += [path.name, "equal" if psnr is None else f"{psnr:.1f} dB"]
            bar.update(len(batch))
    if args.grid:
        # An even number of columns keeps each picture beside its reconstruction.
        _write_grid(args, report, pairs, labels, columns=2 * math.ceil(math.sqrt(len(pairs)) / 2))


def _load(args: argparse.Namespace, report: _Report) -> Any:
    """The model that --model names, on the device that --device names."""
    import torch

    from unifiedar import checkpoints

    path = checkpoints.resolve(args.model)
    try:
        device = usable_device(args.device)
    except DeviceError as error:
        raise CommandError(str(error)) from error
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    large = sum(file.stat().st_size for file in files) >= LARGE_CHECKPOINT_BYTES
    try:
        model = _from_checkpoint(path, device, torch.bfloat16 if large else torch.float32, getattr(args, "vae", None))
    except (checkpoints.CheckpointError, torch.OutOfMemoryError, MemoryError, ImportError):
        raise
    except Exception as error:  # a configuration or a tokenizer with odd values fails wherever these are used first
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise CommandError(f"{path}: not a checkpoint that can be loaded ({cause})") from error
    if isinstance(model, _Classes):
        if args.command != "generate":
            raise CommandError(f"{path}: a VAR, which can generate but not {args.command}")
    elif args.command != "reconstruct" and model.tokenizer is None:
        raise CommandError(f"{path}: has no tokenizer.json, without which it cannot {args.command}")
    report.device = device
    return model


def _from_checkpoint(path: Path, device: str, dtype: Any, vae: str | None) -> Any:
    from unifiedar import checkpoints
    from unifiedar.models import VAR, VILAU

    if vae is not None or (path.is_dir() and checkpoints.read_config(path).get("model") == "var"):
        model = VAR.from_checkpoint(path, device, dtype, vae=vae)
        if model.vae is None:
            raise checkpoints.CheckpointError(f"{path}: has no tokenizer, which drawing needs; name one with --vae")
        return _Classes(model)
    return VILAU.from_checkpoint(path, device=device, dtype=dtype)


class _Classes:
    """A VAR as `generate` asks for pictures: a prompt is the name of a class or, where they have none, its number."""

    image_tokens = 1  # a batch is reported whole

    def __init__(self, model: "VAR"):
        self.model = model
        names = model.class_names or tuple(map(str, range(model.config.num_classes)))
        self.labels = {name: i for i, name in enumerate(names)}

    def misfit(self, prompt: str) -> str | None:
        """Why this is no class, if it is none."""
        if prompt.strip() in self.labels:
            return None
        near = difflib.get_close_matches(prompt.strip(), self.labels, 3) or list(self.labels)[:3]
        return f"{_shorten(prompt)!r} is no class of the model; near: {', '.join(near)}"

    def generate(
        self,
        prompts: Sequence[str],
        *,
        guidance: float | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        seed: Sequence[int],
        progress: Callable[[int], object],
    ) -> "Tensor":
        """Pictures (N, 3, S, S) uint8, each of its own seed and so drawn alone; settings not given are those of the
        published FID."""
        import torch

        if temperature is not None:
            raise CommandError("--temperature: a VAR has none; --top-k and --top-p sharpen what it draws")
        if guidance is not None and guidance < 1:
            raise CommandError(f"--guidance: must be at least 1, without guidance, for a VAR, got {guidance:g}")
        settings = {
            "cfg": 1.5 if guidance is None else guidance - 1,
            "top_k": min(900, self.model.config.num_codes) if top_k is None else top_k,
            "top_p": 0.96 if top_p is None else top_p,
        }
        drawn = [
            self.model.generate(self.labels[prompt.strip()], seed=one, **settings)  # type: ignore[arg-type]
            for prompt, one in zip(prompts, seed, strict=True)
        ]
        progress(1)
        return torch.cat(drawn)


# --------------------------------------------------------------------------------------------------------------- inputs


def _read_prompts(name: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank."""
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        prompts = [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise CommandError(f"{name}: not a UTF-8 text file (byte {error.start})") from error
    except ValueError as error:  # a zero byte in the name
        raise CommandError(f"{name}: no such file") from error
    if not prompts:
        raise CommandError(f"{name}: holds no prompt")
    return prompts


def _prompt_problem(prompt: str) -> str | None:
    if not prompt.strip():
        return "prompt is empty"
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text
        return f"prompt {_shorten(prompt)!r} is not valid UTF-8"
    return None


def _misfit(model: Any, prompt: str) -> str | None:
    """Why this model cannot draw a prompt, if it cannot."""
    if isinstance(model, _Classes):
        return model.misfit(prompt)
    tokens, limit = len(model.tokenizer.encode(prompt)), model.max_prompt_tokens
    if tokens > limit:
        return f"prompt {_shorten(prompt)!r} has {tokens} tokens; the model takes at most {limit}"
    return None


def _shorten(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."


def _expand(names: Iterable[str], report: _Report) -> list[Path]:
    """Files, and the pictures of folders (by suffix, sorted, not their subfolders); what is neither is reported."""
    from unifiedar import images

    paths: dict[Path, None] = {}  # a set that keeps the order
    for name in names:
        path = Path(name)
        try:
            if path.is_dir():
                found = sorted(p for p in path.iterdir() if p.suffix.lower() in images.SUFFIXES and p.name[0] != ".")
                if not found:
                    raise CommandError(f"{path}: the folder holds no pictures ({', '.join(sorted(images.SUFFIXES))})")
                paths.update(dict.fromkeys(found))
            elif path.exists():
                paths[path] = None
            else:
                raise CommandError(f"{path}: no such file or folder")
        except (CommandError, OSError, ValueError) as error:
            report.fail(name, _explain(error))
    return list(paths)


def _read_pictures(paths: Iterable[Path], size: int, report: _Report, bar: Any) -> Iterator[tuple[Path, Any]]:
    """Each path with its picture; one that cannot be read is reported and counts as done."""
    from unifiedar import images

    for path in paths:
        try:
            picture = images.read_image(path, size)
        except images.ImageError as error:
            report.fail(str(path), str(error))
            bar.update(1)
            continue
        if picture.notes:
            report.note(f"{path}: {', '.join(picture.notes)}")
        yield path, picture


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _stack(batch: Sequence[tuple[Path, Any]]) -> "Tensor":
    import torch

    return torch.stack([picture.pixels for _, picture in batch])


def _steps(bar: Any, pictures: int, steps: int) -> Callable[[int], None]:
    """A callback that counts finished steps, of `steps` for a batch, and moves the bar by whole pictures."""
    done = 0

    def advance(finished: int) -> None:
        nonlocal done
        before, done = done, done + finished
        bar.update(done * pictures // steps - before * pictures // steps)

    return advance


# -------------------------------------------------------------------------------------------------------------- outputs


def _slug(prompt: str) -> str:
    """A file name for a prompt: "Red apple, noto style" -> "red-apple-noto-style"."""
    text = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    return text.encode(errors="ignore")[:80].decode(errors="ignore") or "prompt"


def _outputs(args: argparse.Namespace, names: Sequence[str]) -> list[Path | None]:
    """The file of each picture, in a place that can be written to: OUT itself if it is a .png, else OUT/<name>.png.

    Names that come up again get -2, -3 and so on. All None if only a contact sheet was asked for.
    """
    if args.output is None and args.grid is None:
        args.parser.error("-o OUT or --grid FILE is needed")
    for option, value in (("-o", args.output), ("--grid", args.grid)):
        if value is not None and (not value or "\0" in value):
            args.parser.error(f"argument {option}: must be a file or folder, got {value!r}")
        if value is not None and Path(value).suffix.lower() in _OTHER_PICTURES:
            args.parser.error(f"argument {option}: pictures are written as PNG, got {value!r}")
    if args.grid is not None:
        if Path(args.grid).suffix.lower() != ".png":
            args.parser.error(f"argument --grid: must be a .png file, got {args.grid!r}")
        _require_writable(Path(args.grid).parent)
    if args.output is None:
        return [None] * len(names)
    out = Path(args.output)
    if out.suffix.lower() == ".png" and not out.is_dir() and not args.output.endswith("/"):
        if len(names) != 1:
            args.parser.error(f"argument -o: must be a folder for {len(names)} pictures, got the file {args.output!r}")
        if args.grid is not None and out.resolve() == Path(args.grid).resolve():
            args.parser.error(f"argument --grid: must be another file than -o, got {args.grid!r}")
        _require_writable(out.parent)
        return [out]
    _require_writable(out)
    taken: set[str] = set()
    outputs: list[Path | None] = []
    for name in names:
        unique, number = name, 1
        while unique.lower() in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique.lower())
        outputs.append(out / f"{unique}.png")
    return outputs


def _require_writable(folder: Path) -> None:
    """Tells before any work whether the folder is there, or can be made, and written to."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise CommandError(f"{nearest}: a file, where a folder is needed")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CommandError(f"{nearest}: cannot be written to: permission denied")


def _write(report: _Report, source: str | None, picture: Any, output: Path | None) -> bool:
    """Writes a tensor or a Pillow image, and makes the folder; a failure is reported and makes this False."""
    from unifiedar import images

    if output is None:
        return True
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        images.write_png(picture, output)
    except (images.ImageError, OSError) as error:
        report.fail(source, _explain(error))
        return False
    return True


def _write_grid(
    args: argparse.Namespace,
    report: _Report,
    pictures: Sequence["Tensor"],
    labels: Sequence[str],
    columns: int | None = None,
) -> None:
    from unifiedar import images

    if pictures and _write(report, None, images.contact_sheet(pictures, columns, labels), Path(args.grid)):
        report.grid = args.grid
        if not args.quiet and not args.json:
            print(args.grid)


def _answer_lines(path: Path, answers: Sequence[dict[str, Any]], pictures: int) -> str:
    """The best text; several answers a line each with their probability; several pictures with the file's name."""
    prefix = f"{_one_line(str(path))}: " if pictures > 1 else ""
    if len(answers) == 1:
        return prefix + _one_line(answers[0]["text"])
    return "\n".join(
        f"{prefix}{math.exp(answer['log_probability']):6.1%}  {_one_line(answer['text'])}" for answer in answers
    )


def _psnr(original: "Tensor", picture: "Tensor") -> float | None:
    """Peak signal-to-noise ratio of two uint8 pictures in dB, None if they are equal."""
    error = (original.double() - picture.double()).square().mean().item()
    return None if error == 0 else round(10 * math.log10(255**2 / error), 3)
