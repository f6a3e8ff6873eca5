"""A job as manifests: a TrainJob of Kubeflow Trainer v2 with its runtime, or a JobSet alone (torch-free).

The recipe goes along as a ConfigMap. No shell runs in the pods: torchrun is started as it is, and reads the variables
``PET_*`` for what differs from node to node (Trainer sets them; for a JobSet they stand here). In arguments,
Kubernetes itself replaces ``$(NAME)``; ``$$(NAME)`` stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...documents import file_text, write_yaml
from ...errors import CinemeshError
from .job import SHM_BYTES, ClusterJob, word
from .variables import STOP_S, Variable, site, variables

RECIPE_FOLDER, RECIPE_FILE = "/etc/cinemesh", "recipe.yaml"
NODE = "node"  # what Trainer calls the replicated job and the container of the ranks
PORT = 29500  # torchrun's own
RESTARTS = 10  # of all pods, after failures; disruptions are not counted
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
HOST, TOPOLOGY = "kubernetes.io/hostname", "topology.kubernetes.io/zone"  # labels of nodes
MOST_RECIPE_BYTES = 2**20  # of a ConfigMap

ManifestKind = Literal["TrainJob", "JobSet"]


@dataclass(frozen=True, kw_only=True)
class KubernetesAsked:
    """Options. ``claim``: a volume claim, mounted at ``mount``, where the ranks run; ``rdma``: what a NIC is called.

    ``topology``: the label of nodes that stand close together.
    """

    image: str
    kind: ManifestKind = "TrainJob"
    claim: str | None = None
    mount: str = "/workspace"
    rdma: str = "rdma/ib"
    topology: str = TOPOLOGY
    interface: str | None = None


def manifests(job: ClusterJob, asked: KubernetesAsked) -> str:
    """YAML documents. Raises CinemeshError for an option or a recipe that they cannot hold."""
    for option in ("image", "claim", "rdma", "topology"):
        if (value := getattr(asked, option)) is not None:
            word(value, f"--{option}")
    word(asked.mount.removeprefix("/"), "--mount")
    settings = list(variables(job, asked.interface))
    of_kind = {"TrainJob": _train_job, "JobSet": _job_set}[asked.kind]
    made = [_recipe(job), *of_kind(job, asked, settings)]
    reasons = {one.name: one.why for one in settings}
    head = "".join(f"# {line}\n" for line in (*job.about(), *_hints(job), *site(job)))
    return head + "---\n".join(_commented(write_yaml(one), reasons) for one in made)


def _hints(job: ClusterJob) -> list[str]:
    if job.nodes == 1:
        return []
    return ["Ranks follow the pods' indices: under Kueue's topology-aware scheduling, neighbours stand close together."]


def _commented(text: str, reasons: Mapping[str, str]) -> str:
    """With a reason above every variable."""
    lines: list[str] = []
    for line in text.splitlines():
        name = line.strip().removeprefix("- name: ")
        if name in reasons and line.strip() != name:
            lines.append(f"{line[: line.index('-')]}# {reasons[name]}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _recipe(job: ClusterJob) -> dict[str, Any]:
    text = file_text(job.recipe, "the recipe", "name a recipe")
    if (size := len(text.encode())) >= MOST_RECIPE_BYTES:
        raise CinemeshError(
            f"{job.recipe} has {size:,} bytes, and a ConfigMap holds less than {MOST_RECIPE_BYTES:,}",
            remedy="put the captions into a file of their own",
        )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-recipe"},
        "data": {RECIPE_FILE: text},
    }


def _arguments(job: ClusterJob) -> list[str]:
    """Of torchrun, as Kubernetes hands them on."""
    words = ["--max-restarts", "0", *job.training(f"{RECIPE_FOLDER}/{RECIPE_FILE}")]
    return [one.replace("$(", "$$(") for one in words]


def _resources(job: ClusterJob, asked: KubernetesAsked) -> dict[str, Any]:
    if not job.on_gpus:
        return {"requests": {"cpu": str(job.ranks_of_a_node)}}
    limits = {"nvidia.com/gpu": str(job.ranks_of_a_node)}
    if job.nodes > 1:
        nics = job.ranks_of_a_node if job.cluster is None else job.cluster.topology.nics_per_server
        limits[asked.rdma] = str(nics)
    return {"limits": limits}


def _environment(settings: list[Variable]) -> list[dict[str, Any]]:
    return [{"name": one.name, "value": one.value} for one in settings]


def _pod(job: ClusterJob, asked: KubernetesAsked, container: Mapping[str, Any]) -> dict[str, Any]:
    """A pod's template: one a node, which the doctor looks at first."""
    claim = [] if asked.claim is None else [{"name": "work", "mountPath": asked.mount}]
    where = {} if asked.claim is None else {"workingDir": asked.mount}
    each = {
        "image": asked.image,
        **where,
        "resources": _resources(job, asked),
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},  # nosec B108  the pod's own
            {"name": "recipe", "mountPath": RECIPE_FOLDER},
            *claim,
        ],
    }
    if job.on_gpus and job.nodes > 1:
        each["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}  # adapters pin what they send
    device = "cuda" if job.on_gpus else "cpu"
    doctor = {
        "command": [
            "python",
            "-m",
            "cinemesh.launch",
            "doctor",
            "--device",
            device,
            "--per-node",
            str(job.ranks_of_a_node),
        ]
    }
    mine = {"labelSelector": {"matchLabels": {"cinemesh/run": job.name}}}
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{job.ranks_of_a_node * SHM_BYTES >> 20}Mi"}},
        {"name": "recipe", "configMap": {"name": f"{job.name}-recipe"}},
    ]
    if asked.claim is not None:
        volumes.append({"name": "work", "persistentVolumeClaim": {"claimName": asked.claim}})
    return {
        "metadata": {
            "labels": {"cinemesh/run": job.name},
            "annotations": {"kueue.x-k8s.io/podset-preferred-topology": asked.topology},
        },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": STOP_S + 30,
            "affinity": {
                "podAntiAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": [{**mine, "topologyKey": HOST}],
                },
                "podAffinity": {
                    "preferredDuringSchedulingIgnoredDuringExecution": [
                        {"weight": 100, "podAffinityTerm": {**mine, "topologyKey": asked.topology}}
                    ],
                },
            },
            "initContainers": [{"name": "doctor", **each, **doctor}],
            "containers": [{"name": NODE, **each, **container}],
            "volumes": volumes,
        },
    }


def _set_spec(job: ClusterJob, pod: dict[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """A JobSet's: any pod that fails starts all of them again, from the last checkpoint."""
    disrupted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {
        "failurePolicy": {
            "maxRestarts": RESTARTS,
            "rules": [
                {
                    "name": "disrupted",
                    "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                }
            ],
        },
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "replicatedJobs": [
            {
                "name": NODE,
                "replicas": 1,
                "template": {
                    "metadata": {"labels": {**labels}},
                    "spec": {
                        "parallelism": job.nodes,
                        "completions": job.nodes,
                        "completionMode": "Indexed",
                        "backoffLimit": 0,
                        "podFailurePolicy": {"rules": [disrupted]},
                        "template": pod,
                    },
                },
            }
        ],
    }


def _job_set(job: ClusterJob, asked: KubernetesAsked, settings: list[Variable]) -> list[dict[str, Any]]:
    agent = {
        "PET_NNODES": str(job.nodes),
        "PET_NPROC_PER_NODE": str(job.ranks_of_a_node),
        "PET_MASTER_ADDR": f"{job.name}-{NODE}-0-0.{job.name}",
        "PET_MASTER_PORT": str(PORT),
    }
    environment = [
        *_environment(settings),
        *({"name": name, "value": value} for name, value in agent.items()),
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
    ]
    container = {
        "command": ["python", "-m", "torch.distributed.run"],
        "args": _arguments(job),
        "env": environment,
        "ports": [{"containerPort": PORT}],
    }
    job_set = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name},
        "spec": _set_spec(job, _pod(job, asked, container), {}),
    }
    return [job_set]


def _train_job(job: ClusterJob, asked: KubernetesAsked, settings: list[Variable]) -> list[dict[str, Any]]:
    api = "trainer.kubeflow.org/v1alpha1"
    spec = _set_spec(job, _pod(job, asked, {}), {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"})
    runtime = {
        "apiVersion": api,
        "kind": "TrainingRuntime",
        "metadata": {"name": job.name, "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {"mlPolicy": {"numNodes": job.nodes, "torch": {}}, "template": {"spec": spec}},
    }
    train_job = {
        "apiVersion": api,
        "kind": "TrainJob",
        "metadata": {"name": job.name},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.name},
            "trainer": {
                "image": asked.image,
                "command": ["python", "-m", "torch.distributed.run"],
                "args": _arguments(job),
                "numNodes": job.nodes,
                "numProcPerNode": job.ranks_of_a_node,
                "resourcesPerNode": _resources(job, asked),
                "env": _environment(settings),
            },
        },
    }
    return [runtime, train_job]
