"""Small colour photographs of ten kinds of things (CIFAR-10, Krizhevsky 2009), from a folder or zip of class folders of JPEGs."""

from forja.recipes.base import ClassFolders, Cnn, Gate, Images, Optimize, Recipe, Source, Split, Training

RECIPE = Recipe(
    name="cifar10",
    team="vision",
    owner="vision-team",
    description="Tells what a 32x32 colour photograph shows, of ten kinds of things.",
    source=Source(topic="vision.cifar10", payload="image", samples=ClassFolders()),
    dataset=Images(
        height=32, width=32, channels=3, split=Split(validation=0.1, test=0.1),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    model=Cnn(width=16, blocks=4, dropout=0.0),
    training=Training(epochs=16, batch_size=128, learning_rate=6e-3, weight_decay=5e-2, shift=3, flip=True),
    optimize=Optimize(
        variants=("fp32", "fp16", "bf16", "int8", "mixed"), calibration="entropy", calibration_samples=500, max_batch=64,
    ),
    gates=(
        Gate(metric="accuracy", least=0.75), Gate(metric="accuracy", max_drop=0.01, confident=True),
        Gate(metric="class_recall", max_drop=0.05, confident=True), Gate(metric="agreement", least=0.95),
        Gate(metric="calibration_error", most=0.1),
    ),
)  # fmt: skip
