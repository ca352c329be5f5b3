"""Files of proposals that are damaged or hostile end in a message and run nothing."""

import json
import os
import pickle
import pickletools
import random
import signal
from contextlib import contextmanager

import numpy as np
import pytest

from d2proposals.engine import bad_input_in_one_line
from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.evaluation.proposal_runs import read_run
from d2proposals.files.annotation_file import register_annotation_file
from d2proposals.files.conversion import FORMATS, write_proposals
from tests.tools.proposal_commands import EVALUATE, perfect

NUM_MUTANTS = 2000


@contextmanager
def time_limit(seconds):
    """A hang becomes an error."""

    def stop(*_):
        raise TimeoutError(f"not done within {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run_all(path, gt_name):
    """All that the command does with a file, without its printing: a result or one line."""
    try:
        with bad_input_in_one_line():
            ground_truth = load_ground_truth(gt_name, with_masks=True)
            run = read_run(str(path), ground_truth)
            for kind in ("box", "mask") if run.has_masks else ("box",):
                result = EVALUATE["measure_run"](run, ground_truth, (1, 10), {1}, kind, "")
                assert all(np.isfinite(x) for x in result.metrics.values())
    except SystemExit as stop:
        line = str(stop)
        assert line.startswith("Error: ") and "\n" not in line and len(line) < 1500, line
        return line
    return run.faults


def swap_types(content, generator):
    """A JSON value with one of its parts replaced by something of another type."""
    parts = []

    def walk(value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            parts.append((value, key))
            if isinstance(item, (dict, list)):
                walk(item)

    walk(content)
    value, key = generator.choice(parts)
    odd = [None, True, -1, 1e400, 10**30, "x", [], {}, [[]], float("nan"), {"counts": 1}, "\ud800"]
    value[key] = generator.choice(odd)
    return json.dumps(content).encode()


def mutate(data, is_json, generator):
    """One mutant of a file's content."""
    kind = generator.choice(("cut", "flip", "splice", "types" if is_json else "flip"))
    if kind == "cut":
        return data[: generator.randrange(len(data))]
    if kind == "types":
        return swap_types(json.loads(data), generator)
    data = bytearray(data)
    if kind == "flip":
        for _ in range(generator.choice((1, 1, 2, 8))):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    else:
        start, length = generator.randrange(len(data)), generator.randrange(40)
        other = generator.randrange(len(data))
        data[start : start + length] = data[other : other + generator.randrange(40)]
    return bytes(data)


@pytest.mark.parametrize("format_name", FORMATS)
def test_mutated_files_end_in_a_message_or_a_warning(gt, tmp_path, format_name):
    """Never a traceback, a hang or a crash."""
    gt_name = register_annotation_file(gt)
    images = load_ground_truth(gt_name).images
    with_masks = format_name in ("coco", "sam", "d2proposals")
    whole = tmp_path / "whole"
    write_proposals(whole, perfect(with_masks), format_name, images)
    files = sorted(whole.iterdir()) if whole.is_dir() else [whole]
    originals = [file.read_bytes() for file in files]
    if format_name in ("detectron2", "mmdet2", "mmdet3"):
        # Old protocols have instructions of their own.
        originals += [pickle.dumps(pickle.loads(originals[0]), protocol) for protocol in range(3)]
    generator = random.Random(format_name)
    mutant = tmp_path / "2.json"
    num_errors = 0
    with time_limit(240):
        for _ in range(NUM_MUTANTS // len(FORMATS) + 1):
            mutant.write_bytes(mutate(generator.choice(originals), with_masks, generator) or b" ")
            num_errors += isinstance(run_all(mutant, gt_name), str)
    # Some mutants only change a number; most do not pass.
    assert NUM_MUTANTS // len(FORMATS) * 0.3 < num_errors


def test_a_file_without_ids_is_named(gt, tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"boxes": [], "objectness_logits": []}))
    assert "lacks ids" in run_all(path, register_annotation_file(gt))


def bomb(depth=60):
    """A pickle of a tuple whose hash takes 2^depth steps, as a key."""
    doubled = b"".join(pickle.BINPUT + b"\x01" + pickle.BINGET + b"\x01" + pickle.TUPLE2
                       for _ in range(depth))  # fmt: skip
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + b"K\x01" + doubled + b"K\x01" + b"s."


class Runs:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def hostile(folder):
    name = b"cdetectron2.structures.boxes\nBoxMode\n"
    yield pickle.dumps({"ids": [Runs(folder)], "boxes": [], "objectness_logits": []})
    yield pickle.dumps([Runs(folder)], 0)
    yield b"\x80\x02cos\nmkdir\n(V" + folder.encode() + b"\ntR."
    yield b"\x80\x02cbuiltins\neval\n(V__import__('os').mkdir('" + folder.encode() + b"')\ntR."
    yield b"\x80\x02" + name + b"}(V__call__\nNtb."  # attributes of the stand-in itself
    yield b"\x80\x02cnumpy\ndtype\nN}(V__init__\nNu\x86b."
    yield b"\x80\x02]r\xff\xff\xff\x7f."  # a memo of two thousand million entries
    yield b"\x80\x02]" + b"r\xff\xff\xff\xff."
    yield bomb()
    yield bomb().replace(b"s.", b"\x85\x91.")  # in a frozenset
    yield b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"x."  # bytes of an exabyte
    yield b"\x80\x04\x95" + b"\xff" * 8 + b"."
    yield b"\x80\x02cnumpy\ndtype\n(VO\ntR."
    yield b"\x80\x02P5\n."
    yield b"\x80\x02\x82\x05."
    yield b"(" * 100_000 + b"t" * 100_000 + b"."
    yield b"\x80\x02\x8b\xff\xff\xff\x7f1."


def test_hostile_pickles_run_nothing(gt, tmp_path):
    folder = tmp_path / "made"
    gt_name = register_annotation_file(gt)
    path = tmp_path / "a.pkl"
    with time_limit(60):
        for data in hostile(str(folder)):
            path.write_bytes(data)
            line = run_all(path, gt_name)
            assert isinstance(line, str), pickletools.genops(data)
            assert not folder.exists()
    # The reader itself is as it was.
    write_proposals(path, perfect(False), "detectron2")
    assert run_all(path, gt_name) == []
