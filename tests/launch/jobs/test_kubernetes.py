"""Manifests: what they say of the plan, what Kubernetes would replace in them, that the typed models know every key."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "gpu-8.yaml"
PLAN = "tp=4,cp=2,dp_shard=4,recompute=o:lse"


def manifests(*options: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The text, and the documents by kind."""
    words = ["launch", "kubernetes", str(CONFIG), "--image", "registry/cinemesh:1", "--plan", PLAN]
    done = CliRunner().invoke(app, [*words, *options])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout, {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}


def pod_of(job_set: dict[str, Any]) -> dict[str, Any]:
    (job,) = job_set["replicatedJobs"]
    return job["template"]["spec"]["template"]


@pytest.mark.parametrize("kind", ["TrainJob", "JobSet"])
def test_pods_are_the_plans_nodes(kind: str) -> None:
    """Nodes, ranks, GPUs and NICs by plan and cluster file: a wrong one would wait for ever, or run another plan."""
    text, of = manifests("--kind", kind, "--claim", "work")
    assert of["ConfigMap"]["data"]["recipe.yaml"] == CONFIG.read_text()
    spec = of["JobSet"]["spec"] if kind == "JobSet" else of["TrainingRuntime"]["spec"]["template"]["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    pod = pod_of(spec)["spec"]
    node, doctor = pod["containers"][0], pod["initContainers"][0]
    ranks = node if kind == "JobSet" else of["TrainJob"]["spec"]["trainer"]
    limits = {"nvidia.com/gpu": "8", "rdma/ib": "8"}
    assert node["resources"]["limits"] == doctor["resources"]["limits"] == limits
    assert doctor["command"][-4:] == ["--device", "cuda", "--per-node", "8"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8192Mi"}} in pod["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in node["volumeMounts"] and node["workingDir"] == "/workspace"
    assert ranks["command"] == ["python", "-m", "torch.distributed.run"]
    wanted = ["-m", "cinemesh.launch.train", "/etc/cinemesh/recipe.yaml", "--plan", PLAN]
    assert ranks["args"] == ["--max-restarts", "0", *wanted]
    told = {one["name"]: one.get("value") for one in ranks["env"]}
    lines = text.splitlines()
    for name in ("NCCL_DEBUG", "NCCL_IB_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        at = next(i for i, line in enumerate(lines) if line.strip() == f"- name: {name}")
        assert told[name] and lines[at - 1].strip().startswith("# ")
    if kind == "TrainJob":
        trainer = of["TrainJob"]["spec"]
        assert (trainer["trainer"]["numNodes"], trainer["trainer"]["numProcPerNode"]) == (4, 8)
        assert trainer["runtimeRef"]["name"] == of["TrainingRuntime"]["metadata"]["name"]
    else:
        assert (told["PET_NNODES"], told["PET_NPROC_PER_NODE"]) == ("4", "8")
        assert told["PET_MASTER_ADDR"] == "gpu-8-node-0-0.gpu-8"


def test_kubernetes_replaces_nothing_of_a_recipe() -> None:
    """In arguments it would put a variable of the pod in the place of $(NAME)."""
    _, of = manifests("--set", "logging.directory=$(HOME)/$x", "--kind", "JobSet")
    assert "logging.directory=$$(HOME)/$x" in pod_of(of["JobSet"]["spec"])["spec"]["containers"][0]["args"]


@pytest.mark.parametrize("option", ["--image", "--claim", "--rdma", "--topology", "--interface"])
def test_what_is_no_word_is_refused(option: str) -> None:
    with pytest.raises(CinemeshError, match=option):
        manifests(option, "a b")


def test_options_of_another_target_are_refused() -> None:
    """They would be passed over in silence."""
    with pytest.raises(CinemeshError, match="--spares says nothing to kubernetes"):
        manifests("--spares", "1")
    with pytest.raises(CinemeshError, match="--image"):
        CliRunner().invoke(app, ["launch", "kubernetes", str(CONFIG)], catch_exceptions=False)


@pytest.mark.parametrize("kind", ["TrainJob", "JobSet"])
@pytest.mark.skipif(find_spec("kubeflow_trainer_api") is None, reason="PyPI's kubeflow-trainer-api is not installed")
def test_the_typed_models_know_every_key(kind: str) -> None:
    """They pass over a key that they do not know: what comes back must be all that went in."""
    import kubeflow_trainer_api.models as typed  # pyright: ignore[reportMissingImports]

    models = {
        "TrainJob": typed.TrainerV1alpha1TrainJob,
        "TrainingRuntime": typed.TrainerV1alpha1TrainingRuntime,
        "JobSet": typed.JobsetV1alpha2JobSet,
    }
    _, of = manifests("--kind", kind, "--claim", "work")
    for name, document in of.items():
        if name in models:
            assert models[name].from_dict(document).to_dict() == document
