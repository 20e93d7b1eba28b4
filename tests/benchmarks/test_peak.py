"""What a command and all that it started weigh together."""

import os
import subprocess
import sys

from benchmarks.peak import Family, processes, pss_bytes, watch

HOLDS = "import time; held = b'x' * {size}; time.sleep({seconds})"


def test_memory_of_children_counts():
    child = HOLDS.format(size=150_000_000, seconds=2)
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"

    code, seconds, peak = watch([sys.executable, "-c", parent], every_s=0.1)

    assert code == 0
    assert seconds > 2
    assert 150e6 < peak.size_bytes < 250e6
    assert "held" in peak.parts[0][1]


def test_a_process_that_left_its_parent_and_its_session_still_belongs():
    child = HOLDS.format(size=100_000_000, seconds=3)
    started = f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
    middle = f"import subprocess, sys, time; {started}; time.sleep(1)"
    parent = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {middle!r}]);"
    parent += "time.sleep(0.5); held = b'x' * 100_000_000; time.sleep(0.7)"

    _, _, peak = watch([sys.executable, "-c", parent], every_s=0.1)

    assert peak.size_bytes > 200e6


def test_a_command_that_fails_says_so():
    code, _, _ = watch([sys.executable, "-c", "raise SystemExit(3)"], every_s=0.05)

    assert code == 3


def test_strangers_do_not_belong():
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        members = {process.pid for process in Family(session=-1).members()}
        known = {process.pid for process in processes()}
    finally:
        stranger.communicate(b"\n")

    assert members == set()
    assert {stranger.pid, os.getpid()} <= known


def test_a_process_that_is_gone_weighs_nothing():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    assert pss_bytes(gone.pid) == 0
