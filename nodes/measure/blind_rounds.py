"""Rounds of a blind test as files: what was shown where, and the votes.

A file is JSON, one object:
    round     its id, also the file's name
    name      what is tested, as the user calls it
    created   seconds since the epoch
    width, height  of all pictures, in pixels
    seed      text that the order follows from
    restarts  how often it was begun anew
    trials    for each: pair (its number), quantized (1: on the left, 2: on the right), pictures ([left, right], as
              ComfyUI's page asks for them), vote (0: cannot tell, 1, 2; null: none yet)
    finished  whether it was ended, after which votes stay
    result    what came out, null before
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...quant_backends.core.errors import SnugError
from .blind_statistics import Result, evaluate

# Below ComfyUI's output folder.
FOLDER = "snug/blind_test"
ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")
CANNOT_TELL, LEFT, RIGHT = 0, 1, 2
VOTES = (CANNOT_TELL, LEFT, RIGHT)

# As ComfyUI's page asks for a picture: filename, subfolder, type.
File = dict[str, str]


class NoSuchRound(SnugError):
    """There is no file of this round, or it is none."""


class Rounds:
    """The rounds in one folder. Its methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()

    def begin(
        self, name: str, seed: str, pairs: Sequence[tuple[File, File]], size: tuple[int, int], trials: int
    ) -> dict[str, Any]:
        """A new round as the page may see it. pairs: (reference, quantized). size: width and height of all pictures.
        seed: anything that the order is to follow from."""
        round_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        found = {
            "round": round_id,
            "name": name,
            "created": time.time(),
            "width": size[0],
            "height": size[1],
            "seed": seed,
            "restarts": 0,
            "trials": _trials(dict(enumerate(pairs)), f"{seed} 0", trials),
            "finished": False,
            "result": None,
        }
        with self._lock:
            self._write(found)
        return shown(found)

    def show(self, round_id: str) -> dict[str, Any]:
        with self._lock:
            return shown(self._read(round_id))

    def vote(self, round_id: str, trial: int, vote: int) -> dict[str, Any]:
        """Notes a vote, in place of one that was there; the last trial's ends the round. trial: counted from 0."""
        with self._lock:
            found = self._read(round_id)
            trials = found["trials"]
            if found["finished"]:
                raise SnugError(
                    "This round has ended, and its votes stay: start it again, or begin another round."
                )
            if not 0 <= trial < len(trials) or vote not in VOTES:
                raise SnugError(f"The vote is for pair {trial + 1} of {len(trials)}, which does not exist.")
            trials[trial]["vote"] = vote
            if all(one["vote"] is not None for one in trials):
                _finish(found)
            self._write(found)
            return shown(found)

    def finish(self, round_id: str) -> dict[str, Any]:
        """Ends a round early."""
        with self._lock:
            found = self._read(round_id)
            if not any(one["vote"] is not None for one in found["trials"]):
                raise SnugError("There is no vote yet: a result needs at least one.")
            _finish(found)
            self._write(found)
            return shown(found)

    def restart(self, round_id: str) -> dict[str, Any]:
        """Forgets the votes and draws the order anew."""
        with self._lock:
            found = self._read(round_id)
            pairs: dict[int, tuple[File, File]] = {}
            for trial in found["trials"]:
                left, right = trial["pictures"]
                pairs[trial["pair"]] = (left, right) if trial["quantized"] == RIGHT else (right, left)
            found["restarts"] += 1
            found["trials"] = _trials(pairs, f"{found['seed']} {found['restarts']}", len(found["trials"]))
            found |= {"finished": False, "result": None}
            self._write(found)
            return shown(found)

    def path(self, round_id: str) -> Path:
        if not ID.fullmatch(round_id):
            raise NoSuchRound(f"{round_id[:40]!r} is no round of a blind test.")
        return self.folder / f"{round_id}.json"

    def _read(self, round_id: str) -> dict[str, Any]:
        try:
            found = json.loads(self.path(round_id).read_text(encoding="utf-8"))
            shown(found)  # that all is there
            return found
        except FileNotFoundError:
            raise NoSuchRound(
                f"The votes of this round ({round_id}.json) are no longer in {FOLDER}: run the workflow with another "
                "round number."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NoSuchRound(
                f"{round_id}.json in {FOLDER} cannot be read ({error}): run the workflow with another round number."
            ) from None

    def _write(self, found: dict[str, Any]) -> None:
        """Whole or as it was."""
        path = self.path(found["round"])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".snug-", suffix=".tmp")
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(found, file, indent=1, ensure_ascii=False)
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except OSError as error:
            raise SnugError(
                f"The votes could not be saved in {FOLDER} of ComfyUI's output folder: {error.strerror or error}. "
                "Make room there."
            ) from error


def _trials(pairs: Mapping[int, tuple[File, File]], seed: str, count: int) -> list[dict[str, Any]]:
    """Without votes. pairs: (reference, quantized) by number."""
    numbers = sorted(pairs)
    return [
        {
            "pair": numbers[place],
            "quantized": side,
            "pictures": list(pairs[numbers[place]] if side == RIGHT else reversed(pairs[numbers[place]])),
            "vote": None,
        }
        for place, side in arrange(seed, len(numbers), count)
    ]


def arrange(seed: str, pairs: int, trials: int) -> list[tuple[int, int]]:
    """(pair, side of the quantized picture) for each trial: every pair as often as the others, give or take one, in an
    order that follows from the seed.

    Sides are drawn independently, as the binomial test supposes; equally many of each would make it wrong.
    """
    chance = random.Random(seed)
    numbers: list[int] = []
    while len(numbers) < trials:
        some = list(range(pairs))
        chance.shuffle(some)
        numbers += some
    return [(number, chance.choice((LEFT, RIGHT))) for number in numbers[:trials]]


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """What the page may see: before the end nothing that tells which is which."""
    trials = found["trials"]
    return {
        "round": found["round"],
        "name": found["name"],
        "file": f"{FOLDER}/{found['round']}.json",
        "width": found["width"],
        "height": found["height"],
        "trials": [trial["pictures"] for trial in trials],
        "votes": [trial["vote"] for trial in trials],
        "finished": found["finished"],
        "result": found["result"],
        "quantized": [trial["quantized"] for trial in trials] if found["finished"] else None,
    }


def _finish(found: dict[str, Any]) -> None:
    found["finished"] = True
    result = count(found["trials"])
    found["result"] = {**asdict(result), "sentence": result.sentence(found["name"])}


def count(trials: Sequence[dict[str, Any]]) -> Result:
    votes = [(trial["vote"], trial["quantized"]) for trial in trials if trial["vote"] is not None]
    right = sum(vote == side for vote, side in votes)
    undecided = sum(vote == CANNOT_TELL for vote, _ in votes)
    return evaluate(right, len(votes) - right - undecided, undecided)
