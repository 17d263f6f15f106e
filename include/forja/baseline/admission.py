"""Proofs by admission: Pod Security and quotas, asked with dry runs, which pass all of admission and store nothing."""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from forja.baseline import manifests, resources
from forja.baseline.probes import Answer, Finding, Outcome, Probe, Verdict, judge
from forja.errors import ForjaError
from forja.kube import ApiError, Kube, Object
from forja.sites import Site, Tenant

SETTLE_S = 5.0
"""Seconds that a call gets to come out as it must: the API server learns of a new label or quota a moment after it was written."""
THREADS = 2

UNLIMITED = (
    "a node offers a resource that no quota names, so it is unlimited: name it under resources of [baseline] in the site file, 0 for none, "
    "or under ignore when it is no GPU"
)

SECURITY = ("spec", "containers", 0, "securityContext")
POD_SECURITY: Mapping[str, tuple[tuple[str | int, ...], Any, str]] = {
    "the node's network": (("spec", "hostNetwork"), True, r"host namespaces \(hostNetwork=true\)"),
    "the node's processes": (("spec", "hostPID"), True, r"host namespaces \(hostPID=true\)"),
    "a folder of the node": (("spec", "volumes"), [{"name": "node", "hostPath": {"path": "/"}}], r"hostPath"),
    "a port of the node": (("spec", "containers", 0, "ports"), [{"containerPort": 8000, "hostPort": 8000}], r"hostPort"),
    # Kubernetes takes no privileged container that may not escalate, so here two fields differ.
    "a privileged container": (SECURITY, {"privileged": True, "capabilities": {"drop": ["ALL"]}}, r"\bprivileged \("),
    "privilege escalation": ((*SECURITY, "allowPrivilegeEscalation"), True, r"allowPrivilegeEscalation != false"),
    "root by number": (("spec", "securityContext", "runAsUser"), 0, r"runAsUser=0"),
    "root by default": (("spec", "securityContext", "runAsNonRoot"), None, r"runAsNonRoot != true"),
    "no seccomp profile": (("spec", "securityContext", "seccompProfile"), None, r"seccompProfile"),
    "all capabilities kept": ((*SECURITY, "capabilities"), None, r"unrestricted capabilities"),
    "a capability added": ((*SECURITY, "capabilities", "add"), ["NET_ADMIN"], r"capabilities"),
    "an init container without limits": (("spec", "initContainers"), [{"name": "i", "image": "none:1"}], r"container \"i\""),
}
"""What the standard refuses: the field that the twin has otherwise (None: not at all), and the standard's own words for it."""

Call = Callable[[], Answer]
Case = tuple[Probe, Call]


def restricted_pod(name: str, namespace: str, image: str) -> Object:
    """The least pod that meets the Pod Security Standard ``restricted``."""
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": False, "terminationGracePeriodSeconds": 1,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "probe", "image": image, "imagePullPolicy": "IfNotPresent",
                "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
                "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "96Mi"}},
            }],
        },
    }  # fmt: skip


def changed(manifest: Object, path: tuple[str | int, ...], value: Any) -> Object:
    """A copy of ``manifest`` with one field set, or without it when ``value`` is None."""
    made = copy.deepcopy(manifest)
    at: Any = made
    for step in path[:-1]:
        at = at[step]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return made


def ask(kube: Kube, manifest: Object) -> Answer:
    """Create an object as a dry run: 403 is a refusal, any other error says nothing about a control."""
    began = time.monotonic()
    what = f"create {manifest['kind']} in {manifest['metadata']['namespace']}, dry run"
    try:
        kube.create(manifest, dry_run=True)
    except ApiError as error:
        outcome = Outcome.REFUSED if error.status == 403 else Outcome.ERRED
        return Answer(outcome=outcome, said=f"{what}: {error.status} {error.reason}: {error.message}", seconds=time.monotonic() - began)
    except ForjaError as error:
        return Answer(outcome=Outcome.ERRED, said=f"{what}: {error}", seconds=time.monotonic() - began)
    return Answer(outcome=Outcome.SUCCEEDED, said=f"{what}: accepted", seconds=time.monotonic() - began)


def pod_security(kube: Kube, site: Site, tenant: Tenant, image: str) -> list[Case]:
    """A pod that meets the standard of the very version that the baseline pins, and twins that each break it in one way."""
    pod = restricted_pod("forja-probe", tenant.namespace, image)
    good = "a pod that meets the standard"
    standard = rf'violates PodSecurity "{re.escape(manifests.standard(site, tenant))}": '
    cases: list[Case] = [(_probe(tenant, "pod-security", good, refused=False, reason=standard), lambda: ask(kube, pod))]
    for name, (path, value, words) in POD_SECURITY.items():
        twin = changed(pod, path, value)
        probe = _probe(tenant, "pod-security", name, refused=True, reason=f"{standard}.*{words}", witnesses=(good,))
        cases.append((probe, lambda twin=twin: ask(kube, twin)))  # type: ignore[misc]
    return cases


def gpu_quota(kube: Kube, site: Site, tenant: Tenant, image: str) -> list[Case]:
    """What the tenant may ask for and one more; nothing of what it may not; no way around."""
    baseline, _ = manifests.parts(site)
    pod = restricted_pod("forja-probe", tenant.namespace, image)
    none = "a pod without a GPU"
    limit = r"exceeded quota: .*requests\.nvidia\.com/"
    cases: list[Case] = [(_probe(tenant, "gpu-quota", none, refused=False, reason=limit), lambda: ask(kube, pod))]
    granted = resources.granted(tenant, baseline.resources)
    for name, most in granted.items():
        if most:
            cases += _granted(kube, tenant, pod, name, most)
    barred = [name for name, most in granted.items() if not most]
    cases += [
        (_probe(tenant, "gpu-quota", "GPU resources that aren't granted", refused=True, reason=limit, witnesses=(none,)),
         lambda: ask_each(kube, pod, barred)),
        (_probe(tenant, "gpu-quota", "resources that nodes offer are named", refused=False, reason="unlimited", wrong=UNLIMITED),
         lambda: ask_nodes(kube, tenant.namespace, baseline.ignore)),
        *_ways_around(kube, tenant, none),
    ]  # fmt: skip
    return [(probe, partial(in_force, kube, tenant.namespace, call)) for probe, call in cases]


def _ways_around(kube: Kube, tenant: Tenant, none: str) -> list[Case]:
    """A GPU that no extended resource counts, and Services that lead to models beside the gateway."""
    over, inside = r"exceeded quota: \S+, requested: .*", "a Service inside the cluster"
    claim = {
        "apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": {"name": "forja-probe", "namespace": tenant.namespace},
        "spec": {"devices": {"requests": [{"name": "gpu", "exactly": {"deviceClassName": "gpu.nvidia.com"}}]}},
    }  # fmt: skip
    return [
        (_probe(tenant, "gpu-quota", "a GPU by a ResourceClaim", refused=True, reason=f"{over}count/resourceclaims", witnesses=(none,)),
         lambda: ask(kube, claim)),
        (_probe(tenant, "gpu-quota", inside, refused=False, reason="exceeded quota: .*services"),
         lambda: ask(kube, _service(tenant, "ClusterIP"))),
        (_probe(tenant, "gpu-quota", "a Service on nodes' ports", refused=True, reason=f"{over}services.nodeports", witnesses=(inside,)),
         lambda: ask(kube, _service(tenant, "NodePort"))),
        # Without ports of nodes, whose own limit would refuse it first.
        (_probe(tenant, "gpu-quota", "a Service with a load balancer", refused=True, reason=f"{over}services.loadbalancers",
                witnesses=(inside,)),
         lambda: ask(kube, _service(tenant, "LoadBalancer", allocateLoadBalancerNodePorts=False))),
    ]  # fmt: skip


def in_force(kube: Kube, namespace: str, call: Call) -> Answer:
    """What a call answers once admission goes by the quotas as they are written: it goes by their status, which follows a moment later."""
    try:
        quotas = kube.list("ResourceQuota", namespace)
    except ForjaError as error:
        return Answer(outcome=Outcome.ERRED, said=str(error))
    late = [q["metadata"]["name"] for q in quotas if q["spec"].get("hard") != (q.get("status") or {}).get("hard")]
    if late:
        return Answer(outcome=Outcome.ERRED, said=f"the quota controller hasn't brought into force yet: {', '.join(late)}")
    return call()


def _granted(kube: Kube, tenant: Tenant, pod: Object, name: str, most: int) -> list[Case]:
    """All that is left of one resource, and one more than that."""
    short = name.removeprefix(resources.VENDOR)
    reason = rf"exceeded quota: .*requests\.{re.escape(name)}="
    fits, over = f"all that is left of {short}", f"one more than is left of {short}"

    def beside(more: int, surprise: Outcome) -> Answer:
        """Ask for what is left and ``more``. A quota in use changes: before a surprise is believed, what is in use is read again."""
        try:
            used = _used(kube, tenant.namespace, name)
            wanted = max(most - used, 0) + more
            answer = ask(kube, _with(pod, {name: wanted} if wanted else {}))
            now = _used(kube, tenant.namespace, name) if answer.outcome is surprise else used
        except ForjaError as error:
            return Answer(outcome=Outcome.ERRED, said=str(error))
        said = f"{wanted} of {short} while {used} of {most} are in use: {answer.said}"
        if now != used:
            return Answer(outcome=Outcome.ERRED, said=f"use changed meanwhile, {used} -> {now}; {said}")
        return dataclasses.replace(answer, said=said)

    return [
        (_probe(tenant, "gpu-quota", fits, refused=False, reason=reason), lambda: beside(0, Outcome.REFUSED)),
        (_probe(tenant, "gpu-quota", over, refused=True, reason=reason, witnesses=(fits,)), lambda: beside(1, Outcome.SUCCEEDED)),
    ]


def _used(kube: Kube, namespace: str, name: str) -> int:
    """How many of a resource the namespace's pods have asked for, as its quotas count them."""
    quotas = kube.list("ResourceQuota", namespace)
    return max((int((q.get("status") or {}).get("used", {}).get(f"requests.{name}", 0)) for q in quotas), default=0)


def ask_each(kube: Kube, pod: Object, names: Iterable[str]) -> Answer:
    """Ask for one of each GPU resource in one pod, then again for those that the refusal didn't list, until it lists all.

    A refusal lists what exceeds one quota, each resource by name; what a pod gets that asks for the rest alone is unlimited.
    """
    rest, first = set(names), ""
    while rest:
        answer = ask(kube, _with(pod, dict.fromkeys(sorted(rest), 1)))
        if answer.outcome is Outcome.SUCCEEDED:
            return Answer(outcome=Outcome.SUCCEEDED, said=f"accepted, so not limited: {', '.join(sorted(rest))}")
        requested = re.search(r"requested: (.*?), used: ", answer.said)
        listed = {r.removeprefix("requests.").partition("=")[0] for r in requested[1].split(",")} if requested else set()
        if answer.outcome is Outcome.ERRED or not listed & rest:
            return answer
        rest -= listed
        first = first or answer.said
    return Answer(outcome=Outcome.REFUSED, said=first)


def ask_nodes(kube: Kube, namespace: str, ignored: Iterable[str] = ()) -> Answer:
    """Whether a quota of the namespace names every GPU resource that a node offers, but those that the site file says are none."""
    try:
        quotas = kube.list("ResourceQuota", namespace)
        found = resources.unnamed(kube.list("Node"), [key for q in quotas for key in q["spec"].get("hard") or {}], ignored)
    except ForjaError as error:
        return Answer(outcome=Outcome.ERRED, said=str(error))
    if not found:
        return Answer(outcome=Outcome.SUCCEEDED, said="allocatable of all nodes against the quotas: every GPU resource is named")
    listed = "; ".join(f"{name} of {', '.join(nodes)}" for name, nodes in found.items())
    return Answer(outcome=Outcome.REFUSED, said=f"unlimited, since no quota names it: {listed}")


def run(cases: list[Case], settle_s: float = SETTLE_S) -> list[Finding]:
    """Make the calls, those that come out otherwise than they must again until they have had their time, and judge them."""
    deadline = time.monotonic() + settle_s
    calls = {probe.name: call for probe, call in cases}
    again, answers = set(calls), dict[str, Answer]()
    with ThreadPoolExecutor(THREADS) as pool:
        while True:
            names = sorted(again)
            answers.update(zip(names, pool.map(lambda name: calls[name](), names), strict=True))
            findings = [judge(probe, answers) for probe, _ in cases]
            again = {n for f in findings if f.verdict is not Verdict.PASS for n in (f.probe.name, *f.probe.witnesses)}
            if not again or time.monotonic() > deadline:
                return findings
            time.sleep(0.5)


def _probe(tenant: Tenant, control: str, name: str, *, refused: bool, reason: str, **more: Any) -> Probe:
    return Probe(team=tenant.team, control=control, name=name, refused=refused, reason=reason, **more)


def _with(pod: Object, wanted: Mapping[str, int]) -> Object:
    limits = {**pod["spec"]["containers"][0]["resources"]["limits"], **{name: str(count) for name, count in wanted.items()}}
    return changed(pod, ("spec", "containers", 0, "resources", "limits"), limits)


def _service(tenant: Tenant, kind: str, **more: Any) -> Object:
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "forja-probe", "namespace": tenant.namespace},
        "spec": {"type": kind, "selector": {"app": "none"}, "ports": [{"port": 80}], **more},
    }  # fmt: skip
