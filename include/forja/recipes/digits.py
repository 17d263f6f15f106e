"""Handwritten digits: the recipe to start from; it needs no download and no GPU."""

from forja.recipes.base import Cnn, Gate, Images, Recipe, SklearnDigits, Source, Training

RECIPE = Recipe(
    name="digits",
    team="vision",
    owner="vision-team",
    description="Reads a handwritten digit from an 8x8 grey image.",
    source=Source(topic="vision.digits", payload="image", samples=SklearnDigits()),
    dataset=Images(height=8, width=8, channels=1, classes=tuple("0123456789")),
    model=Cnn(width=32, blocks=2),
    training=Training(epochs=15, batch_size=64, learning_rate=5e-3, shift=1, rotate=10),
    gates=(Gate(metric="accuracy", least=0.95), Gate(metric="accuracy", max_drop=0.01), Gate(metric="agreement", least=0.98)),
)
