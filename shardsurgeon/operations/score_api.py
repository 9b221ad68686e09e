"""Calibration, the tools for score files and probes of a server, for notebooks and pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from shardsurgeon.layerwise.settings import Listener, Settings, Tokens
from shardsurgeon.operations import blend, scores
from shardsurgeon.operations.bars import bars
from shardsurgeon.operations.python_calls import AnyPath, as_text, public
from shardsurgeon.operations.reports import BaselineReport
from shardsurgeon.units import parse_size

if TYPE_CHECKING:
    from shardsurgeon.layerwise.estimate import CalibrationEstimate
    from shardsurgeon.layerwise.request import CalibrationReport
    from shardsurgeon.operations.probe_report import ProbeReport

Dtype: TypeAlias = Literal["bfloat16", "float16", "float32", "float64"]

show_scores = public(scores.show_scores)
convert_scores = public(scores.convert_scores)
merge_scores = public(scores.merge_scores)
blend_scores = public(blend.blend_scores)
compare_scores = public(scores.compare_scores)
scores_from_router = public(scores.scores_from_router)
scores_random = public(scores.scores_random)


@public
def scores_from_weights(
    model: AnyPath | None,
    out: AnyPath,
    *,
    criterion: Literal["norm", "aimer"] = "norm",
    family: AnyPath | None = None,
    force: bool = False,
    progress: bool = False,
) -> BaselineReport:
    """Write a score of each expert's weights, of MTP layers too, as a score file.

    criterion: their Euclidean `norm`, or `aimer`: 1 less their mean magnitude over their root mean
    square (arXiv 2603.18492, which prunes where that ratio is high). All experts are read once, a
    piece at a time; progress: show a bar. Raises what `scores_from_router` raises, and FamilyError
    for weights stored in a form that is not read here.

    >>> shardsurgeon.scores_from_weights("fixtures/qwen3_moe", "weights.npz")
    qwen3_moe: weight_l2 of 16 experts in 3 layers
    """
    with bars(progress):
        return scores.scores_from_weights(
            model, out, criterion=criterion, family=as_text(family), force=force
        )


@public
def calibrate(
    model: AnyPath | None,
    dataset: str,
    out: AnyPath,
    *,
    samples: int | None = None,
    max_length: int | None = None,
    seed: int = 42,
    device: str = "cpu",
    dtype: Dtype | None = None,
    batch_size: int | Literal["auto"] = "auto",
    memory: int | str | None = None,
    activation_budget: int | str | None = None,
    extend: AnyPath | None = None,
    share: tuple[int, int] | None = None,
    field: str | None = None,
    pack: bool = False,
    tokens: Tokens = "all",
    skip_invalid: bool = False,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    family: AnyPath | None = None,
    restart: bool = False,
    force: bool = False,
    progress: bool = False,
    on_progress: Listener | None = None,
) -> CalibrationReport:
    """Run samples through a model, layer by layer, and write scores of its experts.

    model: a folder or an address, None for the current folder. dataset: where samples come from,
    comma-separated: `name:n`, `name[subset]:n` or `name(split):n` of the Hub, a folder, or a
    `.jsonl`, `.json`, `.parquet` or `.txt` file. out: the score file, whose ending decides its
    format.

    samples: in all, None for what dataset says, or 512. max_length: tokens that a sample is cut to,
    None for 2048 or less where the model allows less. seed: which records are drawn. device: where
    a layer computes, `cpu`, `cuda` for every GPU, or `cuda:1` for one; every GPU has a process of
    its own. dtype: of the arithmetic, None for the model's own, or float32 on a CPU that is faster
    in it. batch_size: samples that pass a layer together, or `auto`. memory: the most that it may
    take on a device, in bytes or as `"40GB"`, None for what is free. activation_budget: memory for
    what passes from layer to layer, None for half of what is free. extend: a score file whose
    samples are left out and whose sums are added. share: (k, n), every n-th sample from the k-th
    on. field: the field of a record that holds the text. pack: fill every sample up to max_length
    with records, an empty position between them. tokens: which are added up, `all` or those of the
    `assistant`, which the chat template marks. skip_invalid: leave out records that cannot be used,
    which the file counts and lists. tokenizer: a folder, None for the model's own.
    trust_remote_code: whether a tokenizer may run code of the model. family: as for `plan`.
    restart: discard what an earlier run left. force: replace another score file. progress: show a
    bar; on_progress: called often with the layers and tokens that are done.

    Needs `shardsurgeon[calibrate]`. Where `out` is what this very request gave, nothing is run;
    what is finished of an interrupted run is kept for a rerun. Raises children of InputError,
    before the work starts, for what cannot be used, and of WorkError where the work fails.

    >>> with open("chats.txt", "w") as file:
    ...     written = file.write("the cat sat on the mat\\n" * 4)
    >>> report = shardsurgeon.calibrate("fixtures/qwen3_moe", "chats.txt:2", "measured.npz")
    >>> report.samples, report.layers
    (2, 3)
    """
    from shardsurgeon.layerwise import run
    from shardsurgeon.layerwise.request import CalibrationRequest

    request = CalibrationRequest(
        dataset,
        Settings(device, dtype, batch_size, seed),
        samples,
        max_length,
        share,
        extend,
        _nbytes(activation_budget, "activation_budget"),
        field,
        tokenizer,
        trust_remote_code,
        skip_invalid,
        tokens,
        pack,
        _nbytes(memory, "memory"),
    )
    with bars(progress):
        return run.calibrate(
            model,
            request,
            out,
            family=as_text(family),
            restart=restart,
            force=force,
            progress=on_progress,
        )


@public
def estimate_calibration(
    model: AnyPath | None,
    dataset: str | None = None,
    *,
    samples: int | None = None,
    max_length: int | None = None,
    seed: int = 42,
    device: str = "cpu",
    dtype: Dtype | None = None,
    batch_size: int | Literal["auto"] = "auto",
    memory: int | str | None = None,
    activation_budget: int | str | None = None,
    extend: AnyPath | None = None,
    share: tuple[int, int] | None = None,
    field: str | None = None,
    pack: bool = False,
    tokens: Tokens = "all",
    skip_invalid: bool = False,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    family: AnyPath | None = None,
    progress: bool = False,
) -> CalibrationEstimate:
    """What `calibrate` would take with these arguments, here and on other machines.

    Reads headers, runs nothing, writes nothing and needs no torch; where it is installed, the
    samples of a dataset are drawn, else each is taken to have max_length tokens. dataset: None for
    as many samples as are asked for, or 512. The rest is as for `calibrate`, and so is what it
    raises; that one layer does not fit here is `here.problem`.

    >>> report = shardsurgeon.estimate_calibration("fixtures/kimi_k25", samples=64, max_length=128)
    >>> report
    kimi_k25: 64 samples, at most 8,192 tokens
    >>> [machine.machine for machine in report.machines]
    ['1 x H200', '8 x H100', '1 x 24 GB GPU', '64-core CPU']
    """
    from shardsurgeon.layerwise import run
    from shardsurgeon.layerwise.request import CalibrationRequest

    request = CalibrationRequest(
        dataset or "",
        Settings(device, dtype, batch_size, seed),
        samples,
        max_length,
        share,
        extend,
        _nbytes(activation_budget, "activation_budget"),
        field,
        tokenizer,
        trust_remote_code,
        skip_invalid,
        tokens,
        pack,
        _nbytes(memory, "memory"),
    )
    with bars(progress):
        return run.rehearse(model, request, family=as_text(family))


def _nbytes(size: int | str | None, name: str) -> int | None:
    return parse_size(size, name) if isinstance(size, str) else size


@public
def probe(
    url: str,
    prompts: str,
    out: AnyPath,
    *,
    samples: int | None = None,
    against: AnyPath | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = -1,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    max_tokens: int = 2048,
    sampling: Sequence[Mapping[str, Any]] = (),
    detect: float = 0.02,
    seed: int = 42,
    field: str | None = None,
    parallel: int = 32,
    timeout: float = 600.0,
    served_model: str | None = None,
    against_model: str | None = None,
    api_key_env: str | None = None,
    against_key_env: str | None = None,
    restart: bool = False,
    force: bool = False,
    progress: bool = False,
) -> ProbeReport:
    """Ask a server for free answers, count what is wrong with them, and write that as JSON.

    url: of an OpenAI-compatible server, up to `/v1`. prompts: as the dataset of `calibrate`; of a
    conversation the last answer is left out, a text is what a user says. samples: answers to each
    setting, None for what prompts says, or 2000; more than there are records ask them again.
    against: the original's server, which is asked the same, or the file of an earlier probe.
    temperature to max_tokens: the base setting, all of which is sent; sampling: what each other
    setting changes in it, as `[{"min_p": 0.05}]`. detect: the difference of shares that matters;
    where the interval is wider nothing is said to be the same. seed: which records are asked, and
    what the server draws. field: as for `calibrate`. parallel: questions at a time; timeout:
    seconds for one answer. served_model, against_model: where a server has several. api_key_env,
    against_key_env: the environment variables that hold the keys. restart: ask everything
    again, as where another model is served under the same name; force: replace a probe of
    something else, and drop its answers. progress: show a bar.

    Answers are kept beside `out`, as `<name>.answers.jsonl`, those of the original's server as
    `<name>.original.answers.jsonl`; what is there is not asked again. Raises children of
    InputError for what cannot be used, NetworkError where a server fails; the answers stay.

    >>> try:
    ...     shardsurgeon.probe("http://127.0.0.1:8000/v1", "nowhere.jsonl", "probe.json")
    ... except shardsurgeon.InputError as error:
    ...     print(error)
    nowhere.jsonl: there is no such file; check the path
    """
    from shardsurgeon.operations.probe import ProbeRequest
    from shardsurgeon.operations.probe import probe as asked
    from shardsurgeon.operations.prompts import Sampling

    request = ProbeRequest(
        prompts,
        samples,
        Sampling(temperature, top_p, top_k, min_p, repetition_penalty, max_tokens),
        sampling,
        against,
        detect,
        seed,
        parallel,
        timeout,
        field,
        served_model,
        against_model,
        api_key_env,
        against_key_env,
    )
    with bars(progress):
        return asked(url, request, out, restart=restart, force=force)
