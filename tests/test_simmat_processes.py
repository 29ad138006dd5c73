"Training the generator in two processes: gradients, weights, log and samples of one process with the joint batch."
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from cemiface.core.settings import changed
from cemiface.data.faceset import FaceSet
from cemiface.generation.training import train_generator
from small import TINY, weights
from test_simmat import SHORT, close, embedder, faces, gradients

JOINT = changed(SHORT, batch_size=8, steps=6, sample_every=3)
HOW = dict(plain=JOINT, pieces=changed(JOINT, accumulate=2, checkpointing=True, identity="class_centre"))
CHILD = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_simmat_processes as t
out, rank = Path(sys.argv[2]), os.environ["RANK"]
reads = {k: t.train(out/k, config) for k, config in t.HOW.items()}
try: t.train(out/"odd", t.changed(t.JOINT, accumulate=3))
except ValueError as e: reads["odd"] = str(e)
(out/f"reads_{rank}.json").write_text(json.dumps(reads))
"""
pytestmark = pytest.mark.slow


class Counted:
    "Images that count how many were looked up."
    def __init__(self, images): self.images, self.shape, self.seen = images, images.shape, []
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        self.seen.append(len(i))
        return self.images[i]


def train(out, config): # how many images each look-up asked for
    plain = faces(25) # an odd number: two processes embed parts of unequal size
    images = Counted(plain.images)
    train_generator(FaceSet(images, plain.labels, plain.subjects, plain.name), embedder(), TINY, config, out, progress=False)
    return images.seen


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, "-c", CHILD, os.path.dirname(__file__), str(out)]
    runs = [subprocess.Popen(command, env=env | {"RANK": k, "LOCAL_RANK": k}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for k in "01"]
    try: results = [run.communicate(timeout=300) for run in runs]
    finally: [run.kill() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    return out


@pytest.mark.parametrize("k", HOW)
def test_two_processes_are_as_one(two, tmp_path, k):
    train(tmp_path, HOW[k])
    assert torch.allclose(gradients(tmp_path), gradients(two/k), atol=1e-5)
    close(weights(tmp_path), weights(two/k))
    logs = [pd.read_csv(d/"log.csv").drop(columns="images_per_s") for d in (tmp_path, two/k)]
    assert list(logs[0]) == list(logs[1])
    np.testing.assert_allclose(*logs, rtol=1e-3, atol=1e-5)
    assert [p.name for p in sorted((two/k/"samples").iterdir())] == ["0000003.png", "0000006.png"]


def test_each_process_reads_its_own_part(two):
    for rank, embedded in ((0, 13), (1, 12)):
        reads = json.loads((two/f"reads_{rank}.json").read_text())
        assert reads["plain"] == [25, embedded]+[4]*(6 if rank else 8) # all of them tell the set; rank 0 reads four faces for each of two sample grids


def test_a_batch_that_does_not_split_is_named_by_both(two):
    for rank in "01":
        assert "batch_size 8 does not split over 2 processes with accumulate=3: choose a multiple of 6" in json.loads((two/f"reads_{rank}.json").read_text())["odd"]
