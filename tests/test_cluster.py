"Steps as jobs: of this machine always, of a real Slurm of one machine where it can be started."
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import cloudpickle
import pytest
import torch
from typer.testing import CliRunner

from cemiface.core.settings import changed
from cemiface.study import jobs
from cemiface.cli.app import app
from cemiface.study.profiles import PROFILES
from cemiface.study.study import Study
from cemiface.study.tasks import in_order
from cemiface.study.jobs import Cluster, Jobs, cluster_of, job_folder
from cemiface.core.report import Finding
from cemiface.study.plan import Step
from cemiface.paper.reproduce import reproduce
from cemiface.study.run import run_steps
from small import content
from test_simmat import close

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a job does not find this file
LOCAL = Cluster(kind="local")
SIMMAT = changed(PROFILES["smoke"].simmat, steps=6, batch_size=8)
PROFILE = changed(PROFILES["smoke"], simmat=SIMMAT, steps=2)


class Task:
    "What a step needs, without a cache."
    def __init__(self, title, run): self.title, self.run, self.infra = title, run, SimpleNamespace(uid=lambda: title)
    def __iter__(self): return iter(())  # is made from nothing
    def work(self): return "load", 1


def answers(cluster, out, **calls):
    said = []
    with Jobs(cluster, len(calls), out, said.append) as pool: waiting = {k: pool.submit(None, Task(k, run)) for k, run in calls.items()}
    return {k: v.result()[1] for k, v in waiting.items()}, said


pytestmark = pytest.mark.slow


# --- options

@pytest.mark.parametrize("options,said", [
    (["--partition", "gpu"], "--partition is for jobs: add --cluster local or --cluster slurm"),
    (["--retries", "0"], "--retries is for jobs: add --cluster local or --cluster slurm"),
    (["--cluster", "slurm"], "no Slurm here: sbatch is not on the PATH"),
    (["--cluster", "local", "--partition", "gpu"], "--partition is Slurm's"),
    (["--cluster", "local", "--gpus", "2", "--processes", "4"], "a process uses one GPU"),
    (["--cluster", "local", "--gpus", "9", "--jobs", "2"], "this machine has 0" if not torch.cuda.is_available() else "this machine has")])
def test_options_that_cannot_be(options, said, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = CliRunner().invoke(app, ["reproduce", "table9", "--profile", "smoke", "--seeds", "1", "--out", str(tmp_path / "out"), *options])
    assert run.exit_code == 2 and said in run.output and "Traceback" not in run.output


def test_what_a_job_asks_slurm_for(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    cluster = cluster_of("slurm", partition="gpu", gpus=4, time=120, cpus=3)
    assert cluster.processes == 4 and str(cluster) == "Slurm jobs (partition gpu, 4 processes, 4 GPUs)"
    asked = lambda n: jobs.executor_of(cluster, tmp_path / "a_step", n, [])._make_submission_file_text("run", "1")
    for line in ("partition=gpu", "gpus-per-node=4", "time=120", "cpus-per-task=12", "job-name=a_step"): assert f"#SBATCH --{line}\n" in asked(4)
    assert "#SBATCH --gpus-per-node=1\n" in asked(1) and "#SBATCH --cpus-per-task=3\n" in asked(1)  # a step that cannot be shared
    plain = jobs.executor_of(cluster_of("slurm"), tmp_path, 1, [])._make_submission_file_text("run", "1")
    assert not re.search("SBATCH --(gpus|time|partition)", plain)  # left to Slurm


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    two = Cluster(kind="local", gpus=2, processes=2)
    assert jobs.gpu_shares(two, 2) == [[0, 1], [2, 3]] and jobs.usual_jobs(two) == 2
    with pytest.raises(ValueError, match="3 job.s. of 2 GPU.s. at a time, and this machine has 4"): jobs.gpu_shares(two, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert jobs.gpu_shares(two, 1) == [[5, 7]]


# --- jobs that answer, fail, die

def test_a_dead_job_is_given_again_and_an_error_is_not(tmp_path):
    def counted(name, call):
        def run():
            with open(tmp_path / name, "a") as f: f.write("x")
            call(len((tmp_path / name).read_text()))
        return run
    def dies(n): os.kill(os.getpid(), signal.SIGKILL)
    def dies_once(n): n > 1 or dies(n)
    def fails(n): raise ValueError("lr is no number\nand so on")
    got, said = answers(LOCAL, tmp_path / "jobs", **{k: counted(k, f) for k, f in dict(once=dies_once, always=dies, fails=fails).items()})
    assert got["once"] == "" and {k: len((tmp_path / k).read_text()) for k in got} == dict(once=2, always=2, fails=1)
    assert got["always"].startswith("its job was killed, or ran out of time; log: ") and got["fails"].startswith("ValueError: lr is no number; log: ")
    assert Path(got["always"].split("log: ")[1]).exists() and "in fails\n" in Path(got["fails"].split("log: ")[1]).read_text()
    assert len(said) == 2 and all("it is given again" in line for line in said)
    assert not list(tmp_path.rglob("*.pkl"))  # logs are all that stays


def test_a_job_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    short = changed(LOCAL, retries=0)
    plain = jobs.executor_of
    def seconds(*args):
        executor = plain(*args)
        executor.update_parameters(timeout_min=.05)
        return executor
    monkeypatch.setattr(jobs, "executor_of", seconds)
    start = time.monotonic()
    got, _ = answers(short, tmp_path, sleeps=lambda: time.sleep(60))
    assert "ran out of time" in got["sleeps"] and time.monotonic() - start < 30


PARENT = """
import signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from cemiface.study.jobs import Cluster, Jobs

class Works:
    title, infra = "works", SimpleNamespace(uid=lambda: "works")
    def __init__(self, out): self.out = out
    def run(self):
        while not (self.out/"enough").exists():
            with open(self.out/"ran", "a") as f: f.write("x")
            time.sleep(.1)

out = Path(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler) # tests that run in the background have it ignored, and would hand that on
try:
    with Jobs(Cluster(kind=sys.argv[1]), 1, out/"jobs") as pool: print(pool.submit(None, Works(out)).result()[1] or "done")
except KeyboardInterrupt as e: print(*e.args)
"""


def parent(kind, out):
    "A process that gave a job, which runs by now."
    run = subprocess.Popen([sys.executable, "-c", PARENT, kind, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: progress(out) or run.poll() is not None)
    return run


def progress(out): return (out / "ran").stat().st_size if (out / "ran").exists() else 0


def wait_until(that, seconds=60):
    end = time.monotonic() + seconds
    while not that():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.05)


def has_stopped(out):
    before = progress(out)
    time.sleep(1)
    return progress(out) == before


def test_ctrl_c_ends_the_jobs(tmp_path):
    run = parent("local", tmp_path)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does it
    assert run.communicate(timeout=30) == ("1 job(s) ended.\n", "") and has_stopped(tmp_path)


def test_jobs_of_this_machine_end_with_what_gave_them(tmp_path):
    run = parent("local", tmp_path)
    run.kill()
    run.communicate()
    wait_until(lambda: has_stopped(tmp_path))
    assert progress(tmp_path) > 0 and has_stopped(tmp_path)  # it ran, and goes on no more


# --- the graph

def run(study, tasks, **how):
    said = []
    return run_steps(study, [Step(t, t.infra.status() == "completed", 1.) for t in in_order(tasks)], said.append, False, **how), said


def made(task): return {p.name: p.read_bytes() for p in sorted(task.infra.uid_folder().rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Some steps of one graph, inline, and as jobs of two processes where they can be shared; there the benchmarks cannot be written."
    one, several = (Study(PROFILE, tmp_path_factory.mktemp(k), seeds=1) for k in ("one", "several"))
    assert run(one, [one.recogniser(), one.inquiries()])[0] == {}
    shutil.copytree(one.out / "cache", several.out / "cache")
    assert run(one, [one.generator(), one.groups()])[0] == {}
    several.benchmarks().infra.uid_folder().parent.mkdir(parents=True, exist_ok=True)
    several.benchmarks().infra.uid_folder().write_text("a file where a folder has to be")
    failed, said = run(several, [several.yardstick(), several.generated(0., 0), several.groups()], jobs=2, cluster=Cluster(kind="local", processes=2))
    return one, several, failed, said


def test_a_failed_step_is_named_and_the_rest_goes_on(two):
    _, several, failed, said = two
    benchmarks, yardstick = several.benchmarks().infra.uid(), several.yardstick().infra.uid()
    assert set(failed) == {benchmarks, yardstick} and failed[yardstick] == f"needs {several.benchmarks().title}"
    assert re.match(r"(FileExists|NotADirectory)Error: .*; log: .*/jobs/five_benchmarks.*\.out$", failed[benchmarks])
    assert len(said) == 5 and all(t.infra.status() == "completed" for t in (several.generator(), several.generated(0., 0), several.groups()))


def test_a_job_makes_what_this_process_makes(two):
    one, several, *_ = two
    assert made(one.groups()) == made(several.groups()) and one.groups().run() == several.groups().run()


def test_two_processes_train_the_generator_as_one(two):
    one, several, *_ = two
    weights = [{k: getattr(s.generator().load(), k).state_dict() for k in ("unet", "conditioner")} for s in (one, several)]
    close(*weights)
    assert any(not torch.equal(a, weights[1]["unet"][n]) for n, a in weights[0]["unet"].items())  # it was another computation
    assert "2 process(es)" in next(job_folder(several.out / "jobs", several.generator()).glob("*.out")).read_text()


def test_two_processes_draw_the_set_that_one_draws(two, tmp_path):
    _, several, *_ = two
    task = several.generated(0., 0)
    drawn, notes = content(task.set_folder), next(job_folder(several.out / "jobs", task).glob("*.out")).read_text()
    shutil.rmtree(task.set_folder)
    task.share()
    assert "2 process(es)" in notes and drawn == content(task.set_folder)


# --- Slurm

CONF = """
ClusterName=one
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=2
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
NodeName={host} CPUs=4
PartitionName=tiny Nodes=ALL Default=YES MaxTime=10 State=UP
"""


def start_slurm(folder): # the daemons
    ports = []
    for s in [socket.socket() for _ in range(2)]:
        with s: s.bind(("localhost", 0)); ports.append(s.getsockname()[1])
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=ports, host=socket.gethostname().split(".")[0]))
    (folder / "key").write_bytes(os.urandom(64))
    (folder / "key").chmod(0o400)
    munge = {k: f"--{k}={folder / v}" for k, v in {"key-file": "key", "socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}.items()}
    for command in (["munged", "--foreground", "--force", *munge.values()], ["slurmctld", "-D"], ["slurmd", "-D"]):
        with open(folder / f"{command[0]}.out", "w") as log: yield subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"SLURM_CONF": str(folder / "slurm.conf")})
        wait_until((folder / "munge.sock").exists, 10)


@pytest.fixture(scope="module")
def slurm():
    "A Slurm of this machine, for as long as the tests that use it."
    lacking = [c for c in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(c, path=os.environ["PATH"] + ":/usr/sbin")]
    if lacking or os.geteuid(): pytest.skip(f"a Slurm of one machine cannot be started: {', '.join(lacking) + ' not installed (Debian: slurm-wlm, munge)' if lacking else 'this user is not root'}")
    folder, patch, daemons = Path(tempfile.mkdtemp(prefix="slurm")), pytest.MonkeyPatch(), []
    for name in ("state", "spool"): (folder / name).mkdir()
    try:
        for daemon in start_slurm(folder): daemons.append(daemon)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf")), patch.setattr(jobs, "POLL", 2), patch.setattr(jobs, "GRACE", 2)
        wait_until(lambda: "idle" in subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True).stdout, 20)
        yield folder
        subprocess.run(["scancel", f"--user={os.geteuid()}"])
    finally:
        patch.undo()
        for daemon in reversed(daemons): daemon.terminate(), daemon.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def test_slurm_makes_what_this_process_makes(slurm, tmp_path):
    "With the training of the recogniser killed in the middle."
    profile = changed(PROFILE, teacher=changed(PROFILE.teacher, epochs=8))
    one, cluster = Study(profile, tmp_path / "one"), cluster_of("slurm", partition="tiny", time=5)
    states = lambda: list((tmp_path / "cluster/cache").rglob("state.pt"))
    killed = []
    def kill():
        wait_until(states)
        killed.append(subprocess.run(["scancel", "--verbose", "--name=" + job_folder(tmp_path, one.recogniser()).name], capture_output=True, text=True).stderr)
        killed.extend(p.stat().st_size for p in states())
    Thread(target=kill, daemon=True).start()
    said = []
    found = reproduce(profile, ["table9"], tmp_path / "cluster", seeds=1, jobs=2, cluster=cluster, say=said.append, progress=False)
    assert isinstance(found["table9"], Finding) and len(killed) == 2, said
    assert re.search(r"recogniser E_id, .*: its job ended as CANCELLED \(log: .*\); it is given again", "\n".join(said))
    alone = reproduce(profile, ["table9"], tmp_path / "one", seeds=1, say=said.append, progress=False)
    other = Study(profile, tmp_path / "cluster")
    assert made(other.groups()) == made(one.groups()) and found["table9"].table.equals(alone["table9"].table)
    assert len(list(job_folder(tmp_path / "cluster/jobs", other.recogniser()).glob("*.out"))) == 2


def test_slurm_says_why_a_job_is_refused(slurm, tmp_path):
    got, _ = answers(Cluster(kind="slurm", partition="none"), tmp_path, a=lambda: None)
    assert got["a"].startswith("sbatch: ") and "invalid partition" in got["a"].lower()


def test_ctrl_c_cancels_slurms_jobs(slurm, tmp_path):
    run = parent("slurm", tmp_path)
    os.killpg(run.pid, signal.SIGINT)
    assert run.communicate(timeout=30)[0] == "1 job(s) cancelled.\n"
    wait_until(lambda: not jobs.queued())
    assert has_stopped(tmp_path)


def test_slurms_jobs_are_found_again(slurm, tmp_path):
    run = parent("slurm", tmp_path)
    run.kill()
    run.communicate()
    assert not has_stopped(tmp_path)  # the job is Slurm's
    again = parent("slurm", tmp_path)
    time.sleep(3)
    assert len(jobs.queued()) == 1
    (tmp_path / "enough").touch()
    assert again.communicate(timeout=60)[0] == "done\n" and len(list((tmp_path / "jobs").rglob("*.out"))) == 1
