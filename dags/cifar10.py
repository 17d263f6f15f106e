"""### CIFAR-10: from photographs in Kafka to a model behind Envoy.

**`cifar10_ingest`** reads new events from Kafka into the raw table. Kafka's doorbell starts it; a run that finds nothing new is
*skipped*. **`cifar10`** makes a model of one version of that table and puts it live. New data start it, and a person may.

**When a run fails**, the live model goes on serving: only the last task moves traffic, and only after its proof. The failed
task's log ends with the reason. What to do says the task's documentation: click its name in the grid, then the open book.
Clearing it is always safe: work that is done is adopted, not repeated.

**To go back** to the version before: trigger with the `raw` that the *transform* receipt of its run names.

| task | does | leaves |
| --- | --- | --- |
| admit | lets the run pass or skips it, pins the version of the raw table | the reason |
| transform | checks, splits and packs the samples | shards, statistics |
| train | trains, all ranks of one machine | weights, a run in MLflow |
| register | evaluates on the test split, exports to ONNX | a model version, alias `challenger` |
| optimize | one variant each: ONNX, engine, accuracy | what the gate judges |
| gate | applies the recipe's rules, picks the variant or refuses | verdicts |
| release | loads it into the idle Triton slot, proves it, moves traffic | alias `champion` |
"""

from airflow.sdk import DAG, TaskGroup

from forja.recipes.cifar10 import RECIPE
from forja_airflow.dag import admit, doorbell, params, raw_asset, schedule, settings, stage

with DAG(f"{RECIPE.name}_ingest", schedule=[doorbell(RECIPE)], max_active_runs=1, **settings(RECIPE, doc_md=__doc__)):
    stage("ingest", RECIPE, outlets=[raw_asset(RECIPE)])

with DAG(RECIPE.name, schedule=schedule(RECIPE), params=params(RECIPE), **settings(RECIPE, doc_md=__doc__)):
    with TaskGroup("data", prefix_group_id=False, tooltip="From raw events to training-ready shards"):
        admitted = admit(RECIPE)
        transform = stage("transform", RECIPE, raw=admitted)
    with TaskGroup("model", prefix_group_id=False, tooltip="From shards to a registered model"):
        train = stage("train", RECIPE, dataset=transform)
        register = stage("register", RECIPE, dataset=transform, training=train)
    with TaskGroup("engines", prefix_group_id=False, tooltip="Variants of the model, and the rules that choose one"):
        optimize = stage("optimize", RECIPE, variants=RECIPE.optimize.variants, dataset=transform, model=register)
        gate = stage("gate", RECIPE, optimize=optimize)
    with TaskGroup("serving", prefix_group_id=False, tooltip="From a chosen variant to live traffic"):
        release = stage("release", RECIPE, gate=gate, model=register)

    admitted >> transform >> train >> register >> optimize >> gate >> release
