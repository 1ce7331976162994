"""Runs scripts in forks of one process that has imported torch: many processes for the price of one import."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

# A job is a line of JSON on standard input, its outcome one on standard output. What the job prints goes to files,
# since compiled code prints too. A job that hangs is ended by its own alarm.
SERVER = """
import json, os, signal, sys, tempfile, traceback
import torch, {imports}
for line in sys.stdin:
    script, arguments, seconds = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            signal.alarm(seconds)
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.argv[1:] = arguments
            code = 1
            try:
                exec(compile(script, "job", "exec"), {{"__name__": "__main__"}})
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read().decode(errors="replace"))[1] for file in (out, err)]
    print(json.dumps([code, *texts]), flush=True)
"""


@dataclass
class Forks:
    jobs: IO[str]
    outcomes: IO[str]

    def run(self, script: str, *arguments: str, seconds: int = 120) -> subprocess.CompletedProcess[str]:
        """Negative return codes are signals."""
        self.jobs.write(json.dumps([script, arguments, seconds]) + "\n")
        self.jobs.flush()
        line = self.outcomes.readline()
        assert line, "the process that forks has died"
        code, out, err = json.loads(line)
        return subprocess.CompletedProcess(arguments, code, out, err)


@contextlib.contextmanager
def forks(imports: str = "sys", **environment: str) -> Iterator[Forks]:
    """`imports`: what the jobs need besides torch, comma separated."""
    command = [sys.executable, "-c", SERVER.format(imports=imports)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | environment) as process:
        assert process.stdin and process.stdout
        yield Forks(process.stdin, process.stdout)
        process.stdin.close()
