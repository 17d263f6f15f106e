"""Machine failures from sensor readings: the AI4I 2020 predictive maintenance table (Matzka 2020, UCI, CC BY 4.0)."""

from forja.recipes.base import Column, CsvSamples, Derived, Gate, Mlp, Recipe, Source, Split, Table, Training

RECIPE = Recipe(
    name="ai4i",
    team="maintenance",
    owner="maintenance-team",
    description="Tells from one reading of a milling machine's sensors whether it is about to fail.",
    source=Source(topic="maintenance.ai4i", payload="json", samples=CsvSamples(key="UDI", label="Machine failure")),
    dataset=Table(
        columns=(
            Column(name="Type", values=("L", "M", "H")),
            Column(name="Air temperature [K]", low=250, high=350),
            Column(name="Process temperature [K]", low=250, high=400),
            Column(name="Rotational speed [rpm]", low=0, high=10_000),
            Column(name="Torque [Nm]", low=0, high=500),
            Column(name="Tool wear [min]", low=0, high=1_000),
        ),
        derived=(
            Derived(name="Power [W]", sql='"Torque [Nm]" * "Rotational speed [rpm]" * 0.10471975511965977'),
            Derived(name="Temperature rise [K]", sql='"Process temperature [K]" - "Air temperature [K]"'),
            Derived(name="Strain [Nm min]", sql='"Torque [Nm]" * "Tool wear [min]"'),
        ),
        classes=("0", "1"),
        split=Split(validation=0.15, test=0.2),
    ),
    model=Mlp(hidden=(256,), bins=32),
    training=Training(epochs=20, batch_size=128, learning_rate=1e-2, weight_decay=0.1),
    metric="average_precision",
    gates=(Gate(metric="average_precision", least=0.5), Gate(metric="average_precision", max_drop=0.02)),
)
