"""``docs/cluster``: the SLURM script against stand-ins for SLURM, Ray and the run; what the documents show can run."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from vapo_async.config import RayLauncherConfig
from vapo_async.config.load import load_config
from vapo_async.launcher.ray_cluster import check_resources, placement

SCRIPT = REPOSITORY / "docs" / "cluster" / "slurm.sh"
PAGE = REPOSITORY / "docs" / "cluster.md"
RAY_JOB: dict[str, Any] = yaml.safe_load((REPOSITORY / "docs" / "cluster" / "kuberay.yaml").read_text())["spec"]
NODES = ["n1", "n2", "n3"]
STAND_INS = {
    "hostname": "echo 10.0.0.1 10.1.0.1",
    "scontrol": """
        if [ "$1" = show ]; then printf '%s\\n' n1 n2 n3; exit; fi
        echo "$@" "$(tail -n 1 run.log)" >> scontrol.log
    """,
    # A Ray that is up after a moment; a worker without a head ends at once, as Ray's would after a while.
    "srun": """
        echo "$@" >> srun.log
        case "$*" in
            *"--nodelist=$LOST "*) sleep 0.2; exit 1 ;;
            *--address=*) [ -s alive ] || exit 1 ;;
        esac
        sleep 0.1; echo up >> alive; exec sleep 60
    """,
    # `-c`: how many nodes are alive. Otherwise the run, which goes on after a signal to write its checkpoint.
    "python": """
        if [ "$1" = -c ]; then sleep 0.2; cat alive 2>/dev/null | wc -l; exit; fi
        echo "$RAY_ADDRESS $(wc -l < alive) $*" > run.log
        stop() { echo signal >> run.log; [ "$AFTER" = checkpoint ] || exit "$CODE"; signals=$((${signals:-0} + 1)); }
        trap stop TERM
        touch running
        [ -n "$AFTER" ] || exit "$CODE"
        while [ -z "${signals:-}" ]; do sleep 0.05; done
        for _ in 1 2 3 4 5 6; do sleep 0.1; done
        echo checkpoint >> run.log
        exit "$CODE"
    """,
}


@pytest.fixture
def job(tmp_path: Path) -> Iterator["Job"]:
    job = Job(tmp_path)
    yield job
    job.end()


class Job:
    """A folder like the repository's, in which slurm.sh finds the stand-ins where it expects a virtual environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        commands = folder / ".venv" / "bin"
        commands.mkdir(parents=True)
        (commands / "activate").write_text(f"PATH={shlex.quote(str(commands))}:$PATH\n")
        for name, body in STAND_INS.items():
            (commands / name).write_text(f"#!/bin/bash\n{body}")
            (commands / name).chmod(0o755)

    def start(self, code: int, after: str = "", lost: str = "none", limit_s: int = 30) -> subprocess.Popen[str]:
        """``after``: what the run waits for before it ends with ``code``."""
        slurm = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_ID": "17", "SLURM_CPUS_ON_NODE": "96"}
        mine = {"CODE": str(code), "AFTER": after, "LOST": lost, "RAY_NODES_TIMEOUT_S": str(limit_s)}
        self.process = subprocess.Popen(
            ["bash", SCRIPT, "experiment=mine", "name=two words"],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], **slurm, **mine},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self.process

    def result(self) -> tuple[int, str]:
        """Exit code and output, without waiting for the Rays, which SLURM would end."""
        code = self.process.wait(timeout=30)
        self.end()
        assert self.process.stdout is not None
        return code, self.process.stdout.read()

    def wait_for(self, file: str) -> None:
        deadline = time.monotonic() + 20
        while not (self.folder / file).exists():
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {file}"
            time.sleep(0.02)

    def lines(self, file: str) -> list[str]:
        path = self.folder / file
        return path.read_text().splitlines() if path.exists() else []

    def end(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_run_that_ends_by_itself_keeps_its_code_and_is_not_queued_again(job: Job, code: int) -> None:
    job.start(code)
    assert job.result() == (code, "")
    assert job.lines("scontrol.log") == []


def test_the_run_starts_once_every_node_has_joined(job: Job) -> None:
    job.start(0)
    assert job.result() == (0, "")
    assert job.lines("run.log") == ["10.0.0.1:6379 3 scripts/train_async.py resume=auto experiment=mine name=two words"]
    steps = job.lines("srun.log")
    assert [re.findall(r"--nodelist=(\w+)", step) for step in steps[:1]] == [["n1"]]
    assert sorted(re.findall(r"--nodelist=(\w+)", " ".join(steps))) == NODES
    assert ["--head --node-ip-address=10.0.0.1 --port=6379" in step for step in steps] == [True, False, False]
    assert ["--address=10.0.0.1:6379" in step for step in steps] == [False, True, True]
    for step in steps:
        assert step.startswith("--nodes=1 --ntasks=1 ") and step.endswith(" --disable-usage-stats --block")
        assert "--no-kill --mem=0 --cpus-per-task=96 --cpu-bind=none ray start " in step


@pytest.mark.parametrize("signals", [1, 2])
def test_a_stopped_run_writes_its_checkpoint_and_is_queued_again(job: Job, signals: int) -> None:
    process = job.start(130, after="checkpoint")
    job.wait_for("running")
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert job.result() == (130, "")
    assert job.lines("run.log")[1:] == ["signal"] * signals + ["checkpoint"]
    assert job.lines("scontrol.log") == ["requeue 17 checkpoint"]


@pytest.mark.parametrize("code", [0, 1])
def test_a_run_that_finishes_or_fails_after_the_signal_is_not_queued_again(job: Job, code: int) -> None:
    process = job.start(code, after="signal")
    job.wait_for("running")
    process.send_signal(signal.SIGTERM)
    assert job.result() == (code, "")
    assert job.lines("run.log")[1:] == ["signal"] and job.lines("scontrol.log") == []


@pytest.mark.parametrize("lost", ["n1", "n3"])
def test_a_node_without_ray_ends_the_job(job: Job, lost: str) -> None:
    job.start(0, lost=lost)
    assert job.result() == (1, "error: Ray has ended on a node before all had joined; see above\n")
    assert job.lines("run.log") == []


def test_waiting_for_nodes_has_an_end(job: Job) -> None:
    (job.folder / ".venv" / "bin" / "python").write_text("#!/bin/bash\necho 0\n")
    job.start(0, limit_s=1)
    assert job.result() == (1, "error: 0 of 3 nodes have joined within 1 s\n")


def test_what_slurm_reads_stands_before_the_first_command() -> None:
    lines = SCRIPT.read_text().splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert all(line.startswith("#") for line in lines[: 2 + len(options)])
    assert {"--mem=0", "--signal=B:TERM@5400", "--requeue", "--no-kill", "--open-mode=append"} <= set(options)
    outputs = [option.partition("=")[2] for option in options if option.startswith("--output=")]
    assert len(outputs) == 1 and "/" not in outputs[0]  # SLURM makes no folders


@pytest.mark.ray
def test_the_count_of_nodes_is_rays(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    found = re.search(r"^count='(.*?)'$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        command = [sys.executable, "-c", found[1], cluster.address]
        assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "2\n"
    finally:
        cluster.shutdown()


def settings(command: str) -> list[str]:
    """The run's arguments, of a command line in a document."""
    command = command.partition("#")[0].replace("\\\n", " ")
    return [word for word in shlex.split(command.partition("train_async.py")[2]) if "=" in word]


def test_the_commands_of_the_page_are_configurations_that_fit() -> None:
    commands = re.findall(r"^RAY_ADDRESS=.*?train_async\.py(?:.*\\\n)*.*$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) == 2
    for command, nodes in zip(commands, (8, 2), strict=True):
        config = load_config(settings(command))
        assert config.resume == "auto" and isinstance(config.launcher, RayLauncherConfig)
        check_resources(placement(config, config.launcher).all, [{"CPU": 96.0, "GPU": 8.0}] * nodes)


def test_named_resources_of_the_page_place_the_papers_run() -> None:
    text = PAGE.read_text()
    asked = re.findall(r"'(launcher\.\w+_resources={.*?})'", text)
    assert len(asked) == 2
    config = load_config(["experiment=paper_qwen2.5_32b", *asked])
    assert isinstance(config.launcher, RayLauncherConfig)
    learner, engine = (yaml.safe_load(r) for r in re.findall(r"--resources='({.*?})'", text))
    gpus = {"CPU": 96.0, "GPU": 8.0}
    check_resources(placement(config, config.launcher).all, [gpus | learner] * 5 + [gpus | engine] * 3)
    quoted = re.search(r"`rayStartParams: (\{.*\})`", text)
    assert quoted is not None
    # KubeRay pastes the value into a shell command.
    assert yaml.safe_load(shlex.split(yaml.safe_load(quoted[1])["resources"])[0]) == learner


def test_the_ray_job_runs_from_the_image_and_shares_what_it_fetches() -> None:
    cluster = RAY_JOB["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    pins = (REPOSITORY / "constraints.txt").read_text().split()
    assert f"ray=={cluster['rayVersion']}" in pins
    config = load_config(settings(RAY_JOB["entrypoint"]))
    assert config.resume == "auto" and isinstance(config.launcher, RayLauncherConfig)
    containers = [group["template"]["spec"]["containers"] for group in (cluster["headGroupSpec"], workers)]
    for (container,) in containers:
        mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        for place in (config.runs_dir, environment["HF_HOME"]):
            assert any(Path(place).is_relative_to(mount) for mount in mounted)
        program = Path(shlex.split(RAY_JOB["entrypoint"])[1])
        assert program.is_absolute() and not any(program.is_relative_to(mount) for mount in mounted)
    limits = containers[1][0]["resources"]["limits"]
    node = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
    check_resources(placement(config, config.launcher).all, [node] * workers["replicas"])
