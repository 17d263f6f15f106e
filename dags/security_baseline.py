"""### Security baseline: what tenants' pods may be, reach and use, proven and kept.

Three controls for each tenant of the site file: **pod-security** (the standard *restricted*), **network** (nothing comes in or goes out
but what the site file allows) and **gpu-quota** (every GPU resource that there is has a limit). A control passes only when calls that
must succeed do, and their twins, which differ in one thing, are refused with that control's own words.

**When a run fails**, *assert_after* says which control of which tenant, and what got through. *apply* mends what was changed in the
cluster; what it can't mend, a missing network plugin or a new tenant's namespace, is an administrator's work: docs/cluster.md.
Clearing a task is always safe: applying twice changes nothing, and proofs clean up after themselves.

**By hand:** `./forja baseline assert | plan | apply | remove`, with the cluster's KUBECONFIG.

| task | does | leaves |
| --- | --- | --- |
| assert_before | proves each control; informs only | verdicts, a record in the lake |
| plan | compares the baseline with the cluster | the difference, field by field |
| apply | makes the cluster what the baseline says | what it changed |
| assert_after | proves each control; anything but *pass* fails the run | verdicts, a record in the lake |
"""

from airflow.sdk import DAG

from forja_airflow.baseline import ApplyOperator, AssertOperator, PlanOperator, schedule, settings

with DAG("security_baseline", schedule=schedule(), **settings(doc_md=__doc__)):
    before = AssertOperator(task_id="assert_before", strict=False)
    plan = PlanOperator(task_id="plan")
    apply = ApplyOperator(task_id="apply")
    after = AssertOperator(task_id="assert_after", strict=True)

    before >> plan >> apply >> after
