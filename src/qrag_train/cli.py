"""The command ``qrag-train``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from qrag_retriever.errors import (
    DatasetError,
    InvalidInputError,
    MissingDependencyError,
    QRAGError,
)
from qrag_retriever.files import sha256_of, whole_file
from qrag_train.data.passages import pooled
from qrag_train.data.sample import FixedSamples, SupportSample, finite
from qrag_train.data.simulator import OBJECTS, PLACES
from qrag_train.data.source import BELONGS, Format, SourceConfig
from qrag_train.run_folder import model_of

# What training.py runs.
TRAINING_COMMANDS = {
    "fit": "Train a model on questions with support annotations.",
    "validate": "Judge a run's best model, or --model.encoder, on its validation questions.",
    "test": "Judge a run's best model, or --model.encoder, on its test questions.",
}
_MADE = 200
_FEW = 50  # questions below which a threshold is mostly luck
_DESCRIPTION = "Train and judge Q-RAG models: retrieval in several steps, learned from annotations."


def evaluate(
    model: str,
    data: str,
    k: int | None = None,
    q_threshold: float | None = None,
    beams: int = 1,
    baselines: bool = False,
    output: str = "evaluation.json",
    trust_remote_code: bool = False,
    seed: int = 0,
    **source: Any,
) -> None:
    """Judge a model: print a table and write the figures to a JSON file.

    Args:
        model: Folder or hub name of a Q-RAG model, or of an embedder, which is then judged as it
            is; the folder of a run stands for the model in it.
        data: File with questions and their support; also simulated:3 (babilong) or a task of
            ruler, such as ruler:niah_multikey_1.
        k: Budget: number of chunks retrieved for a question; left out: the model's own.
        q_threshold: Also judge searches that stop below this Q; left out: the model's own.
        beams: Number of trajectories followed at once; 1: greedy.
        baselines: Also judge one step alone (ordinary dense retrieval), and the embedder that the
            model was trained from.
        output: The JSON file.
        trust_remote_code: Let the model's own code run.
        seed: Of the documents that babilong and ruler make.
        source: What kind of file it is.
    """
    from qrag_retriever.model_choice import resolve_model
    from qrag_train.report import markdown, reports

    _refuse_below_one(k=k, beams=beams)
    file, model = _writable(output), model_of(model)
    judged = resolve_model(model, trust_remote_code=trust_remote_code)
    asked = {"data": data, "k": k, "q_threshold": q_threshold, "beams": beams, "seed": seed}
    about = {"model": model, "fingerprint": judged.fingerprint, **asked, **source}
    about |= {"sha256": sha256_of(Path(data))} if Path(data).is_file() else {}
    about["version"] = version("qrag-retriever")
    rows = []
    for name, samples in read_questions(data, seed=seed, **source).items():
        for row in reports(
            judged,
            samples,
            k,
            q_threshold,
            beams,
            baselines=baselines,
            trust_remote_code=trust_remote_code,
        ):
            rows.append({"data": name, "questions": len(samples), **row})
            with whole_file(file) as new:
                new.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", "utf-8")
    print(markdown(rows))
    print(f"The figures are in {file}.")


def calibrate(
    model: str,
    data: str | list[str],
    target_em: float | None = None,
    k: int | None = None,
    trust_remote_code: bool = False,
    seed: int = 1,
    **source: Any,
) -> None:
    """Choose the Q below which a model stops, on validation questions, and write it into the model.

    Args:
        model: Folder of a Q-RAG model, or of a run, which stands for the model in it.
        data: File with validation questions and their support; also simulated:3 (babilong) or a
            task of ruler, such as ruler:niah_multikey_1. Several of a kind: [a.jsonl,b.jsonl].
        target_em: Choose the fewest steps that reach this Fact-EM; left out: the best Fact-F1.
        k: Budget of a search, which becomes the model's; left out: the model's own.
        trust_remote_code: Let the model's own code run.
        seed: Of the documents that babilong and ruler make: others than those of evaluate.
        source: What kind of file it is.
    """
    from qrag_retriever.model import QRAGModel
    from qrag_train import calibration

    _refuse_below_one(k=k)
    model = model_of(model)
    settings = calibration.model_config(model)  # before a long search
    budget = settings.max_steps if k is None else k
    judged = QRAGModel.from_pretrained(model, trust_remote_code=trust_remote_code)
    files = [data] if isinstance(data, str) else data
    if not files:
        raise DatasetError("No file is given; name at least one with validation questions.")
    sets = [part for file in files for part in read_questions(file, seed=seed, **source).values()]
    samples = [sample for part in sets for sample in part]
    if len(samples) < _FEW:
        warnings.warn(
            f"{len(samples)} questions choose a threshold badly; give {_FEW} or more, other than "
            "those you judge on.",
            stacklevel=2,
        )
    thresholds = calibration.search_thresholds(judged, samples, budget)
    chosen, whole = calibration.choose_threshold(thresholds, target_em), thresholds.lowest
    calibration.write_threshold(model, chosen, budget)
    print(
        f"Without a threshold: Fact-EM {whole.fact_em:.3f}, Fact-F1 {whole.fact_f1:.3f}, "
        f"{whole.steps:.2f} steps.\n"
        f"q_threshold={chosen.q_threshold:.4f} of at most {budget} steps, on {len(samples)} "
        f"questions: Fact-EM {chosen.fact_em:.3f}, Fact-F1 {chosen.fact_f1:.3f}, "
        f"{chosen.steps:.2f} steps. Written into {model}. --target_em chooses by the Fact-EM."
    )


def import_checkpoint(
    source: str,
    target: str,
    encoder: str | None = None,
    checkpoint: Literal["best", "last"] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Convert a checkpoint published with the Q-RAG paper to a model folder.

    Args:
        source: Folder with config.yaml and model_best.pt or model_last.pt.
        target: Folder to write the model to.
        encoder: Folder or hub name of the embedder that was trained; left out: the config's.
        checkpoint: Which of the two; left out: the best if there is one.
        trust_remote_code: Let the embedder's own code run.
    """
    from qrag_retriever.reference import load_reference_checkpoint

    model = load_reference_checkpoint(
        source, encoder, checkpoint=checkpoint, device="cpu", trust_remote_code=trust_remote_code
    )
    print(f"Wrote {model.save_pretrained(target)}.")


def _refuse_below_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InvalidInputError(f"{name}={count} is not allowed; give at least 1.")


def _writable(name: str) -> Path:
    """A file to write to, its folder made, before any work that would be lost."""
    file = Path(name)
    if file.is_dir():
        raise InvalidInputError(f"{file} is a folder; name a file in it.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = not file.exists()
        file.open("a").close()
        if new:
            file.unlink()
    except OSError as error:
        raise InvalidInputError(f"No file can be made at {file}: {error}; name another.") from error
    return file


def read_questions(
    data: str,
    format: Format = "jsonl",
    corpus: str | None = None,
    background: str | None = None,
    sentences: int | list[int] | None = None,
    moves: int = 1,
    places: int = len(PLACES),
    things: int = len(OBJECTS),
    tokens: int | list[int] | None = None,
    words: str | None = None,
    questions: str | None = None,
    pool: bool = False,
    samples: int | None = None,
    seed: int = 0,
) -> dict[str, Sequence[SupportSample]]:
    """Questions to judge a model on, by a name for each set.

    Args:
        data: The file; for babilong also simulated:1 to simulated:5 or simulated:14, for ruler a
            task such as ruler:niah_multikey_1.
        format: Its kind: jsonl (a document per question), corpus (questions on the chunks of
            --corpus), babilong (a bAbI file, hidden in --background), ruler, the official files of
            hotpotqa, musique, 2wiki or squad, or linked (made up from titled passages that name one
            another).
        corpus: The JSONL file with the chunks that all questions share; the format is then corpus.
        background: For babilong and ruler: a folder of books as plain text.
        sentences: For babilong: number of chunks of a document, or several: [50,200,1200].
        moves: For simulated stories: how much more often people move than in bAbI's files.
        places: For simulated stories: number of places, at most 6; where there are few, people meet
            and things change hands more often.
        things: For simulated stories: number of things, at most 3.
        tokens: For ruler: length of the text in tokens, or several: [4096,32768].
        words: For ruler's needles: a file with a word a line.
        questions: For ruler:qa_1 a file of SQuAD's shape, for ruler:qa_2 of HotpotQA's.
        pool: Search the chunks of all questions of the file, not each question's own.
        samples: Number of questions; left out: all of a file, or 200 where documents are made, as
            those of babilong and ruler.
        seed: Of the documents that are made.

    Raises:
        DatasetError: If the file cannot be read or is not as described.
        InvalidInputError: If ``samples`` is below 1.
    """
    _refuse_below_one(samples=samples)
    if corpus is not None and format not in ("jsonl", "corpus"):
        raise DatasetError(
            f"Questions of the format {format} have no corpus; leave --corpus {corpus} out."
        )
    given = {
        "background": background is not None,
        "sentences": sentences is not None,
        "tokens": tokens is not None,
        "words": words is not None,
        "questions": questions is not None,
        "moves": moves != 1,
        "places": places != len(PLACES),
        "things": things != len(OBJECTS),
    }
    for option, is_given in given.items():
        if is_given and format not in BELONGS[option]:
            raise DatasetError(
                f"--{option} belongs to the format {' or '.join(BELONGS[option])}, not to "
                f"{format}; leave it out, or name the format."
            )
    if pool and format in ("babilong", "ruler"):
        raise DatasetError(
            f"--pool: documents of the format {format} share no chunks; leave it out."
        )
    kind = format if corpus is None else "corpus"
    name = Path(data).stem
    common: dict[str, Any] = {"format": kind, "corpus": corpus, "background": background}
    if format == "babilong":
        unit, lengths = "sentences", 60 if sentences in (None, []) else sentences
        common |= {"moves": moves, "places": places, "things": things}
    elif format == "ruler":
        unit, lengths = "tokens", 4096 if tokens in (None, []) else tokens
        common |= {"words": words, "questions": questions}
    else:
        source = finite(SourceConfig(data, **common).open(), samples or _MADE, seed)
        return {name: (pooled(source) if pool else source)[:samples]}
    found: dict[str, Sequence[SupportSample]] = {}
    for length in [lengths] if isinstance(lengths, int) else lengths:
        made = SourceConfig(data, **{**common, unit: (length, length)}).open()
        found[f"{name}, {length} {unit}"] = FixedSamples(made, samples or _MADE, seed)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command and options; left out: those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    format_of_python = warnings.formatwarning
    warnings.formatwarning = _warning  # no place in the code: the reader wrote none of it
    try:
        if arguments and arguments[0] in TRAINING_COMMANDS:
            _training(arguments)
        else:
            _refuse_names_of_fit(arguments)
            _other(arguments)
    except QRAGError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = format_of_python
    return 0


def _warning(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {message}\n"


def _refuse_names_of_fit(arguments: Sequence[str]) -> None:
    """Options that ``fit`` alone has would be taken for a part of ``data``."""
    for argument in arguments:
        if argument.startswith("--data."):
            name = argument.partition("=")[0]
            raise InvalidInputError(f"{name} is an option of fit; here write --{name[7:]}.")


def _training(arguments: list[str]) -> None:
    try:
        from qrag_train.training import run
    except ImportError as error:
        if (error.name or "").startswith("qrag_"):
            raise  # a defect of ours, no missing extra
        raise MissingDependencyError.of("Training", error.name or "more", "train") from error
    run(arguments)


def _other(arguments: list[str]) -> None:
    try:
        from jsonargparse import auto_cli
    except ImportError as error:
        raise MissingDependencyError.of("qrag-train", "jsonargparse", "train") from error
    commands: dict[str, Any] = {
        **{name: _overview(text) for name, text in TRAINING_COMMANDS.items()},
        "evaluate": evaluate,
        "calibrate": calibrate,
        "import": import_checkpoint,
    }
    auto_cli(commands, args=arguments, prog="qrag-train", description=_DESCRIPTION)


def _overview(text: str) -> Callable[[], None]:
    def command() -> None: ...

    command.__doc__ = text
    return command


if __name__ == "__main__":
    sys.exit(main())
