"""Every rule of the operator, Kueue, Kubernetes and Ray that values could break, with values that break it.

The chart refuses each case when it renders: by one of its rules, or because its schema knows no such key or value.
If the operator has the rule, its own code refuses the same mistake written by hand (`manifest`).

`python -m tests.charts.rules` writes RULES.md, the table of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Edit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """A mistake: in values and, if the operator has a rule for it, in a manifest."""

    rule: int
    title: str
    values: dict[str, Any]
    says: str
    manifest: Edit | None = None
    operator: str = ""
    queued: Edit | None = None  # in the manifest of a job in a queue, for Kueue's webhook
    kueue: str = ""
    name: str = "demo"
    base: dict[str, Any] = field(
        default_factory=dict
    )  # Valid values that the manifest is rendered with, before it is edited.


def put(path: str, value: Any) -> Edit:
    """Return an edit that sets the value at a path, such as `spec.workerGroupSpecs.0.minReplicas`."""

    def edit(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        target: Any = manifest
        for key in parents:
            target = target[int(key)] if isinstance(target, list) else target.setdefault(key, {})
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value

    return edit


def both(*edits: Edit) -> Edit:
    """Return an edit that makes several edits."""

    def edit(manifest: dict[str, Any]) -> None:
        for change in edits:
            change(manifest)

    return edit


def env(name: str, value: str = "1") -> Edit:
    """Return an edit that gives the head a variable."""
    return lambda manifest: manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
        "env"
    ].append({"name": name, "value": value})


def label(name: str, value: str) -> Edit:
    """Return an edit that sets a label of Kueue's."""
    return lambda manifest: manifest["metadata"]["labels"].update({f"kueue.x-k8s.io/{name}": value})


def topology(**kinds: str) -> dict[str, str]:
    """Return annotations that ask Kueue for a topology, by kind."""
    return {f"kueue.x-k8s.io/podset-{kind}-topology": value for kind, value in kinds.items()}


CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec"
GROUP = f"{CLUSTER}.workerGroupSpecs.0"
UNKNOWN = "additional properties"
SCALING = {"autoscaling": {"enabled": True}}
SHARED = {"clusterSelector": "shared"}
REDIS = put(f"{CLUSTER}.gcsFaultToleranceOptions", {"redisAddress": "redis:6379"})


def rule(policy: str, ttl: int = 0, **condition: str) -> dict[str, Any]:
    """Return a deletion rule."""
    return {"policy": policy, "condition": {**condition, "ttlSeconds": ttl}}


ENDS = [
    rule("DeleteCluster", jobStatus="SUCCEEDED"),
    rule("DeleteCluster", jobStatus="FAILED"),
    rule("DeleteCluster", jobDeploymentStatus="Failed"),
]


def deletion(*rules: Any, **more: Any) -> dict[str, Any]:
    """Return values with deletion rules."""
    return {"run": {"shutdownAfterJobFinishes": False, "deletionRules": list(rules)}, **more}


def strategy(*rules: Any) -> Edit:
    """Return an edit that sets deletion rules."""
    return both(
        put("spec.shutdownAfterJobFinishes", False), put("spec.deletionStrategy", {"deletionRules": list(rules)})
    )


RULES = {
    1: "The name of a run fits, and is a DNS-1035 label",
    2: "The submission mode is valid",
    3: "A suspended job deletes its cluster, and has one of its own",
    4: "A time to live is not negative, and something is deleted after it",
    5: "Deletion rules are complete, consistent, and leave no cluster behind",
    6: "There is a cluster, or the name of one",
    7: "A shared or interactive cluster takes no retries and no sidecar",
    8: "A sidecar has no submitter, and its head does not restart",
    9: "Deadlines and retries are valid, and the operator supports them",
    10: "Tokens are Ray's, and its version supports them",
    11: "Fields that belong to others are not set",
    12: "Every pod has a container",
    13: "Resources and labels are given once, where Ray and the operator read them",
    14: "Numbers of workers are consistent",
    15: "Settings of the autoscaler belong to its version",
    16: "The autoscaler is on in one place, and its pods do not restart",
    17: "No fault tolerance through other settings",
    18: "No operator feature behind a gate",
    19: "The name of the ServiceAccount fits",
    20: "The submitter has a container and does not restart",
    21: "Kueue's requirements for a job in a queue",
    22: "The entrypoint is never free text",
    23: "Actors fit on workers, and no GPU idles",
    24: "Object store and heap fit into the memory",
    25: "Every name and every mount exists exactly once",
    26: "The deadline to start is before the one to end",
    27: "No job deletes itself",
    0: "The chart's own: requirements of the job",
}

CASES = [
    Case(1, "name too long", {}, "has 39 characters, 38 fit", put("metadata.name", "a" * 48), "no more than 47", name="a" * 39),
    Case(1, "name starts with a digit", {}, "starting with a letter", put("metadata.name", "1demo"), "DNS1035", name="1demo"),
    Case(1, "name with a dot", {"nameOverride": "de.mo"}, "is not of a-z", put("metadata.name", "de.mo"), "DNS1035"),
    Case(2, "submission mode with a typo", {"submissionMode": "K8sjobMode"}, UNKNOWN),
    Case(3, "suspended, cluster kept", {"run": {"suspend": True, "shutdownAfterJobFinishes": False}}, "run.suspend is true",
         both(put("spec.suspend", True), put("spec.shutdownAfterJobFinishes", False)), "not allowed to be suspended"),
    Case(3, "suspended on a shared cluster", {"run": {"suspend": True}, **SHARED}, "that can't be suspended",
         put("spec.suspend", True), "doesn't support the suspend", base=SHARED),
    Case(4, "time to live without deletion", deletion(*ENDS, run={"ttlSecondsAfterFinished": 9, "shutdownAfterJobFinishes": False}),
         "nothing would be deleted", both(put("spec.ttlSecondsAfterFinished", 9), put("spec.shutdownAfterJobFinishes", False)),
         "cannot have TTLSecondsAfterFinished"),
    Case(4, "negative time to live", {"run": {"ttlSecondsAfterFinished": -1}}, "minimum", put("spec.ttlSecondsAfterFinished", -1),
         "non-negative"),
    Case(5, "two ways to delete", {"run": {"deletionRules": ENDS}}, "which the operator refuses",
         put("spec.deletionStrategy", {"deletionRules": ENDS}), "mutually exclusive"),
    Case(5, "old deletion policies", {"run": {"onSuccess": {"policy": "DeleteCluster"}}}, UNKNOWN,
         put("spec.deletionStrategy", {"onSuccess": {"policy": "DeleteCluster"}}), "both DeletionStrategy.OnSuccess"),
    Case(5, "old deletion policies beside rules", {"run": {"onFailure": {"policy": "DeleteCluster"}}}, UNKNOWN,
         both(strategy(*ENDS), put("spec.deletionStrategy.onFailure", {"policy": "DeleteCluster"})), "simultaneously"),
    Case(5, "old policy that keeps the cluster", {"run": {"onSuccess": {"policy": "DeleteNone"}}}, UNKNOWN,
         put("spec.deletionStrategy", {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {"policy": "DeleteNone"}}), "DeleteNone"),
    Case(5, "empty deletion strategy", {"run": {"deletionStrategy": {}}}, UNKNOWN, put("spec.deletionStrategy", {}), "cannot be empty"),
    Case(5, "rule with two conditions", deletion(rule("DeleteCluster", jobStatus="FAILED", jobDeploymentStatus="Failed")), "oneOf",
         strategy(rule("DeleteCluster", jobStatus="FAILED", jobDeploymentStatus="Failed")), "cannot set both"),
    Case(5, "rule without condition", deletion(rule("DeleteCluster")), "oneOf", strategy(rule("DeleteCluster")), "exactly one of"),
    Case(5, "rule with negative time to live", deletion(rule("DeleteCluster", -1, jobStatus="FAILED")), "minimum",
         strategy(rule("DeleteCluster", -1, jobStatus="FAILED")), "must be non-negative"),
    Case(5, "rule given twice", deletion(*ENDS, ENDS[0]), "is a second rule for", strategy(*ENDS, ENDS[0]), "duplicate rule"),
    Case(5, "workers kept longer than the cluster", deletion(*ENDS, rule("DeleteWorkers", 60, jobStatus="FAILED")),
         "keeps workers for 60 s and the cluster for 0 s", strategy(*ENDS, rule("DeleteWorkers", 60, jobStatus="FAILED")), "must be >="),
    Case(5, "workers deleted under the autoscaler", deletion(*ENDS, rule("DeleteWorkers", jobStatus="FAILED"), **SCALING),
         "has policy DeleteWorkers and autoscaling.enabled is true", strategy(*ENDS, rule("DeleteWorkers", jobStatus="FAILED")),
         "not supported with autoscaling", base=SCALING),
    Case(5, "shared cluster deleted", deletion(ENDS[0], **SHARED), "that a job must not delete", strategy(ENDS[0]),
         "not supported when ClusterSelector", base=SHARED),
    Case(5, "an end that no rule meets", deletion(*ENDS[:2]), "no DeleteCluster for jobDeploymentStatus Failed"),
    Case(5, "cluster never deleted", {"run": {"shutdownAfterJobFinishes": False}}, "its GPUs would stay allocated forever"),
    Case(6, "no cluster at all", {"rayClusterSpec": None}, UNKNOWN, lambda job: job["spec"].pop("rayClusterSpec"), "must be set"),
    Case(6, "cluster without a name", {"clusterSelector": " "}, "pattern", put("spec.clusterSelector", {"ray.io/cluster": ""}),
         "should not be empty"),
    Case(7, "sidecar on a shared cluster", {"submissionMode": "SidecarMode", **SHARED}, UNKNOWN,
         both(put("spec.submissionMode", "SidecarMode"), put("spec.clusterSelector", {"ray.io/cluster": "shared"})),
         "not supported in SidecarMode"),
    Case(7, "retries on a shared cluster", {"run": {"backoffLimit": 2}, **SHARED}, "run.backoffLimit is 2 and clusterSelector is shared",
         put("spec.backoffLimit", 2), "incompatible with ClusterSelector", base=SHARED),
    Case(7, "retries of an interactive job", {"submissionMode": "InteractiveMode"}, UNKNOWN,
         put("spec.submissionMode", "InteractiveMode"), "incompatible with InteractiveMode"),
    Case(8, "sidecar with a submitter", {"submissionMode": "SidecarMode"}, UNKNOWN, put("spec.submissionMode", "SidecarMode"),
         "doesn't support SubmitterPodTemplate"),
    Case(8, "sidecar with a submitter's retries", {"submissionMode": "SidecarMode"}, UNKNOWN,
         both(put("spec.submissionMode", "SidecarMode"), lambda job: job["spec"].pop("submitterPodTemplate")),
         "doesn't support SubmitterConfig"),
    Case(8, "sidecar with a head that restarts", {"head": {"restartPolicy": "Always"}}, UNKNOWN,
         both(put("spec.submissionMode", "SidecarMode"), lambda job: job["spec"].pop("submitterPodTemplate"),
              lambda job: job["spec"].pop("submitterConfig"), put(f"{HEAD}.template.spec.restartPolicy", "Always")),
         "restartPolicy for head Pod"),
    Case(9, "no time at all", {"run": {"activeDeadlineSeconds": 0}}, "minimum", put("spec.activeDeadlineSeconds", 0), "positive integer"),
    Case(9, "no time to start", {"run": {"preRunningDeadlineSeconds": 0}}, "minimum", put("spec.preRunningDeadlineSeconds", 0),
         "positive integer"),
    Case(9, "operator too old", {"kuberayVersion": "1.5.1"}, "needs 1.6.0"),
    Case(9, "negative retries", {"run": {"backoffLimit": -1}}, "minimum", put("spec.backoffLimit", -1), "positive integer"),
    Case(9, "runtime environment that is no YAML", {"runtimeEnvYAML": "a: ["}, UNKNOWN, put("spec.runtimeEnvYAML", "a: ["), "yaml"),
    Case(10, "tokens of Kubernetes", {"auth": {"enableK8sTokenAuth": True}}, UNKNOWN,
         put(f"{CLUSTER}.authOptions", {"mode": "token", "enableK8sTokenAuth": True}), "not supported for RayJob"),
    Case(10, "tokens with an old Ray", {"auth": {"enabled": True}, "rayVersion": "2.51.0"}, "auth.enabled needs Ray 2.52.0",
         put(f"{CLUSTER}.rayVersion", "2.51.0"), "minimum Ray version is 2.52.0", base={"auth": {"enabled": True}}),
    Case(10, "tokens without a version", {"auth": {"enabled": True}, "rayVersion": ""}, "pattern", put(f"{CLUSTER}.rayVersion", ""),
         "RayVersion was not specified", base={"auth": {"enabled": True}}),
    Case(10, "tokens with a version that is none", {"auth": {"enabled": True}, "rayVersion": "latest"}, "pattern",
         put(f"{CLUSTER}.rayVersion", "latest"), "format is invalid", base={"auth": {"enabled": True}}),
    Case(11, "managed by someone else", {"managedBy": "me"}, UNKNOWN),
    Case(11, "upgrade strategy of a job's cluster", {"upgradeStrategy": {"type": "Recreate"}}, UNKNOWN),
    Case(11, "metadata that only the stock submitter reads", {"run": {"metadata": {"a": "b"}}}, UNKNOWN),
    Case(12, "head without containers", {"head": {"containers": []}}, UNKNOWN, put(f"{HEAD}.template.spec.containers", []),
         "at least one container"),
    Case(12, "workers without containers", {"workers": {"containers": []}}, UNKNOWN, put(f"{GROUP}.template.spec.containers", []),
         "at least one container"),
    Case(13, "resources given twice", {"workers": {"resources": {"CPU": "1"}}}, UNKNOWN, put(f"{GROUP}.resources", {"CPU": "1"}),
         "both rayStartParams and Resources"),
    Case(13, "CPUs given twice", {"workers": {"rayStartParams": {"num-cpus": "4"}}}, "sets num-cpus to 4, which the chart computes"),
    Case(13, "labels as a parameter", {"workers": {"rayStartParams": {"labels": "a=b"}}}, "workers.rayStartParams sets labels",
         put(f"{GROUP}.rayStartParams.labels", "a=b"), "is not supported"),
    Case(13, "label with a space", {"workers": {"labels": {"a b": "c"}}}, "pattern", put(f"{GROUP}.labels", {"a b": "c"}),
         "invalid label key"),
    Case(13, "label value with a space", {"workers": {"labels": {"a": "b c"}}}, "pattern", put(f"{GROUP}.labels", {"a": "b c"}),
         "invalid label value"),
    Case(14, "more workers than needed", {"autoscaling": {"enabled": True, "minWorkers": 9}}, "minWorkers is 9, the actor pool needs 4",
         put(f"{GROUP}.minReplicas", 9), "greater than maxReplicas"),
    Case(14, "negative workers", {"autoscaling": {"minWorkers": -1}}, "minimum", put(f"{GROUP}.minReplicas", -1), "negative minReplicas"),
    Case(14, "negative CPU workers", {"cpuWorkers": {"replicas": -1}}, "minimum",
         both(put(f"{GROUP}.minReplicas", None), put(f"{GROUP}.maxReplicas", -1)), "negative maxReplicas", base=SCALING),
    Case(14, "no bounds without autoscaling", {"workers": {"minReplicas": None}}, UNKNOWN, put(f"{GROUP}.minReplicas", None),
         "must set both"),
    Case(15, "idle timeout of a group", {"workers": {"idleTimeoutSeconds": 9}}, UNKNOWN, put(f"{GROUP}.idleTimeoutSeconds", 9),
         "autoscaler v2 is not enabled"),
    Case(15, "negative idle timeout", {"autoscaling": {"idleTimeoutSeconds": -1}}, "minimum",
         put(f"{CLUSTER}.autoscalerOptions.idleTimeoutSeconds", -1), "must be non-negative", base=SCALING),
    Case(15, "priority of a group", {"workers": {"priority": 5}}, UNKNOWN, put(f"{GROUP}.priority", 5), "unknown field"),
    Case(16, "head that restarts under the autoscaler", {"head": {"restartPolicy": "Always"}, **SCALING}, UNKNOWN,
         put(f"{HEAD}.template.spec.restartPolicy", "Always"), "restartPolicy for head Pod", base=SCALING),
    Case(16, "workers that restart under the autoscaler", {"workers": {"restartPolicy": "Always"}, **SCALING}, UNKNOWN,
         put(f"{GROUP}.template.spec.restartPolicy", "Always"), "restartPolicy for worker group", base=SCALING),
    Case(16, "autoscaler's version said twice", {"head": {"env": [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]}, **SCALING},
         "head.env sets RAY_enable_autoscaler_v2", env("RAY_enable_autoscaler_v2"), "please only use the former", base=SCALING),
    Case(16, "autoscaler's version without autoscaling", {"pods": {"env": [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]}},
         "pods.env sets RAY_enable_autoscaler_v2", env("RAY_enable_autoscaler_v2"), "when enableInTreeAutoscaling is false"),
    Case(16, "suspended workers under the autoscaler", {"workers": {"suspend": True}, **SCALING}, UNKNOWN, put(f"{GROUP}.suspend", True),
         "cannot be suspended with Autoscaler", base=SCALING),
    Case(16, "the operator's own command", {"head": {"env": [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD", "value": "x"}]}},
         "which the operator sets"),
    Case(17, "fault tolerance by annotation", {"run": {"annotations": {"ray.io/ft-enabled": "true"}}}, "run.annotations sets ray.io/ft",
         both(REDIS, put("metadata.annotations", {"ray.io/ft-enabled": "true"})), "both set"),
    Case(17, "external storage by annotation", {"run": {"annotations": {"ray.io/external-storage-namespace": "x"}}},
         "run.annotations sets ray.io/external", both(REDIS, put("metadata.annotations", {"ray.io/external-storage-namespace": "x"})),
         "external-storage-namespace"),
    Case(17, "Redis by variable", {"head": {"env": [{"name": "RAY_REDIS_ADDRESS", "value": "x"}]}}, "head.env sets RAY_REDIS_ADDRESS",
         env("RAY_REDIS_ADDRESS"), "implicitly enables GCS fault tolerance"),
    Case(17, "Redis by variable beside options", {"pods": {"env": [{"name": "RAY_REDIS_ADDRESS", "value": "x"}]}},
         "pods.env sets RAY_REDIS_ADDRESS", both(REDIS, env("RAY_REDIS_ADDRESS")), "cannot set `RAY_REDIS_ADDRESS`"),
    Case(17, "Redis' password by variable", {"head": {"env": [{"name": "REDIS_PASSWORD", "value": "x"}]}}, "head.env sets REDIS_PASSWORD",
         both(REDIS, env("REDIS_PASSWORD")), "cannot set `REDIS_PASSWORD`"),
    Case(17, "Redis' password by parameter", {"head": {"rayStartParams": {"redis-password": "x"}}}, "sets redis-password",
         both(REDIS, put(f"{HEAD}.rayStartParams.redis-password", "x")), "cannot set `redis-password`"),
    Case(17, "Redis' user by variable", {"head": {"env": [{"name": "REDIS_USERNAME", "value": "x"}]}}, "head.env sets REDIS_USERNAME",
         env("REDIS_USERNAME"), "cannot set redis username"),
    Case(17, "Redis' user by parameter", {"head": {"rayStartParams": {"redis-username": "x"}}}, "sets redis-username",
         put(f"{HEAD}.rayStartParams.redis-username", "x"), "cannot set redis username"),
    Case(17, "fault tolerance options", {"gcsFaultToleranceOptions": {}}, UNKNOWN),
    Case(18, "the operator's network policy", {"networkPolicy": {"mode": "DenyAll"}}, UNKNOWN, put(f"{CLUSTER}.networkPolicy", {}),
         "unknown field"),
    Case(18, "TLS by the operator", {"tlsOptions": {"enabled": True}}, UNKNOWN, put(f"{CLUSTER}.tlsOptions", {}), "unknown field"),
    Case(18, "history server", {"historyServerOptions": {}}, UNKNOWN, put(f"{CLUSTER}.historyServerOptions", {}), "unknown field"),
    Case(19, "name of the ServiceAccount too long", {"serviceAccount": {"name": "a" * 51}}, "maxLength"),
    Case(20, "submitter without containers", {"submitter": {"containers": []}}, UNKNOWN),
    Case(20, "submitter that restarts", {"submitter": {"restartPolicy": "Always"}}, UNKNOWN),
    Case(21, "queue and a cluster that stays", deletion(*ENDS, queue={"name": "q"}), "which Kueue refuses",
         queued=strategy(*ENDS), kueue="should delete the cluster after finishing"),
    Case(21, "queue and suspended", {"queue": {"name": "q"}, "run": {"suspend": True}}, "but Kueue decides whether"),
    Case(21, "queue and autoscaling", {"queue": {"name": "q"}, **SCALING}, "set queue.elastic=true",
         queued=put(f"{CLUSTER}.enableInTreeAutoscaling", True), kueue="only use autoscaling when workload slicing is enabled"),
    Case(21, "queue and a shared cluster", {"queue": {"name": "q"}, **SHARED}, "set the queue in the raycluster release"),
    Case(21, "queue of an impossible name", {"queue": {"name": "a..b"}}, "pattern",
         queued=label("queue-name", "a..b"), kueue="RFC 1123 subdomain"),
    Case(21, "time in the queue's terms that is none", {"run": {"labels": {"kueue.x-k8s.io/max-exec-time-seconds": "0"}}},
         "whole seconds above 0", queued=label("max-exec-time-seconds", "0"), kueue="should be greater than 0"),
    Case(21, "workload of one's own", {"run": {"labels": {"kueue.x-k8s.io/prebuilt-workload-name": "A"}}}, "Kueue counts what",
         queued=label("prebuilt-workload-name", "A"), kueue="RFC 1123 subdomain"),
    Case(21, "gate without a domain", {"run": {"annotations": {"kueue.x-k8s.io/admission-gated-by": "budget"}}}, "example.com/gate",
         queued=put("metadata.annotations", {"kueue.x-k8s.io/admission-gated-by": "budget"}), kueue="domain-prefixed path"),
    Case(21, "two topologies", {"pods": {"annotations": topology(required="zone")}, "workers": {"annotations": topology(preferred="rack")}},
         "ask Kueue for 2 topologies", queued=put(f"{GROUP}.template.metadata.annotations", topology(required="zone", preferred="rack")),
         kueue="must not contain more than one topology annotation"),
    Case(21, "topology that is no label", {"workers": {"annotations": topology(required="a b")}}, "which is not a valid node label",
         queued=put(f"{GROUP}.template.metadata.annotations", topology(required="a b")), kueue="name part must consist of"),
    Case(21, "topology by yes and no", {"head": {"annotations": topology(unconstrained="yes")}}, 'accepts "true" or "false"',
         queued=put(f"{HEAD}.template.metadata.annotations", topology(unconstrained="yes")), kueue="must be a boolean value"),
    Case(21, "slice of unknown size", {"workers": {"annotations": topology(**{"slice-required": "rack"})}}, "not in groups or slices",
         queued=put(f"{GROUP}.template.metadata.annotations", topology(**{"slice-required": "rack"})), kueue="must be set when"),
    Case(21, "group of topology without one", {"workers": {"annotations": {"kueue.x-k8s.io/podset-group-name": "a"}}},
         "not in groups or slices", queued=put(f"{GROUP}.template.metadata.annotations", {"kueue.x-k8s.io/podset-group-name": "a"}),
         kueue="may not be set when neither"),
    Case(21, "queue by label", {"run": {"labels": {"kueue.x-k8s.io/queue-name": "q"}}}, "use queue.name"),
    Case(22, "entrypoint of one's own", {"entrypoint": "python x.py; rm -rf /"}, UNKNOWN),
    Case(23, "one and a half GPUs", {"job": {"inference": {"gpus_per_actor": 1.5}}}, "use 1 or 2"),
    Case(23, "actor larger than a worker", {"job": {"inference": {"gpus_per_actor": 2}}}, "no worker can hold an actor"),
    Case(23, "GPUs left over", {"job": {"inference": {"gpus_per_actor": 3}}, "workers": {"gpusPerWorker": 4}}, "1 GPUs of each worker"),
    Case(23, "a third of a GPU", {"job": {"inference": {"gpus_per_actor": 1 / 3}}}, "use 0.3333"),
    Case(23, "too few CPUs for actors", {"workers": {"cpus": 1}, "job": {"inference": {"cpus_per_actor": 2}}}, "its 1 actors need 2"),
    Case(23, "CPU workers that no task fits", {"cpuWorkers": {"replicas": 2, "cpus": 1}, "job": {"preprocess": {"cpus_per_task": 2}}},
         "CPU workers would never run a task"),
    Case(23, "no CPU for a task", {"workers": {"tasksPerWorker": 0}}, "no image would ever be prepared"),
    Case(23, "GPUs by parameter", {"workers": {"rayStartParams": {"num-gpus": "2"}}}, "use workers.gpusPerWorker instead"),
    Case(24, "object store and heap larger than memory", {"workers": {"memoryGiB": 10}}, "the object store need 13"),
    Case(24, "object store too small", {"head": {"memoryGiB": 1, "objectStorePercent": 5}}, "head has 51 MiB of object store"),
    Case(24, "object store by parameter", {"head": {"rayStartParams": {"object-store-memory": "1"}}}, "use head.objectStorePercent"),
    Case(25, "variable given twice", {"pods": {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}}, "has A 2 times"),
    Case(25, "volume given twice", {"pods": {"volumes": [{"name": "job", "emptyDir": {}}]}}, "has a second volume job"),
    Case(25, "path mounted twice", {"pods": {"volumeMounts": [{"name": "job", "mountPath": "/tmp"}]}}, "mounts /tmp a second time"),  # noqa: S108
    Case(25, "mount without a volume", {"workers": {"volumeMounts": [{"name": "a", "mountPath": "/a"}]}}, "there is no such volume"),
    Case(25, "the chart's volume mounted again", {"pods": {"volumeMounts": [{"name": "model-cache", "mountPath": "/models"}]}},
         "a volume of the chart that"),
    Case(25, "cache where another volume is", {"modelCache": {"mountPath": "/tmp"}}, "where the chart mounts another volume"),  # noqa: S108
    Case(25, "variable with two values", {"pods": {"env": [{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}]}},
         "not' failed"),
    Case(25, "variables of nothing", {"pods": {"envFrom": [{}]}}, "oneOf"),
    Case(25, "volume of no Secret", {"pods": {"volumes": [{"name": "a", "secret": {}}]}}, "missing propert"),
    Case(25, "host's folder", {"pods": {"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}}, UNKNOWN),
    Case(26, "deadlines the wrong way round", {"run": {"activeDeadlineSeconds": 60}}, "preRunningDeadlineSeconds is 1800"),
    Case(26, "more time to wait than to end",
         {"run": {"activeDeadlineSeconds": 1801}, "autoscaling": {"enabled": True, "waitSeconds": 1801}},
         "autoscaling.waitSeconds is 1801"),
    Case(27, "job that deletes itself", deletion(rule("DeleteSelf", jobStatus="FAILED")), "value must be one of"),
    Case(0, "a schedule whose runs have one output", {"schedule": {"cron": "@daily"}}, "all runs but the first would find their job done"),
    Case(0, "the time of a run without a schedule", {"job": {"output": {"uri": "s3://o/{time:%Y}/"}}}, "only runs of a schedule replace"),
    Case(0, "a schedule of suspended runs",
         {"schedule": {"cron": "@daily"}, "job": {"output": {"uri": "s3://o/{time:%Y}/"}}, "run": {"suspend": True}},
         "set schedule.suspend to start none"),
    Case(0, "a preflight before a schedule",
         {"schedule": {"cron": "@daily"}, "job": {"output": {"uri": "s3://o/{time:%Y}/"}}, "preflightHook": {"enabled": True}},
         "set preflightHook.enabled=false, and job.preflight.enabled=true"),
    Case(0, "a preflight's pod beside a shared cluster", {"clusterSelector": "shared", "preflightHook": {"enabled": True}},
         "its pod would request GPUs in addition to that cluster's"),
    Case(0, "a schedule of six fields", {"schedule": {"cron": "0 30 2 * * *"}}, "does not match pattern"),
    Case(0, "no input", {"job": {"input": {"uris": []}}}, "job.input.uris is empty"),
    Case(0, "two inputs", {"job": {"input": {"manifest": "s3://m.csv"}}}, "are both given"),
    Case(0, "no output", {"job": {"output": {"uri": ""}}}, "job.output.uri is empty"),
    Case(0, "output that is lost with the pod", {"job": {"output": {"uri": "/data/out"}}}, "a path that is lost with the pod"),
    Case(0, "output that is lost with the pod, as a URI", {"job": {"output": {"uri": "file:///tmp/out"}}},
         "a path that is lost with the pod"),
    Case(0, "output on a volume that is lost with the pod",
         {"job": {"output": {"uri": "/data/out"}}, "pods": {"volumes": [{"name": "data", "emptyDir": {}}],
                                                            "volumeMounts": [{"name": "data", "mountPath": "/data"}]}},
         "a path that is lost with the pod"),
    Case(0, "job too long to be sent", {"job": {"input": {"uris": [f"s3://bucket/{i:030}/" for i in range(1000)]}}, **SHARED},
         "at most 32768 bytes can be sent"),
    Case(0, "alerts that nothing is scraped for", {"monitoring": {"rules": {"enabled": True}}}, "set monitoring.podMonitor.enabled=true"),
    Case(0, "scraping of a shared cluster", {"monitoring": {"podMonitor": {"enabled": True}}, **SHARED}, "no Ray pods to scrape"),
    Case(0, "alerts for a shared cluster", {"monitoring": {"rules": {"enabled": True}}, **SHARED}, "set it in the raycluster release"),
    Case(0, "tag within the repository", {"image": {"repository": "registry.example/batch-inference:1.2"}}, "pattern"),
    Case(0, "taint tolerated twice over", {"pods": {"tolerations": [{"operator": "Exists", "value": "x"}]}}, "not' failed"),
    Case(0, "skew of nothing", {"pods": {"topologySpreadConstraints": [
        {"maxSkew": 0, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]}}, "minimum"),
    Case(0, "dashboard that nobody reaches", {"head": {"rayStartParams": {"dashboard-host": "127.0.0.1"}}}, "which the operator sets"),
    Case(0, "label that the release has", {"run": {"labels": {"app.kubernetes.io/managed-by": "me"}}}, "by which the release is selected"),
    Case(0, "limit of errors by its earlier key", {"job": {"errors": {"min_sample": 2000000}}},
         "job.errors.min_sample has a new name: write job.errors.min_rows: 2000000"),
    Case(0, "column of images by its earlier key", {"job": {"input": {"bytes_column": "image & more"}}},
         'job.input.bytes_column has a new name: write job.input.image_column: "image & more"'),
    Case(0, "golden images by their earlier key", {"job": {"preflight": {"golden": "s3://b/golden.parquet"}}},
         'job.preflight.golden has a new name: write job.preflight.golden_manifest: "s3://b/golden.parquet"'),
    Case(0, "exact decoder by its earlier key", {"job": {"preprocess": {"exact": True, "gpu_jpeg": False}}},
         "job.preprocess.exact has a new name: write job.preprocess.decoder: exact"),
    Case(0, "decoder on GPUs by its earlier key", {"job": {"preprocess": {"gpu_jpeg": True}}},
         "job.preprocess.gpu_jpeg has a new name: write job.preprocess.decoder: gpu"),
    Case(0, "both decoders by their earlier keys", {"job": {"preprocess": {"exact": True, "gpu_jpeg": True}}},
         "job.preprocess.exact has a new name: write job.preprocess.decoder: exact or job.preprocess.decoder: gpu"),
    Case(0, "default decoder by its earlier key", {"job": {"preprocess": {"exact": False}}},
         "job.preprocess.exact has a new name: write job.preprocess.decoder: fast"),
    Case(0, "mistyped key of the job", {"job": {"inference": {"actor": 2}}}, UNKNOWN),
    Case(0, "mistyped toleration", {"pods": {"tolerations": [{"keys": "gpu"}]}}, UNKNOWN),
    Case(0, "section set to nothing", {"job": {"inference": None}}, "missing propert"),
]  # fmt: skip


def table() -> str:
    """Return the text of RULES.md: each rule with its cases."""
    lines = [
        "# What the charts refuse",
        "",
        "Each line is a case of `test_rules.py`: values that the chart refuses when it renders. If the last column says so, the "
        "same mistake,",
        "written by hand into a manifest, was refused by KubeRay's own validation (the oracle), so the rule is the operator's; or, "
        "in a queue,",
        "by Kueue's webhook (`tests/platform`).",
        "",
        "Written by `python -m tests.charts.rules`; a test compares.",
    ]
    for number, rule in RULES.items():
        lines += [
            "",
            f"## {number}. {rule}",
            "",
            "| case | the chart says | the operator says, or Kueue |",
            "| --- | --- | --- |",
        ]
        for case in CASES:
            if case.rule == number:
                kueue = f"Kueue: … {case.kueue} …" if case.queued else "nothing"
                said = f"… {case.operator} …" if case.manifest else kueue
                lines.append(f"| {case.title} | … {case.says} … | {said} |".replace("\n", " "))
    return "\n".join(lines) + "\n"


TABLE = Path(__file__).with_name("RULES.md")

if __name__ == "__main__":
    TABLE.write_text(table())
