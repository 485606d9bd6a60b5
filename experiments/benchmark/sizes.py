"""The cases: one layer from small dense to ResNet-50's, in two dtypes, with and without what follows it."""

from typing import NamedTuple

# "flax, stable" is `use_fast_variance=False`; PyTorch's layout is the one that its users are advised to take for
# convolutions.
OURS, TORCH = "jaxbn", "torch, channels_last"
CONTENDERS = (OURS, "flax", "flax, stable", "haiku", "equinox", TORCH)
# What follows the layer: nothing, a ReLU, or the addition of a skip connection and a ReLU.
EPILOGUES = ("none", "relu", "residual+relu")


class Case(NamedTuple):
    """One layer as it is used.

    Attributes:
        shape: of x, features last.
        dtype: of x, by name.
        epilogue: one of `EPILOGUES`.
    """

    shape: tuple[int, ...]
    dtype: str
    epilogue: str

    @property
    def relu(self) -> bool:
        """Return whether a ReLU follows."""
        return self.epilogue.endswith("relu")

    @property
    def residual(self) -> bool:
        """Return whether a skip connection is added first."""
        return self.epilogue.startswith("residual")

    @property
    def size(self) -> str:
        """Return the shape as a label."""
        return "x".join(map(str, self.shape))


class Plan(NamedTuple):
    """The extent of a measurement.

    Attributes:
        name: of the plan.
        contenders: some of `CONTENDERS`, ours among them.
        dense: shapes `[rows, features]`.
        images: shapes `[height, width, channels]` of ResNet-50.
        batch: how many images at a time.
        dtypes: by name.
        epilogues: some of `EPILOGUES`.
        rounds: repetitions of each time; the median counts.
        deep: how many layers are traced and compiled.
        compilations: how often.
        scanned: how many layers `lax.scan` runs over.
        stages: blocks in each stage of the ResNet.
        steps: how many of its training steps are timed.
    """

    name: str
    contenders: tuple[str, ...]
    dense: tuple[tuple[int, int], ...]
    images: tuple[tuple[int, int, int], ...]
    batch: int
    dtypes: tuple[str, ...]
    epilogues: tuple[str, ...]
    rounds: int
    deep: int
    compilations: int
    scanned: int
    stages: tuple[int, ...]
    steps: int

    def cases(self) -> list[Case]:
        """List all that is timed, in order."""
        shapes = [*self.dense, *((self.batch, *image) for image in self.images)]
        return [Case(shape, d, e) for d in self.dtypes for e in self.epilogues for shape in shapes]


RESNET_50 = (3, 4, 6, 3)
FULL = Plan(
    name="full",
    contenders=CONTENDERS,
    dense=((256, 128), (4096, 512)),
    images=((112, 112, 64), (56, 56, 64), (56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048)),
    batch=8,
    dtypes=("float32", "bfloat16"),
    epilogues=EPILOGUES,
    rounds=31,
    deep=50,
    compilations=5,
    scanned=16,
    stages=RESNET_50,
    steps=7,
)
QUICK = FULL._replace(
    name="quick",
    dense=((4096, 512),),
    images=((56, 56, 64), (14, 14, 1024)),
    epilogues=("relu",),
    rounds=15,
    deep=10,
    compilations=2,
    stages=(1, 1),
    steps=3,
)
GPU_BATCH = 128  # keeps it busy
