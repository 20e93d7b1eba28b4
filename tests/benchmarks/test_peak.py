"""What a command and all that it started weigh together."""

import os
import subprocess
import sys

from benchmarks.peak import Family, processes, pss_bytes, watch

HOLDS = "import time; held = b'x' * {size}; time.sleep({seconds})"


def test_memory_of_children_counts():
    child = HOLDS.format(size=150_000_000, seconds=2)
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"

    found = watch([sys.executable, "-c", parent], every_s=0.1)

    assert found.exit_code == 0
    assert found.wall_s > 2
    assert 150e6 < found.peak.size_bytes < 250e6
    assert "held" in found.peak.parts[0][1]


def test_cpu_seconds_of_children_that_are_gone_count():
    busy = "import time\nwhile time.process_time() < 1.5: pass"
    parent = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {busy!r}]);"

    found = watch([sys.executable, "-c", f"{parent} time.sleep(0.5)"], every_s=0.05)

    assert 1.2 < found.cpu_s < 3


def test_a_process_that_left_its_parent_and_its_session_still_belongs():
    child = HOLDS.format(size=100_000_000, seconds=3)
    started = f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
    middle = f"import subprocess, sys, time; {started}; time.sleep(1)"
    parent = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {middle!r}]);"
    parent += "time.sleep(0.5); held = b'x' * 100_000_000; time.sleep(0.7)"

    found = watch([sys.executable, "-c", parent], every_s=0.1)

    assert found.peak.size_bytes > 200e6


def test_a_command_that_fails_says_so():
    found = watch([sys.executable, "-c", "raise SystemExit(3)"], every_s=0.05)

    assert found.exit_code == 3


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
