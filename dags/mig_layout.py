"""### How the GPUs of a node are cut: from one MIG layout to another, and back when it fails.

Start it with a **node** and a **layout**. The node gives up its pods that use a GPU, is cut by the GPU operator's mig-manager, is looked
at for itself, and takes pods again. A layout that is in force already ends the run after *assert*, as a success.

**When a run fails**, *revert* brings the layout before back and makes the node schedulable; the run counts as failed. If *revert* fails
too, the node stays cordoned, and its log says what it offers and what is missing: clear *revert* once the cause is gone. A run that was
ended by hand is taken back with `./forja mig revert --node NODE`, five minutes after its last sign of life.

**Needs** the GPU operator with `mig.strategy=mixed` and the ConfigMap of `k8s/mig/layouts.yaml`, the rights of `k8s/access/mig.yaml`, and
the Airflow connection `forja_mig`. A node under a PodDisruptionBudget that lets no pod go is left as it was.

| task | does | leaves |
| --- | --- | --- |
| assert | looks whether the layout is in force | the differences |
| plan | places every instance, names the pods that must go | a drawing in the log and in the lake |
| cordon | takes the node: one change at a time | the record on the node |
| drain | evicts pods that use its GPUs, budgets kept | their names |
| apply | asks mig-manager for the layout, waits for its answer | the label `nvidia.com/mig.config` |
| verify | compares what the node offers, runs a pod on a slice | the proof |
| uncordon | gives the node back | a record in the lake |
| revert | on failure: the layout before, the node schedulable | a record in the lake |
"""

from airflow.sdk import DAG

from forja_airflow.mig import params, settings, step

with DAG("mig_layout", schedule=None, params=params(), **settings(doc_md=__doc__)):
    cordon, drain, apply, verify = step("cordon"), step("drain"), step("apply"), step("verify")

    step("assert") >> step("plan") >> cordon >> drain >> apply >> verify >> step("uncordon")
    [cordon, drain, apply, verify] >> step("revert")
