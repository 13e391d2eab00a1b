"""The command `bitnet-edu`: a function for each verb, its docstring the help text.

Exit status: 0 good, 1 the check failed, 2 bad input (one line on stderr), 130 stopped by Ctrl-C.
What a verb needs is imported when it runs, so that `--help` and mistakes answer at once.
"""

import argparse
import codecs
import contextlib
import errno
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from bitnet_edu.errors import BitNetError, InputError

UNWRITTEN = {errno.ENOSPC, errno.EIO, errno.EFBIG, getattr(errno, "EDQUOT", None)}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse prints the whole usage first."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(complain(f"{message} (see {self.prog} --help)", self.prog))

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse's own keeps quiet where it can't write


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    try:
        prepare_streams()
        try:
            args = build_parser().parse_args(argv)
            return args.run(args)
        finally:
            sys.stdout.flush()  # here, where a failure still has a status
    except BrokenPipeError:  # `| head` has read enough
        give_up_stdout()
        return 0
    except KeyboardInterrupt:
        return 130
    except MemoryError:
        return complain("out of memory: choose a smaller model, or close other programs")
    except OSError as error:
        give_up_stdout()
        unnamed = error.filename is None and error.errno in UNWRITTEN
        return complain(f"the output could not be written: {error}" if unnamed else error)
    except BitNetError as error:
        return complain(error)


def complain(error: BaseException | str, program: str = "bitnet-edu") -> int:
    from bitnet_edu.errors import printable

    with contextlib.suppress(OSError):
        print(f"{program}: {printable(error)}", file=sys.stderr, flush=True)
    return 2


def prepare_streams() -> None:
    """Any text can be printed; a stream that is closed can't be mistaken for another file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would get this number
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
        raise InputError("standard output is closed: there is nowhere to write to")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 is no reason to fail


def give_up_stdout() -> None:
    """Nothing more is written: what is left in the buffers can't fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def text_input() -> Any:
    """Standard input as text, whatever wrote it: bytes that are none become U+FFFD, all line ends
    become line feeds, a byte order mark goes. InputError if it is closed."""
    if sys.stdin is None:
        raise InputError("standard input is closed: there is nothing to read")
    if hasattr(sys.stdin, "reconfigure"):
        start = b"" if sys.stdin.isatty() else sys.stdin.buffer.peek(4)
        wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        marked = "utf-8-sig" if start.startswith(codecs.BOM_UTF8) else None
        encoding = "utf-16" if wide else marked
        sys.stdin.reconfigure(encoding=encoding, errors="replace", newline=None)
    return sys.stdin


def build_parser() -> argparse.ArgumentParser:
    from bitnet_edu import __version__

    parser = Parser(
        prog="bitnet-edu",
        description="Run, check and measure BitNet b1.58 models (BitNet from Scratch).",
        epilog="MODEL is `tiny`, the embedded model (default), a folder with config.json, "
        "a .gguf file, or a name on the hub such as microsoft/bitnet-b1.58-2B-4T.",
    )
    parser.add_argument("--version", action="version", version=f"bitnet-edu {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = add_verb(verbs, chat, "bitnet-edu chat", "bitnet-edu chat --system 'Be brief.'")
    add_model(verb)
    verb.add_argument("--system", metavar="TEXT", help="what the model is told before you speak")
    add_sampling(verb, tokens=512)
    add_head(verb)

    verb = add_verb(
        verbs,
        generate,
        "bitnet-edu generate --prompt 'Once upon a time' -n 40",
        "bitnet-edu generate --chat --prompt 'What is a ternary weight?' --json",
        "cat question.txt | bitnet-edu generate --chat",
    )
    add_model(verb)
    verb.add_argument("--prompt", metavar="TEXT", help="the text to continue (default: stdin)")
    verb.add_argument("--chat", action="store_true", help="the prompt is a question: answer it")
    add_sampling(verb, tokens=128)
    add_head(verb)
    add_json(verb)

    verb = add_verb(
        verbs,
        verify,
        "bitnet-edu verify",
        "bitnet-edu verify path/to/model --tokens 20 --layers",
        "bitnet-edu verify --json | python -m json.tool",
    )
    add_model(verb)
    verb.add_argument(
        "--tokens", type=int, default=200, metavar="N", help="to generate (default 200)"
    )
    verb.add_argument("--layers", action="store_true", help="also compare layer by layer")
    add_packing(verb)
    add_head(verb)
    add_json(verb)

    verb = add_verb(verbs, info, "bitnet-edu info", "bitnet-edu info model.gguf --json")
    add_model(verb)
    add_json(verb)

    verb = add_verb(
        verbs,
        convert,
        "bitnet-edu convert tiny tiny.gguf",
        "bitnet-edu convert microsoft/bitnet-b1.58-2B-4T-gguf my-bitnet",
        "bitnet-edu convert my-bitnet my-master --to hf-bf16",
        "bitnet-edu convert my-bitnet my-small-bitnet --to base3",
        "bitnet-edu convert random-2b4t speed-test",
    )
    verb.add_argument("source", metavar="SRC", help="a MODEL, or random-2b4t")
    verb.add_argument("destination", metavar="DST", help="a new folder, or a new .gguf file")
    default = "(default: gguf-i2s for a .gguf file, else hf-packed)"
    form = f"hf-packed, hf-bf16, gguf-i2s, or base3, this package's own {default}"
    verb.add_argument("--to", metavar="FORMAT", help=form)
    block = "I2_S layout of SRC if that is a GGUF file, else of DST: 128 (default) or 64 (Arm)"
    verb.add_argument("--i2s-block", type=int, metavar="N", help=block)
    add_json(verb)

    verb = add_verb(
        verbs,
        download,
        "bitnet-edu download",
        "bitnet-edu download microsoft/bitnet-b1.58-2B-4T-gguf",
        "HF_ENDPOINT=https://a.mirror bitnet-edu download",
    )
    model = "default: microsoft/bitnet-b1.58-2B-4T, 1.2 GB"
    verb.add_argument("repo", nargs="?", metavar="REPO", help=model)
    revision = "branch, tag or commit (default: the one that the book speaks of)"
    verb.add_argument("--revision", metavar="REV", help=revision)
    add_json(verb)

    verb = add_verb(verbs, app, "bitnet-edu app", "bitnet-edu app path/to/model --port 9000")
    add_model(verb, ternarize=False)
    verb.add_argument("--port", type=int, default=8866, metavar="N", help="default: 8866")
    verb.add_argument("--no-browser", action="store_true", help="do not open a browser")

    verb = add_verb(
        verbs,
        bench,
        "bitnet-edu bench",
        "bitnet-edu bench --shape 2b4t --against transformers",
        "bitnet-edu bench --shape 2b4t --contexts 64 4000 --cache float16 --threads 1 --json",
    )
    add_model(verb)
    verb.add_argument("--shape", choices=("2b4t",), help="random weights of this shape instead")
    verb.add_argument("--threads", type=int, metavar="N", help="default: the physical cores")
    verb.add_argument("--against", choices=("transformers",), help="measure it too, by turns")
    verb.add_argument("--repeats", type=int, default=5, metavar="N", help="default 5")
    verb.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[64, 512, 2048],
        metavar="N",
        help="tokens in the KV cache while decoding (default 64 512 2048)",
    )
    verb.add_argument(
        "--cache", choices=("float32", "float16"), default="float32", help="what the cache holds"
    )
    add_packing(verb)
    verb.add_argument("--profile", action="store_true", help="also show where the time goes")
    verb.add_argument(
        "--guess", action="store_true", help="also what guessing ahead brings, for kinds of text"
    )
    add_head(verb)
    add_json(verb)

    verb = add_verb(
        verbs,
        evaluate,
        "bitnet-edu evaluate",
        "bitnet-edu evaluate path/to/model --questions 20 --json",
    )
    add_model(verb)
    verb.add_argument(
        "--questions",
        type=int,
        default=200,
        metavar="N",
        help="at most, of every category (default 200)",
    )
    add_json(verb)

    verb = add_verb(
        verbs,
        train,
        "bitnet-edu train facts.jsonl --from tiny --out my-tiny",
        "bitnet-edu train diary.txt --out diary --steps 2000",
        "bitnet-edu train --out small --steps 500 --json",
        "torchrun --nproc-per-node 2 -m bitnet_edu.cli train diary.txt --out diary",
    )
    corpus = "a UTF-8 text file, or JSONL (default: the book's own corpus)"
    verb.add_argument("corpus", nargs="?", metavar="CORPUS", help=corpus)
    verb.add_argument("--out", required=True, metavar="FOLDER", help="a new folder for the model")
    start = "start from this MODEL: its weights, shape and tokenizer (default: random weights)"
    verb.add_argument("--from", dest="start", metavar="MODEL", help=start)
    steps = "batches to learn from (default 1000; 250 with --from)"
    verb.add_argument("--steps", type=int, metavar="N", help=steps)
    rows = "in a batch (default: as many as make 2048 tokens)"
    verb.add_argument("--rows", type=int, metavar="N", help=rows)
    length = "tokens in a row (default: 128, or what the longest conversation needs)"
    verb.add_argument("--length", type=int, metavar="N", help=length)
    share = "share of the documents that is never learned, to measure with (default 0.1)"
    verb.add_argument("--held-out", type=float, metavar="SHARE", help=share)
    rate = "its peak (default 0.002; 0.001 with --from)"
    verb.add_argument("--learning-rate", type=float, metavar="RATE", help=rate)
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    verb.add_argument("--threads", type=int, metavar="N", help="default: torch's choice")
    verb.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is"
    )
    resume = "go on with the training of these same options that was cut off"
    verb.add_argument("--resume", action="store_true", help=resume)
    add_json(verb)

    add_json(add_verb(verbs, doctor, "bitnet-edu doctor"))
    return parser


def add_verb(verbs: Any, run: Callable[[argparse.Namespace], int], *examples: str) -> Parser:
    """A verb with the name of its function; the docstring's first line is its help."""
    text = inspect.getdoc(run)
    verb = verbs.add_parser(
        run.__name__,
        help=text.splitlines()[0].split(". ")[0].removesuffix("."),
        description=text,
        epilog="examples:\n  " + "\n  ".join(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(run=run)
    return verb


def add_model(verb: Parser, ternarize: bool = True) -> None:
    verb.add_argument("model", nargs="?", default="tiny", metavar="MODEL", help="default: tiny")
    dense = "take dense weights too, and round them to ternary"
    if ternarize:
        verb.add_argument("--ternarize", action="store_true", help=dense)


def add_sampling(verb: Parser, tokens: int) -> None:
    most = f"most tokens to make (default {tokens})"
    verb.add_argument("-n", "--max-new-tokens", type=int, default=tokens, metavar="N", help=most)
    verb.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default): always the best token",
    )
    verb.add_argument("--top-k", type=int, metavar="K", help="choose among the K best tokens")
    verb.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="choose among the best that make up this share, 0 to 1",
    )
    verb.add_argument("--seed", type=int, metavar="S", help="the same seed, the same text")
    verb.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    verb.add_argument(
        "--no-guess",
        action="store_true",
        help="one token a step, never several guessed ahead: the same text, often slower",
    )


def add_packing(verb: Parser) -> None:
    packings = ("auto", "2bit", "base3")
    verb.add_argument("--packing", choices=packings, default="auto", help="of ternary weights")


def add_head(verb: Parser) -> None:
    half = "screened: the same tokens from half the head's bytes, for a copy in memory"
    verb.add_argument("--head", choices=("auto", "exact", "screened"), default="auto", help=half)


def add_json(verb: Parser) -> None:
    verb.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    from bitnet_edu.generate import require_request
    from bitnet_edu.sampling import Sampling

    Sampling(args.temperature, args.top_k, args.top_p, args.seed)  # before a model is loaded
    require_request(args.max_new_tokens)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    return {name: getattr(args, name) for name in names} | {"guess": not args.no_guess}


def print_json(value: dict[str, Any]) -> None:
    """One object, in ASCII, without lone surrogates (a path may hold bytes that are no text)."""
    from bitnet_edu.tokenizer import clean_text

    print(json.dumps(json.loads(clean_text(json.dumps(value, ensure_ascii=False), "JSON"))))


def console() -> Any:
    """rich's console: colours and width of the terminal, neither of them in a pipe."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            raise  # for `main` to see; rich's own way out is status 1

    return Quiet(highlight=False, width=None if sys.stdout.isatty() else 160)


# --- The verbs -----------------------------------------------------------------------------------


def chat(args: argparse.Namespace) -> int:
    """Talk to a model. Ctrl-C stops the answer, not the chat; /help lists the commands."""
    import bitnet_edu
    from bitnet_edu.terminal import Terminal

    options = sampling_of(args)
    text_input()
    model = bitnet_edu.load(args.model, ternarize=args.ternarize)
    model.settings = replace(model.settings, head=args.head)
    session = bitnet_edu.ChatSession(model, args.system)
    return Terminal(session, args.model, options, console()).run()


def generate(args: argparse.Namespace) -> int:
    """Continue a text. The prompt goes in as it is; --chat puts it into the chat template.

    In the JSON object, tokens_per_second counts from the first token on; steps are calls of the
    engine, fewer than tokens where some of those guessed ahead were accepted.
    """
    import bitnet_edu
    from bitnet_edu.guess import as_guesser
    from bitnet_edu.terminal import Clock

    options, prompt = sampling_of(args), args.prompt
    if prompt is None:
        if text_input().isatty():
            raise InputError("there is no prompt: give one with --prompt, or pipe a text in")
        prompt = sys.stdin.read()
    model = bitnet_edu.load(args.model, ternarize=args.ternarize)
    model.settings = replace(model.settings, head=args.head)
    tokenizer = model.require_tokenizer()
    if args.chat:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("the prompt is empty, and this tokenizer has no start token: write some")
    made, text, clock = [], "", Clock()
    options["guess"] = guesser = as_guesser(options["guess"])
    for piece in model.stream(ids, made=made, **options):
        clock.see(len(made))
        text += piece
        if not args.json:
            print(piece, end="", flush=True)
    clock.see(len(made))
    if args.json:
        said = {"text": text, "ids": made, "prompt_ids": ids}
        said["tokens_per_second"] = clock.tokens_per_second
        print_json(said | guesser.counts())
    else:
        print()
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compare this engine, the NumPy reference and transformers on the same tokens.

    The three hold a conversation of N generated tokens. Where an activation sits on a rounding
    boundary their int8 codes may differ by a step: each such flip is located and checked. Exit
    status 1 if any other difference is found. Needs torch and transformers.
    """
    from bitnet_edu.proof.report import render
    from bitnet_edu.proof.report import verify as compare

    mode = {"packing": args.packing, "head": args.head}
    report = compare(args.model, args.tokens, ternarize=args.ternarize, **mode)
    if args.json:
        print_json(report.as_json())
    else:
        console().print(render(report, args.layers))
    return 0 if report.ok else 1


def info(args: argparse.Namespace) -> int:
    """Show what a model is made of: shapes, dtypes, sizes, the share of zeros in each layer."""
    from bitnet_edu.info import describe, render

    description = describe(args.model, ternarize=args.ternarize)
    if args.json:
        print_json(description)
    else:
        console().print(render(description))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Write a model in another format: safetensors, packed or bf16, or bitnet.cpp's GGUF.

    Ternary codes, scales and norms stay exactly the same. DST appears when all is written, and
    never replaces anything. SRC random-2b4t stands for random weights of the full 2B4T shape, to
    measure with. hf-bf16 holds master weights that ternarize to the same model.
    """
    from bitnet_edu.files.convert import convert as write

    done = write(args.source, args.destination, args.to, args.i2s_block)
    path = Path(args.destination)
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    if args.json:
        print_json({"path": str(path), "bytes": size, **done._asdict()})
        return 0
    print(f"{path}: {done.format}, {size:,} bytes")
    for note in done.notes:
        print(f"note: {note}")
    return 0


def download(args: argparse.Namespace) -> int:
    """Fetch a model from the Hugging Face hub into its cache, and print the folder.

    A large file that was cut off continues where it stopped; every file's checksum is checked.
    HF_ENDPOINT (a mirror), HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are respected.
    """
    from bitnet_edu.files.hub import MODEL
    from bitnet_edu.files.hub import download as fetch

    repo = args.repo or MODEL
    folder = fetch(repo, args.revision)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if args.json:
        print_json({"repo": repo, "path": str(folder), "revision": folder.name, "bytes": size})
    else:
        print(folder)
    return 0


def app(args: argparse.Namespace) -> int:
    """Open the explorer in a browser: chat, benchmark, published results, architecture, system.

    Serves on this machine only, until Ctrl-C, and only to who has the token in the address that is
    printed. Needs voila (the extra `ui`).
    """
    try:
        from bitnet_edu.ui.app import serve
    except ModuleNotFoundError as error:
        raise InputError(f"the explorer needs {error.name}: pip install 'bitnet-edu[ui]'") from None
    serve(args.model, args.port, open_browser=not args.no_browser)
    return 0


def bench(args: argparse.Namespace) -> int:
    """Measure decode, prefill and memory, and say how much of this machine's speed is reached.

    A decode step reads every weight once: memory bandwidth, measured in the same run, sets the
    limit. That of a prompt is the processor's int8 arithmetic, measured likewise. On stderr: what
    is being done, and a warning if other programs are at work.
    """
    from bitnet_edu.benchmark import benchmark, busy_warning, render

    result = benchmark(
        args.model,
        ternarize=args.ternarize,
        shape=args.shape,
        threads=args.threads,
        against=args.against,
        repeats=args.repeats,
        contexts=args.contexts,
        cache_dtype=args.cache,
        packing=args.packing,
        head=args.head,
        profile=args.profile,
        guess=args.guess,
        progress=lambda message: print(message, file=sys.stderr),
    )
    if args.json:
        print_json(result)
        if warning := busy_warning(result):
            print(warning, file=sys.stderr)
    else:
        console().print(render(result))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Let a model sit the embedded model's exam: questions and sums that it was never trained on.

    Also what strangers typed, and prompts from outside of its world, where the right answer says
    that it does not know. Whatever the MODEL, the questions are those of tiny's world. On stderr:
    how far it is. In the JSON object each figure has its number of trials.
    """
    import bitnet_edu
    from bitnet_edu.training.evaluate import evaluate as sit
    from bitnet_edu.training.evaluate import render, require_questions

    require_questions(args.questions)
    model = bitnet_edu.load(args.model, ternarize=args.ternarize)
    figures = sit(model, args.questions, progress_line).figures
    if args.json:
        print_json({"model": args.model, **figures})
    else:
        console().print(render(figures, args.model))
    return 0


def progress_line(what: str, done: int, total: int) -> None:
    """On stderr: in a terminal a line that is written over, elsewhere one line when all is done."""
    live = sys.stderr.isatty()
    if live or done == total:
        line = f"{what.replace('_', ' ')}: {done} of {total}"
        print(
            f"\r{line}" if live else line,
            end="" if live and done < total else "\n",
            file=sys.stderr,
            flush=True,
        )


def train(args: argparse.Namespace) -> int:
    """Train a BitNet on a text or on conversations of your own, from random weights or a model.

    CORPUS is a text file, whose paragraphs are documents (those too long for a row are cut), or a
    JSONL file: on each line {"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": ...,
    "response": ...} or {"text": ...}. Of a conversation only the assistant's words are learned. A
    share of the documents is held out, and the loss on it measured before and after. --from tiny
    mixes in tiny's own corpus, so that it forgets nothing.

    FOLDER holds a checkpoint and the log training.csv while it runs, at the end the model: for
    chat, convert, verify, and for transformers. Needs torch (the extra `verify`).
    """
    try:
        from bitnet_edu.training.job import Job, train_job
    except ImportError as error:
        message = f"training needs torch ({error}): pip install 'bitnet-edu[verify]'"
        raise InputError(message) from None
    names = set(Job.__dataclass_fields__)
    options = {name: value for name, value in vars(args).items() if name in names}
    options |= {"out": Path(args.out), "corpus": None if args.corpus is None else Path(args.corpus)}
    try:
        result = train_job(Job(**options))
    except KeyboardInterrupt:
        print("\nstopped: the same command with --resume goes on", file=sys.stderr)
        raise
    if not result.pop("is_first"):
        return 0  # another process of torchrun speaks
    if args.json:
        print_json(result)
        return 0
    print(f"held-out loss {result['held_out_loss_before']:.3f} before,", end=" ")
    print(f"{result['held_out_loss_after']:.3f} after {result['steps']} steps")
    print(f"talk to it: bitnet-edu chat {result['out']}")
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Check whether this machine is ready for the book or the workshop.

    Looks at versions, processor, threads, memory, disk and network, multiplies with every kernel
    that the processor can run, and lets the embedded model answer. Exit status 1 if something
    that the book needs is missing.
    """
    from bitnet_edu.doctor import examine, render

    findings = examine()
    ok = all(finding.status != "bad" for finding in findings)
    if args.json:
        print_json({"ok": ok, "checks": [finding._asdict() for finding in findings]})
    else:
        console().print(render(findings))
    return 0 if ok else 1


def command() -> NoReturn:
    """What the shell calls: `main`, but an interrupt does not wait for what compiles meanwhile."""
    status = main()
    if status == 130:  # all that was begun is tidied up: nothing is lost
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    command()
