"""Peak memory: of this process alone, whatever its parent held."""
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cemiface.core import machine
from cemiface.core.machine import peak_rss

CHILD = """
import resource
from cemiface.core.machine import peak_rss
before = peak_rss()
held = bytearray(b"1")*(200*2**20)
del held
print(before, peak_rss(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a child its parent's peak")
def test_a_child_does_not_inherit_its_parents_peak():
    held = bytearray(b"1")*(700*2**20)
    ran = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    before, after, inherited = map(float, ran.stdout.split())
    assert inherited > 700 > after > before + 190 > 240 and peak_rss() > len(held)/2**20   # what Linux's resource usage says would be wrong


def test_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr(machine.Path, "exists", lambda self: False)
    used = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(resource, "getrusage", lambda who: used)
    for platform, unit in (("linux", 2**10), ("darwin", 2**20)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_rss() == used.ru_maxrss/unit
