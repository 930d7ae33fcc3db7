"""The Ray Data pipeline: raw files to a prepared folder, in five passes of bounded memory.

    read      chunks of the raw files -> clean interactions, dealt out to groups of users
    order     each group: by user and time, duplicates dropped
    survey    each group: its users and items, until the k-core filter drops no more
    write     each group: numbers, splits, windows -> events and training rows
    hold out  each split: rows by user, candidate sets

The shuffle by user between the first two goes through files: every pass is a map whose results
are a few numbers, titles or rejected lines, so neither the driver nor the object store ever holds
interactions.
What is written depends neither on the order of the raw lines nor on the files and chunks they
stand in.
"""

# Axes: E events, U users, I items.

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import feather

from rsllm.config import DataConfig
from rsllm.config.data import plain_of_known
from rsllm.data import account, passes, prepared, sources, synthetic
from rsllm.data.files import Reject
from rsllm.data.hashing import hash_strings
from rsllm.data.interactions import time_cut, user_numbers
from rsllm.data.passes import Job, Users
from rsllm.data.raw import RawItems, read_items, settle_titles, sum_changes, titles_beside
from rsllm.data.sequences import SPLITS, Bools, Catalogue, split_sizes
from rsllm.data.tables import chunks_of
from rsllm.errors import ConfigError, DataError
from rsllm.store.artifacts import Store, write_json
from rsllm.terminal import Progress, say

SYNTHETIC_WORLD = {"num_users": 120, "num_items": 60, "length": 16}


def prepare(
    config: DataConfig,
    store: Store,
    fetch: Callable[[str], Path],
    start_ray: Callable[[], object] = lambda: None,
) -> Path:
    """Return the prepared folder of `config`, made unless the store has it.

    Args:
        config: what to prepare, and how.
        store: where the folder is kept; under a URI it is made on this node alone.
        fetch: gives the raw folder of a named data set.
        start_ray: called if there is something to make; by default Ray must be initialised.

    Raises:
        ConfigError: no such source, or nothing in it that could be read.
        DataError: broken raw lines, too few titles, or a split without rows.
    """
    with raw_location(config, fetch) as location:
        data = sources.find(location, config.table, config.layout)
        config = _with_split(config, data)
        files = {"interactions": data.interactions, "items": data.items}
        hashes = {kind: {f.name: f.sha256() for f in group} for kind, group in files.items()}
        named = plain_of_known(config) if data.known else data.key_of(config)
        inputs = {"config": named, "raw": hashes}
        rejects = store.root / "rejects" / f"{store.path('data', inputs).name}.jsonl"

        def make(folder: Path) -> None:
            for name, settings in data.found.items():
                print(f"{name} is read as {settings}", flush=True)
            raw = [*data.interactions, *data.items]
            mebibytes = sum(file.system.size(file.path) for file in raw) / 2**20
            say(f"preparing {config.source}: {len(raw)} files, {mebibytes:,.1f} MiB")
            start_ray()
            _configure_ray_data(here=store.remote is not None)
            _run(Job(config, data, folder), rejects)

        return store.get("data", inputs, make)


@contextmanager
def raw_location(config: DataConfig, fetch: Callable[[str], Path]) -> Iterator[str]:
    """Yield the place of `config.source`'s raw files, which are made or fetched where need be.

    Raises:
        ConfigError: no such source.
    """
    source = Path(config.source).expanduser()
    if config.source == "synthetic":
        with tempfile.TemporaryDirectory() as world:
            synthetic.write_world(Path(world), **SYNTHETIC_WORLD, seed=config.seed)
            yield world
    elif "://" in config.source:
        yield config.source
    elif source.exists():
        yield str(source.absolute())
    elif len(source.parts) > 1 or source.suffix:
        raise ConfigError(f"data.source {config.source} is no file or folder with raw data")
    else:
        yield str(fetch(config.source))


def _with_split(config: DataConfig, data: sources.RawData) -> DataConfig:
    """Return the config with the split of the source, unless the user chose one."""
    if config.split == "auto":
        return replace(config, split=data.layout.split)
    has_split = "split" in data.layout.interactions.columns
    if config.split == "leave-one-out" or has_split == (config.split == "given"):
        return config
    if has_split:
        raise ConfigError(f"data.source {config.source} brings its own split; set data.split=given")
    raise ConfigError(
        f"data.source {config.source} does not say a split; name its column with data.table.split"
    )


def _run(job: Job, listed: Path) -> None:
    """Run all passes; `listed` takes the rejected lines."""
    job.scratch.mkdir()
    items, rejects, span, counts = _read(job)
    account.refuse(job, items, rejects, counts, listed)
    if not counts["used"]:
        raise DataError(f"{job.data.interactions[0].name} has no usable row; is it the right file?")
    groups = range(job.config.num_shards)
    order = partial(passes.order, job, hash_strings(items.ids, job.config.seed))
    counts.update(_total(_each("sort", order, groups)))
    kept_I = _core(job, len(items.ids), span, counts)
    users = _number_users(job, span)
    number_I = np.where(kept_I, kept_I.cumsum() - 1, -1).astype(np.int32)
    counts.update(_total(_each("write", partial(passes.write, job, number_I, users), groups)))
    catalogue = _write_items(job, items, kept_I)
    counts.update(_total(_each("candidates", partial(passes.hold_out, job, catalogue), SPLITS[1:])))
    _check_splits(counts, job.config)
    shutil.rmtree(job.scratch)
    if rejects:
        shutil.copy(listed, job.folder / "rejects.jsonl")
    facts = account.facts_of(job, items, catalogue, users, counts)
    write_json(job.folder / prepared.COUNTS, facts)
    print(account.describe(facts), flush=True)


def _read(job: Job) -> tuple[RawItems, list[Reject], tuple[int, int], Counter[str]]:
    """Deal out the interactions: the catalogue, rejected lines, first and last time, counts."""
    layout = job.data.layout
    tasks = list(enumerate(chunks_of(job.data.interactions, layout.interactions)))
    if layout.items:
        items = read_items(job.data.items, layout.items)
    else:
        titles = Counter[tuple[str, ...]]()
        count = partial(titles_beside, table=layout.interactions)
        for counted in _each("titles", lambda task: [*count(task[1]).items()], tasks):
            titles.update({tuple(texts): number for texts, number in counted})
        items = settle_titles(titles, layout.interactions)
    work = partial(passes.read, job, pa.array(items.ids, pa.string()))
    rejects, counts, before = [*items.rejects], Counter[str](), Counter[str]()
    times: list[int] = []
    changes = [items.changes]
    for (_, chunk), result in zip(tasks, _each("read", work, tasks), strict=True):
        name = chunk.file.name
        for line, *fault in result.pop("rejects"):
            rejects.append(Reject(name, before[name] + line + 1, *fault))
        changes.append(result.pop("changes"))
        before[name] += result["lines"]
        times += result.pop("times")
        counts.update(result)
    items = replace(items, changes=sum_changes(changes))
    return items, rejects, (min(times, default=0), max(times, default=0)), counts


def _core(job: Job, num_items: int, span: tuple[int, int], counts: Counter[str]) -> Bools:
    """Return the items that stay: in a k-core all users and items have enough interactions."""
    config, kept_I = job.config, np.ones(num_items, bool)
    groups, before = range(config.num_shards), counts["used"] - counts["below_min_rating"]
    while True:
        left = _total(_each("count users", partial(passes.survey, job, kept_I, span), groups))
        size_I = sum(_survey(job, group)["items_I"] for group in groups)
        weak_I = kept_I & (size_I < config.min_item_events)
        if not weak_I.any() or not left["events"]:
            break
        kept_I &= ~weak_I
    counts["outside_core"] = before - counts["duplicates"] - left["events"]
    if not left["events"]:
        raise DataError(
            f"no interaction is left of {counts['used']:,}:"
            f" {counts['below_min_rating']:,} are rated below data.min_rating ="
            f" {config.min_rating:g}, and {counts['outside_core']:,} belong to users or items with"
            f" fewer than data.min_user_events = {config.min_user_events} or"
            f" data.min_item_events = {config.min_item_events}; lower these"
        )
    return kept_I


def _survey(job: Job, group: int) -> Any:
    return np.load(job.scratch / f"survey-{group}.npz", allow_pickle=False)


def _number_users(job: Job, span: tuple[int, int]) -> Users:
    """Number the users, write their table, and say what splits them."""
    config, groups = job.config, range(job.config.num_shards)
    tables = [feather.read_table(job.scratch / f"users-{group}") for group in groups]
    users = pa.concat_tables(tables).combine_chunks()
    surveys = [_survey(job, group) for group in groups]
    first_U = np.concatenate([survey["first_U"] for survey in surveys])
    number_U = user_numbers(first_U, users["hash"].to_numpy(), first_U >= 0)
    kept = np.flatnonzero(number_U >= 0)
    kept = kept[number_U[kept].argsort()]
    columns = [np.arange(len(kept), dtype=np.int32), users["id"].take(kept).combine_chunks()]
    prepared.write_table(job.folder / prepared.USERS, "users", columns)
    split_U = users["split"].to_numpy()[kept].astype(np.int32)
    if config.split == "user":
        sizes = split_sizes(len(kept), config.train_share)
        split_U = np.repeat(np.arange(3, dtype=np.int32), [sizes[split] for split in SPLITS])
    bins = sum(survey["bins"] for survey in surveys)
    shares = (config.train_share, (1 + config.train_share) / 2)
    cuts = [time_cut(bins, share, *span) for share in shares]
    ends = np.cumsum([len(survey["first_U"]) for survey in surveys])[:-1]
    return Users(np.split(number_U, ends), split_U, (cuts[0], cuts[1]))


def _write_items(job: Job, items: RawItems, kept_I: Bools) -> Catalogue:
    config, kept = job.config, np.flatnonzero(kept_I)
    ids, titles = ([names[i] for i in kept] for names in (items.ids, items.titles))
    files = [job.scratch / f"trained-{group}.npy" for group in range(config.num_shards)]
    counts_I = np.sum([np.load(file, allow_pickle=False) for file in files], axis=0)
    catalogue = Catalogue.of(titles, counts_I, cold=config.cold_items == "text-only")
    distinct, needed = len(catalogue.representatives), config.window + config.num_candidates
    if distinct < needed and config.candidates != "full":
        raise DataError(
            f"{distinct} distinct titles are too few for data.window = {config.window} and"
            f" data.num_candidates = {config.num_candidates}, which need {needed}; lower them"
        )
    prepared.write_items(job.folder / prepared.ITEMS, ids, titles, catalogue)
    return catalogue


def _check_splits(counts: Counter[str], config: DataConfig) -> None:
    for split in SPLITS:
        if not counts[f"{split}.kept"]:
            raise DataError(
                f"the {split} split is empty: of {counts[f'{split}.seen']:,} rows"
                f" {counts[f'{split}.short_history']:,} have a history shorter than"
                f" data.min_history = {config.min_history}, and {counts[f'{split}.cold_target']:,}"
                " a target that no training row holds; lower data.min_history, give more users or"
                f" change data.train_share = {config.train_share}"
            )


def _configure_ray_data(*, here: bool) -> None:
    """Quiet, in the order of the tasks and, on demand, on this node only.

    Raises:
        ConfigError: this node has no CPUs for it.
    """
    import ray

    from rsllm.compute.start import quiet_ray_data

    context, node = quiet_ray_data(), ray.get_runtime_context().get_node_id()
    if here and not any(n["NodeID"] == node and n["Resources"].get("CPU") for n in ray.nodes()):
        raise ConfigError(
            "under a URI data is prepared on the driver's own node, where Ray has no CPUs; start it"
            " with --num-cpus"
        )
    context.execution_options.label_selector = {"ray.io/node-id": node} if here else None
    context.execution_options.preserve_order = True


def _each(label: str, work: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
    """Run `work` on every task with Ray Data; the results (of JSON) in the order of the tasks."""
    import ray.data

    def attempt(row: dict[str, Any]) -> dict[str, str]:
        try:
            return {"result": json.dumps(work(tasks[row["id"]])), "error": ""}
        except DataError as error:  # Ray would hand it on without its type
            return {"result": "", "error": str(error)}

    rows = ray.data.range(len(tasks), override_num_blocks=max(1, len(tasks))).map(attempt)
    for row in Progress(rows.iter_rows(), label, total=len(tasks), unit=" parts"):
        if row["error"]:
            raise DataError(row["error"])
        yield json.loads(row["result"])


def _total(results: Iterable[dict[str, int]]) -> Counter[str]:
    return sum(map(Counter, results), Counter[str]())
