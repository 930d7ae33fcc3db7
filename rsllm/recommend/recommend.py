"""The verb `rsllm recommend`: what it reads, says and writes."""

from __future__ import annotations

import argparse

import numpy as np
from tabulate import tabulate

from rsllm.errors import require
from rsllm.recommend.choose import chosen
from rsllm.recommend.load import open_ranker
from rsllm.recommend.ranker import Filter
from rsllm.recommend.users import (
    Task,
    make_lists,
    read_histories,
    read_lists,
    read_names,
    write_out,
)
from rsllm.terminal import as_json, notes_on_stderr

SHOWN = ["user_id", "rank", "title", "score", "item_id", "source", "recommender_rank"]


def recommend(arguments: argparse.Namespace) -> None:
    """List items for one history, some users, a file of histories, or every user of the data.

    Raises:
        ConfigError: a model, ranker, item or user that there is not.
        DataError: a file that cannot be read.
    """
    require(arguments.k > 0, f"--k is {arguments.k}; ask for at least 1 item")
    opened, store = open_ranker(arguments.model, arguments.storage, arguments.precision)
    items = opened.items
    histories = None  # of all users
    if arguments.history:
        histories = {"": items.find_all(arguments.history)}
    elif arguments.users:
        histories = opened.pasts(arguments.users)
    elif arguments.histories:
        histories = read_histories(arguments.histories, items, skip=arguments.skip_unknown)
    allowed = Filter(
        include_seen=arguments.include_seen,
        only=read_names(arguments.only, items) if arguments.only else None,
        never=read_names(arguments.never, items) if arguments.never else np.empty(0, np.int32),
    )
    with notes_on_stderr(arguments.json):
        ranker = chosen(opened, store, arguments.ranker)
        print(f"{ranker.name} ranks by {ranker.by} ({ranker.why})", flush=True)
    facts = {"model": ranker.name, "ranks by": ranker.by, "why": ranker.why}
    how = {"allowed": allowed, "histories": histories, "precision": arguments.precision}
    task = Task.of(ranker, arguments.k, **how)
    if histories is not None and not arguments.histories and not arguments.out:
        shown = task.table(ranker, histories)[SHOWN]
        shown = shown.drop(columns="user_id") if arguments.history else shown
        if arguments.json:
            print(as_json({**facts, "lists": shown.to_dict("records")}))
        else:
            print(tabulate(shown.to_dict("list"), headers="keys", floatfmt=".3f"))
        return
    with notes_on_stderr(arguments.json):
        lists = make_lists(task, ranker, store, arguments.workers)
        asked = len(ranker.pasts() if histories is None else histories)
        if short := asked - read_lists(lists)["user_id"].nunique():
            print(f"{short} of {asked} users get no list: nothing is left to recommend")
        if arguments.out:
            write_out(lists, arguments.out)
    place = arguments.out or str(lists)
    print(as_json({**facts, "users": asked - short, "file": place}) if arguments.json else place)
